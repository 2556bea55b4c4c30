"""Language models: loading from anywhere, finding the decoder blocks, formatting and tokenising prompts."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import torch
from torch import nn

from commandv.errors import InputError, MismatchError, ModelError
from commandv.paths import digest

Template = Literal["auto", "chat", "plain"]

# How a base model is asked. The answer starts on a line of its own, as it does in most chat templates, so that the last
# prompt token of both kinds of model predicts a word without a leading space. It ends where a new question starts.
PLAIN_FORMAT = "Question: {}\nAnswer:\n"
PLAIN_STOP = "\nQuestion:"

_MARK = "commandv-prompt-begins-here"


@dataclass(frozen=True)
class ModelRef:
    """Which model something was made from or for; empty fields are unknown.

    Attributes:
        id: the name it was loaded by.
        revision: hub commit, or a hash of the model's content.
        d_model: width of the residual stream.
        n_layers: number of decoder blocks; 0 when unknown.
        template: hash of the prompt format in use.
    """

    id: str = ""
    revision: str = ""
    d_model: int = 0
    n_layers: int = 0
    template: str = ""

    def require(self, other: ModelRef, what: str) -> None:
        """Raise `MismatchError` unless `other` is the same model; fields unknown on either side are not compared."""
        for field, hint in (
            ("d_model", "it has another width; paste() carries an adapter between models"),
            ("n_layers", "it has another depth; paste() carries an adapter between models"),
            ("revision", "profile or train again with the model that is in use now"),
            ("template", "load the model with the same prompt format (template=)"),
        ):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine and theirs and mine != theirs:
                raise MismatchError(
                    f"{what}: made for {self.id or 'a model'} ({field} {mine}), "
                    f"got {other.id or 'a model'} ({field} {theirs}); {hint}"
                )
        if self.id and other.id and self.id != other.id and not (self.revision and other.revision):
            raise MismatchError(
                f"{what}: made for {self.id}, got {other.id}. If they are the same model under two names, "
                "load it by the name that the file gives"
            )


class Encoded(NamedTuple):
    """A formatted prompt as token ids.

    Attributes:
        ids: token ids, with one BOS where the model uses one.
        n_prompt: how many of them belong to the prompt (template included); the rest is the reply.
        text_ends: for each token the offset in the *text* (reply if there is one, else the user's words) of the
            character after its last one; -1 for tokens outside the text.
    """

    ids: list[int]
    n_prompt: int
    text_ends: list[int]


@dataclass(frozen=True, eq=False)
class LM:
    """A causal language model with what commandv needs to know about it.

    Attributes:
        model: the transformers model, in eval mode.
        tokenizer: its fast tokenizer.
        id: the name it was loaded by.
        revision: hub commit or content hash.
        blocks: the decoder blocks in order; the output of block l is the residual stream at layer l.
        owner: the module that runs the blocks, usually the model without its head.
        d_model: width of the residual stream.
        chat: True when prompts go through the tokenizer's chat template, False for the plain format.
    """

    model: Any
    tokenizer: Any
    id: str
    revision: str
    blocks: tuple[nn.Module, ...]
    owner: nn.Module
    d_model: int
    chat: bool

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    @functools.cached_property
    def ref(self) -> ModelRef:
        """The identity of this model, as stored in profiles and adapters."""
        template = self.tokenizer.chat_template if self.chat else PLAIN_FORMAT
        return ModelRef(self.id, self.revision, self.d_model, self.n_layers, digest(template))

    @property
    def context_length(self) -> int | None:
        """The longest sequence the model's position embeddings allow, None when it states none."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    def __repr__(self) -> str:
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return f"LM({self.id}, {self.n_layers} layers, d_model {self.d_model}, {dtype})"


def load_model(
    id: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    revision: str | None = None,
    template: Template = "auto",
    trust_remote_code: bool = False,
) -> LM:
    """Load a language model and its tokenizer.

    Args:
        id: a hub id (`meta-llama/Llama-3.2-3B-Instruct`), a local directory, a `.gguf` file, or a packaged
            model (`gemma-3-270m`, `smollm2-135m-instruct`). GGUF files are converted once into the cache.
        dtype: `"float32"`, `"bfloat16"`, `"float16"` or a torch dtype. Default: bfloat16 where the hardware
            multiplies it fast, else float32.
        device_map: passed to transformers (`"auto"`, `"cuda"`, a dict); needs the accelerate package.
        revision: hub branch, tag or commit.
        template: `"chat"` for the tokenizer's chat template, `"plain"` for the stated question-and-answer format,
            `"auto"` for chat where the tokenizer has a template.
        trust_remote_code: run Python code that comes with the model. Off unless you say so.

    Raises:
        ModelError: not found, not a causal language model, or its blocks cannot be found.
        InputError: an unknown dtype, or chat asked of a tokenizer without a chat template.
    """
    import transformers

    from commandv.gguf_models import PACKAGED, converted

    kind = resolve_dtype(dtype)
    name = str(id)
    place: str = name
    fingerprint = None
    if name in PACKAGED or name.endswith(".gguf"):
        directory = converted(name)
        place, fingerprint = str(directory), directory.name.rpartition("-")[2]
    elif Path(name).is_dir():
        fingerprint = directory_fingerprint(Path(name))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        model = _load_weights(place, kind, device_map, options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"{name}: cannot be loaded: {error}. Expected a hub id, a local model directory, a .gguf file or one of "
            f"{', '.join(PACKAGED)}; `commandv doctor` checks the installation"
        ) from error
    commit = fingerprint or getattr(model.config, "_commit_hash", None) or weights_fingerprint(model)
    return wrap_model(model, tokenizer, name, revision=commit, template=template)


def wrap_model(model: Any, tokenizer: Any, id: str, *, revision: str | None = None, template: Template = "auto") -> LM:
    """Make an `LM` of a transformers model and tokenizer that are already in memory.

    Args:
        model: a causal language model; it is put in eval mode.
        tokenizer: its fast tokenizer.
        id: a name for messages and provenance.
        revision: identity of the weights; a hash over samples of them when not given.
        template: as in `load_model`.

    Raises:
        ModelError: the blocks cannot be found, or the tokenizer is a slow one (no character offsets).
        InputError: chat asked of a tokenizer without a chat template.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{id}: the tokenizer has no fast version, which is needed for character offsets")
    if template == "chat" and not tokenizer.chat_template:
        raise InputError(f"{id}: asked for chat, but the tokenizer has no chat template; use template='plain'")
    if template not in ("auto", "chat", "plain"):
        raise InputError(f"template={template!r}: expected 'auto', 'chat' or 'plain'")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token if tokenizer.eos_token is not None else tokenizer.unk_token
    model.eval()
    _feed_head_contiguously(model)
    owner, blocks, d_model = find_blocks(model)
    chat = bool(tokenizer.chat_template) and template != "plain"
    return LM(model, tokenizer, id, revision or weights_fingerprint(model), blocks, owner, d_model, chat)


def _feed_head_contiguously(model: Any) -> None:
    """Have the head get contiguous states.

    PyTorch multiplies a strided slice of states, as `logits_to_keep` makes them, by a copy of a *frozen* head for each
    sequence: with a large vocabulary gigabytes, and a minute where a tenth of a second would do.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.contiguous() if isinstance(one, torch.Tensor) else one for one in args)


