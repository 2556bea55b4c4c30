"""What a language model is to commandv."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import nn

from commandv.errors import InputError
from commandv.models.hooks import attachments
from commandv.models.identity import ModelRef, weights_hash
from commandv.storage.files import digest

# How a base model is asked. The answer starts on a line of its own, as it does in most chat templates, so that the last
# prompt token of both kinds of model predicts a word without a leading space. It ends where a new question starts.
PLAIN_FORMAT = "Question: {}\nAnswer:\n"
# What `render` says itself; and what the tokenizer does with a template, which is nothing that a template reads.
RESERVED = (
    "messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize", "tools", "documents",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "processor_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template is filled with beside the conversation."""

    system: str | None = None  # the system prompt; None leaves what the template itself says
    # the template's own variables, such as `{"enable_thinking": False}`; plain values
    options: Mapping[str, Any] = field(default_factory=dict)
    # what a template that writes the date writes. Default: when this value was made, so that one loaded model has one
    # prompt for one text, whatever the clock says
    date: datetime = field(default_factory=datetime.now, compare=False)

    def __post_init__(self) -> None:
        try:
            (self.system or "").encode()
        except (AttributeError, TypeError, UnicodeEncodeError):
            raise InputError(f"system prompt {self.system!r:.60}: expected a text") from None
        for name in self.options:
            if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
                raise InputError(f"template option {name!r}: expected the name of one of the template's own variables")
        try:
            json.dumps(dict(self.options))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"template options: expected plain values, as JSON has them ({error})") from None

    def __str__(self) -> str:
        """Return system prompt and options as JSON, for the record; nothing where neither is set."""
        said = {} if self.system is None else {"system": self.system}
        options = {"options": dict(self.options)} if self.options else {}
        return json.dumps({**said, **options}, sort_keys=True, ensure_ascii=False) if said or options else ""


@dataclass(frozen=True, eq=False)
class LM:
    """A causal language model with what commandv needs to know about it.

    Attributes:
        model: the transformers model; nothing of it is changed.
        tokenizer: its fast tokenizer.
        id: the name it was loaded by.
        revision: hub commit, or hash of the GGUF file; "" where there is neither.
        blocks: the decoder blocks in order; the output of block l is the residual stream at layer l.
        owner: the module that runs the blocks, usually the model without its head.
        d_model: width of the residual stream.
        chat: True when prompts go through the tokenizer's chat template, False for the plain format.
        format: system prompt and options of the template.
        same_as: name of the model that it is said to be the same as; "" for none.
        stream: which of several streams that a block puts out it works on.
        recurrent: the model keeps more from token to token than keys and values; see `commandv.models.blocks.Found`.
    """

    model: Any
    tokenizer: Any
    id: str
    revision: str
    blocks: tuple[nn.Module, ...]
    owner: nn.Module
    d_model: int
    chat: bool
    format: ChatFormat = field(default_factory=ChatFormat)
    same_as: str = ""
    stream: int = 0
    recurrent: bool = False

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embeddings."""
        return device_of(self.model)

    @property
    def template(self) -> Any:
        """What defines the prompt format: a text, or several by name."""
        return self.tokenizer.chat_template if self.chat else PLAIN_FORMAT

    @property
    def ref(self) -> ModelRef:
        """The identity of this model as it is now, as stored in profiles and adapters."""
        known = not self.same_as  # else a name is all that is told of the other model
        return ModelRef(
            self.id if known else self.same_as,
            self.revision if known else "",
            self.d_model,
            self.n_layers,
            digest(self.template),
            weights_hash(self.model) if known else "",
            str(self.format),
        )

    @property
    def context_length(self) -> int | None:
        """The longest sequence the model's position embeddings allow, None when it states none."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    def __repr__(self) -> str:
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        here = "".join(f"; attached: {one}" for one in attachments(self.owner))
        return f"LM({self.id}, {self.n_layers} layers, d_model {self.d_model}, {dtype}{here})"


def device_of(model: Any) -> torch.device:
    """Return where a model takes its token ids: where its embeddings are, or are brought when they are offloaded."""
    embeddings = model.get_input_embeddings()
    if embeddings.weight.device.type != "meta":
        return embeddings.weight.device
    hook = getattr(embeddings, "_hf_hook", None)  # accelerate's
    return torch.device(getattr(hook, "execution_device", None) or "cpu")
