"""Inspect (UK AI Security Institute) with an adapter attached: the model provider named `commandv`.

`pip` registers this module with Inspect, which imports it whenever it looks for a provider; that is why torch, and
the parts of commandv that need it, are imported where they are used.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import commandv as cv
from commandv.errors import InputError, require_positive

try:
    import anyio
    import anyio.to_thread
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        ContentReasoning,
        ContentText,
        GenerateConfig,
        Model,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ImportError as error:
    raise ImportError(
        f"commandv.interop.inspect_ai needs Inspect ({error}); pip install 'commandv[inspect]'"
    ) from error

if TYPE_CHECKING:
    from commandv.adapters.adapter import Adapter
    from commandv.models.lm import LM
    from commandv.models.load import Template

MAX_TOKENS = 2048  # of an answer where neither task nor user says; what Inspect's own local provider does
GATHER_SECONDS = 0.05  # how long the first request of a batch waits for company

# What a request may not ask for, rather than having it left aside in silence.
UNSUPPORTED = (
    "best_of",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "response_schema",
)


@dataclass(frozen=True)
class _Settings:
    """What the rows of one batch must share."""

    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float  # 0 is greedy
    top_p: float | None
    top_k: int | None
    seed: int | None


@dataclass(eq=False)
class _Request:
    ids: list[int]
    settings: _Settings
    answer: ModelOutput | None = field(default=None)


class CommandVAPI(ModelAPI):
    """A commandv model, with or without an adapter, as Inspect sees one.

    Requests that arrive together run as one batch. Answers are greedy unless the task or user sets a temperature.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        *,
        lm: LM | None = None,
        adapter: Adapter | str | Path | None = None,
        scale: float = 1.0,
        layer: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        template: Template = "auto",
        system: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        same_as: str = "",
        trust_remote_code: bool = False,
        batch_size: int = 16,
    ) -> None:
        """Load the model and the adapter.

        Args:
            model_name: what `commandv.load_model` takes, whose arguments are among these.
            base_url: must be None, as there is no address.
            api_key: must be None, as there is no key.
            config: generation settings of the model.
            lm: a model that is in memory already, instead of loading one.
            adapter: an adapter, what `commandv.load_adapter` takes, or None for the model alone.
            scale: factor on the adapter's deltas.
            layer: for a bare vector file, the layer it acts on.
            device: where the model goes, such as `"cuda"` or `"auto"`.
            system: system prompt of conversations that begin without one.
            batch_size: most requests per batch, and how many Inspect keeps open.

        Raises:
            InputError: a batch size below 1, a scale that is not finite, a base_url or an api_key.
            CommandVError: what loading a model or an adapter raises, or the adapter is for another model.
        """
        super().__init__(model_name, base_url, api_key, [], config)
        # Inspect makes a second instance, with a made-up key, to look up what is known of a model's name. It lives with
        # being refused; accepting would load the model once more, and without the arguments it was given.
        if base_url or api_key:
            raise InputError(f"commandv/{model_name} runs in this process; it takes no base_url and no api_key")
        require_positive(batch_size=batch_size)
        self.lm = lm or cv.load_model(
            model_name,
            dtype=dtype,
            device_map=device,
            revision=str(revision) if revision is not None else None,  # Inspect reads 2024 as a number
            template=template,
            system=system,
            template_options=template_options,
            same_as=same_as,
            trust_remote_code=trust_remote_code,
        )
        self.adapter = cv.load_adapter(adapter, layer=layer) if isinstance(adapter, str | Path) else adapter
        self.scale = float(scale)
        self.batch_size = batch_size
        with self._attached():  # an adapter that does not fit is an error now, not in each sample
            pass
        self._waiting: list[_Request] = []
        self._turn = anyio.Lock()

    def max_tokens(self) -> int | None:
        """Return the length of an answer when nobody sets it."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """Return how many requests Inspect keeps open: enough to fill a batch."""
        return self.batch_size

    def connection_key(self) -> str:
        """Return a name of this instance: models in memory do not share one limit, as those of one account would."""
        return f"{self.model_name} {id(self)}"

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one conversation.

        Raises:
            InputError: tools, media or settings that are not supported, or messages that the prompt format cannot hold.
        """
        if tools:
            raise InputError(f"commandv/{self.model_name}: got {len(tools)} tools; tools are not supported")
        from commandv.models.encoding import encode_conversation

        ids = encode_conversation(self.lm, _turns(input))
        limit, context = config.max_tokens or MAX_TOKENS, self.lm.context_length
        if context is not None:
            limit = min(limit, context - len(ids))
        if limit < 1:
            return ModelOutput.from_content(
                self.model_name, "", "model_length", f"a prompt of {len(ids)} tokens; the context holds {context}"
            )
        request = _Request(ids, _settings(self.lm, config, limit))
        return await self._submit(request)

    async def _submit(self, request: _Request) -> ModelOutput:
        """Wait for the model; whoever gets it first answers the requests that wait beside its own."""
        self._waiting.append(request)
        try:
            async with self._turn:
                if request.answer is None:
                    await anyio.sleep(GATHER_SECONDS)
                    others = (one for one in self._waiting if one is not request and one.settings == request.settings)
                    unanswered = [one for one in others if one.answer is None]
                    batch = [request, *unanswered[: self.batch_size - 1]]
                    # If it fails, the others have no answer still: each takes its turn, and gets its own error.
                    await anyio.to_thread.run_sync(self._answer, batch)
        finally:
            self._waiting.remove(request)
        assert request.answer is not None
        return request.answer

    def _attached(self) -> Any:
        if self.adapter is None:
            return contextlib.nullcontext()
        return cv.attach(self.lm, self.adapter, scale=self.scale)

    def _answer(self, batch: list[_Request]) -> None:
        """Generate for one batch, on a thread of its own so that Inspect goes on meanwhile."""
        import torch
        from transformers import StoppingCriteriaList

        from commandv.models.encoding import pad
        from commandv.models.finite import Finite
        from commandv.models.generation import greedy
        from commandv.models.running import own_pass

        lm, settings, start = self.lm, batch[0].settings, time.monotonic()
        rows = pad(lm, [one.ids for one in batch])
        width = rows.input_ids.shape[1]
        # With a seed the answers of a batch are reproducible, and the process's own random state is left alone.
        seeded = torch.random.fork_rng() if settings.seed is not None else contextlib.nullcontext()
        with torch.inference_mode(), seeded, self._attached(), own_pass(lm):
            config = greedy(lm, settings.max_new_tokens)
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
            if settings.temperature:
                config.update(do_sample=True, temperature=settings.temperature)
                config.update(top_p=1.0 if settings.top_p is None else settings.top_p, top_k=settings.top_k or 0)
            stopping = [_stopper(lm, settings.stop, width)] if settings.stop else []
            out = lm.model.generate(
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList(stopping),
                logits_processor=[Finite(lm, range(1, len(batch) + 1), [one.ids for one in batch])],
            )
        eos = config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos])
        seconds = time.monotonic() - start
        for one, generated in zip(batch, out[:, width:].tolist(), strict=True):
            one.answer = self._output(one, generated, ends, seconds)

    def _output(self, request: _Request, generated: list[int], ends: set[int | None], seconds: float) -> ModelOutput:
        """Cut an answer where it ends, and say why it ended there."""
        # A row that is done before its batch is filled up with padding, which may be the end token itself.
        padding = {self.lm.tokenizer.pad_token_id} - ends
        length = next((place for place, token in enumerate(generated) if token in ends | padding), len(generated))
        eos = generated[length : length + 1]
        text = self.lm.tokenizer.decode(generated[:length], skip_special_tokens=True)
        length += bool(ends & set(eos))
        cuts = [at for stop in request.settings.stop if (at := text.find(stop)) >= 0]
        ended = bool(cuts) or bool(eos)
        text = text[: min(cuts)] if cuts else text
        message = ChatMessageAssistant(
            content=text if self.lm.chat else text.strip(), model=self.model_name, source="generate"
        )
        n_prompt = len(request.ids)
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason="stop" if ended else "max_tokens")],
            usage=ModelUsage(input_tokens=n_prompt, output_tokens=length, total_tokens=n_prompt + length),
            time=seconds,
        )