def _load_weights(place: str, dtype: torch.dtype, device_map: Any, options: dict[str, Any]) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(place, **options)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder model; commandv needs a decoder-only one")
    # Multimodal models (Llava, Gemma 3 4B and larger ...) are not in the causal-LM mapping.
    auto: Any = transformers.AutoModelForCausalLM
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not options["trust_remote_code"]:
        auto = transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(place, dtype=dtype, device_map=device_map, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):  # transformers would make them up at random
        raise ValueError(f"{len(missing)} weights of the model are not in its files ({', '.join(missing[:3])} ...)")
    return model


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the torch dtype for a name; None picks bfloat16 where the hardware multiplies it fast, else float32.

    Raises:
        InputError: not a floating-point dtype that models run in.
    """
    if dtype is None:
        if torch.cuda.is_available():
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
        return torch.bfloat16 if fast else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise InputError(f"dtype={dtype!r}: expected 'float32', 'bfloat16' or 'float16'")
    return resolved


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.split())


def find_blocks(model: Any) -> tuple[nn.Module, tuple[nn.Module, ...], int]:
    """Find the decoder blocks by structure: the shallowest module list that a text-only pass runs layer by layer.

    Candidates have as many entries as the text configuration has layers. A vision tower or a list of experts
    of the same length is told apart by running one token: every block must run once and put out [1, 1, d_model].

    Returns:
        (the module that holds the blocks, the blocks, d_model).

    Raises:
        ModelError: no such list.
    """
    config = model.config.get_text_config(decoder=True)
    n_layers = config.num_hidden_layers
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    calls: dict[nn.Module, list[torch.Size]] = {}

    def record(module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, torch.Tensor):
            calls.setdefault(module, []).append(tensor.shape)

    handles = [block.register_forward_hook(record) for _, blocks in candidates for block in blocks]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.get_input_embeddings().weight.device))
    finally:
        for handle in handles:
            handle.remove()
    for name, blocks in sorted(candidates, key=lambda item: item[0].count(".")):
        shapes = {tuple(calls.get(block, [()])[0]) for block in blocks}
        once = all(len(calls.get(block, [])) == 1 for block in blocks)
        if once and len(shapes) == 1 and len(shape := shapes.pop()) == 3:
            return model.get_submodule(name.rpartition(".")[0]), tuple(blocks), shape[-1]
    raise ModelError(
        f"{type(model).__name__}: found no list of {n_layers} decoder blocks that each run once and put out "
        f"[batch, sequence, d_model]; looked at {[name for name, _ in candidates] or 'no module list of that length'}"
    )


def directory_fingerprint(directory: Path) -> str:
    """Hash a model directory: its configuration and, per weight file, size, header and evenly spaced samples."""
    parts: list[Any] = []
    for path in sorted(directory.glob("*.json")):
        if path.name in ("config.json", "tokenizer.json"):
            parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        size = path.stat().st_size
        sampled = hashlib.sha256()
        with path.open("rb") as file:
            for start in range(0, size, max(1 << 16, size // 64)):
                file.seek(start)
                sampled.update(file.read(1 << 16))
        parts.append((path.name, size, sampled.hexdigest()))
    return digest(parts)


def weights_fingerprint(model: nn.Module) -> str:
    """Hash samples of every parameter of a model in memory."""
    sampled = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        sampled.update(name.encode() + values.numpy().tobytes())
    return sampled.hexdigest()[:16]


def uses_bos(lm: LM) -> bool:
    """True when the tokenizer itself starts a text with BOS, so that the model expects one."""
    bos = lm.tokenizer.bos_token_id
    return bos is not None and lm.tokenizer("a").input_ids[:1] == [bos]


def format_prompt(lm: LM, prompt: str) -> str:
    """Return the text that the model sees for one user turn, up to where its reply starts.

    Raises:
        InputError: the prompt is empty.
    """
    if not prompt.strip():
        raise InputError("an empty prompt; give it a text")
    if not lm.chat:
        return PLAIN_FORMAT.format(prompt)
    turn = [{"role": "user", "content": prompt}]
    return lm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def encode(lm: LM, prompt: str, response: str = "", *, max_length: int | None = None) -> Encoded:
    """Format and tokenise one prompt (and the reply to it), with one BOS.

    A prompt that is too long loses its *beginning*; the template around it and the prompt's end stay, so that the
    last prompt token is what the model answers from.

    Args:
        lm: the model.
        prompt: the user's words.
        response: the reply, which follows at once.
        max_length: longest result in tokens, at most the model's context. Default: the context, and a longer prompt
            is an error.

    Raises:
        InputError: empty prompt, a prompt longer than the context, or a `max_length` too small for the template.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length={max_length}: expected 1 or more")
    encoded = _encode(lm, prompt, response)
    limit = min((n for n in (max_length, lm.context_length) if n is not None), default=None)
    if limit is None or len(encoded.ids) <= limit:
        return encoded
    if max_length is None:
        raise InputError(
            f"a prompt of {len(encoded.ids)} tokens ({prompt[:40]!r} ...) is longer than the context of {lm.id} "
            f"({limit} tokens); shorten it, or pass max_length= to keep its end"
        )
    offsets = lm.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    drop = len(encoded.ids) - limit
    while drop < len(offsets):
        shorter = _encode(lm, prompt[offsets[drop][0] :].lstrip(), response)
        if len(shorter.ids) <= limit:
            return shorter
        drop += len(shorter.ids) - limit
    raise InputError(f"a max_length of {limit} leaves no room for the prompt beside the template and the reply")


def _encode(lm: LM, prompt: str, response: str) -> Encoded:
    before = format_prompt(lm, prompt)
    tokens = lm.tokenizer(before + response, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(tokens.input_ids), list(tokens["offset_mapping"])
    text = response or prompt.strip()
    start = len(before) if response else _text_start(lm, before, text)
    stop = start + len(text)
    inside = start >= 0  # a template that rewrites the user's words leaves no text to index
    ends = [end - start if inside and start < end <= stop else -1 for _, end in offsets]
    n_prompt = sum(1 for begin, end in offsets if end <= len(before)) if response else len(ids)
    if uses_bos(lm) and ids[:1] != [lm.tokenizer.bos_token_id]:
        ids, ends, n_prompt = [lm.tokenizer.bos_token_id, *ids], [-1, *ends], n_prompt + 1
    return Encoded(ids, n_prompt, ends)


def _text_start(lm: LM, formatted: str, text: str) -> int:
    """Return where the user's words begin in a formatted prompt, -1 when the template rewrites them.

    A marked prompt tells it, because words like "user" or "Answer" are in the templates too.
    """
    head = format_prompt(lm, _MARK).find(_MARK)
    return formatted.find(text, head) if head >= 0 else -1


class Batch(NamedTuple):
    """Token ids with their attention mask and position ids, each [batch, sequence], on the model's device."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def pad(lm: LM, rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "left") -> Batch:
    """Pad rows of token ids to one length; positions count from each row's first real token."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), lm.tokenizer.pad_token_id or 0, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(ids.to(lm.device), mask.to(lm.device), positions.to(lm.device))


def pad_replies(lm: LM, rows: Sequence[Encoded]) -> tuple[Batch, int]:
    """Pad prompts at their left and replies at their right, so that every reply starts in one column.

    Returns:
        (the batch, the number of prompt columns).
    """
    prompts = pad(lm, [one.ids[: one.n_prompt] for one in rows], "left")
    replies = pad(lm, [one.ids[one.n_prompt :] for one in rows], "right")
    mask = torch.cat([prompts.attention_mask, replies.attention_mask], 1)
    ids = torch.cat([prompts.input_ids, replies.input_ids], 1)
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0)), prompts.input_ids.shape[1]


def accepts(module: nn.Module, argument: str) -> bool:
    """True when a module's forward takes the keyword argument."""
    return argument in inspect.signature(module.forward).parameters


def run_blocks(lm: LM, batch: Batch) -> None:
    """Run the model without its head on a padded batch, for the sake of hooks on the blocks."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if accepts(lm.owner, "position_ids"):
        inputs["position_ids"] = batch.position_ids
    lm.owner(**inputs)