# Inspect finds the provider by this name. The decorator returns a factory, so the class keeps a name of its own.
provider: Callable[..., ModelAPI] = modelapi(name="commandv")(CommandVAPI)


def inspect_model(lm: LM, adapter: Adapter | None = None, *, scale: float = 1.0, batch_size: int = 16) -> Model:
    """Make an Inspect model of one that is in memory.

    Inspect's `get_model` is not the way here: it remembers models by the text of their arguments, and would take two
    adapters in memory for the same one.

    Args:
        lm: the model.
        adapter: an adapter, or None for the model alone.
        scale: factor on its deltas.
        batch_size: most requests per batch.
    """
    api = provider(lm.id, lm=lm, adapter=adapter, scale=scale, batch_size=batch_size)
    return Model(api, GenerateConfig(), {"adapter": adapter.name if adapter else None, "scale": scale})


def _turns(messages: list[ChatMessage]) -> list[dict[str, str]]:
    turns = []
    for message in messages:
        if message.role not in ("system", "user", "assistant"):
            raise InputError(f"a message of role {message.role!r}; expected system, user and assistant messages")
        parts = [] if isinstance(message.content, str) else message.content
        other = {part.type for part in parts if not isinstance(part, ContentText | ContentReasoning)}
        if other:
            raise InputError(f"a {message.role} message holds {', '.join(sorted(other))}; only text is supported")
        turns.append({"role": message.role, "content": message.text})
    return turns


def _settings(lm: LM, config: GenerateConfig, limit: int) -> _Settings:
    from commandv.models.template import PLAIN_STOP

    asked = [name for name in UNSUPPORTED if getattr(config, name, None)]
    if (config.num_choices or 1) > 1:
        asked.append("num_choices")
    if asked:
        raise InputError(f"{', '.join(asked)}: not supported by commandv models; leave it out of the configuration")
    stop = (*(text for text in config.stop_seqs or () if text), *(() if lm.chat else (PLAIN_STOP,)))
    temperature = config.temperature or 0.0
    if not temperature:  # the rest means nothing to a greedy answer, and would only split batches
        return _Settings(limit, stop, 0.0, None, None, None)
    return _Settings(limit, stop, temperature, config.top_p, config.top_k, config.seed)


def _stopper(lm: LM, stop: tuple[str, ...], width: int) -> Any:
    """Return the criterion that ends a row once a stop sequence is in its text; `width` columns are prompt."""
    import torch

    # A sequence of n bytes ends within the last n tokens and one more: a token holds at least a byte of it.
    tail = max(len(text.encode()) for text in stop) + 1

    def done(input_ids: Any, _scores: Any, **_: Any) -> Any:
        texts = lm.tokenizer.batch_decode(input_ids[:, width:][:, -tail:], skip_special_tokens=True)
        return torch.tensor([any(one in text for one in stop) for text in texts], device=input_ids.device)

    return done
