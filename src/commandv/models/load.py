"""Language models from anywhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from commandv.arguments import checked
from commandv.errors import InputError, ModelError
from commandv.models.blocks import find_blocks
from commandv.models.devices import require_device
from commandv.models.lm import LM, ChatFormat
from commandv.models.names import PACKAGED, require_model_name
from commandv.models.running import compiled
from commandv.models.template import check_format
from commandv.storage.reading import MOST_TEXT, first_line, read_json

Template = Literal["auto", "chat", "plain"]


@checked
def load_model(
    id: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    tp_plan: str | None = None,
    revision: str | None = None,
    template: Template = "auto",
    system: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    same_as: str = "",
    trust_remote_code: bool = False,
) -> LM:
    """Load a language model and its tokenizer.

    Args:
        id: a hub id (`meta-llama/Llama-3.2-3B-Instruct`), a local directory, a `.gguf` file, or a packaged
            model (`gemma-3-270m`, `smollm2-135m-instruct`). GGUF files are converted once into the cache.
        dtype: `"float32"`, `"bfloat16"`, `"float16"` or a torch dtype. Default: bfloat16 where the hardware
            multiplies it fast, else float32.
        device_map: passed to transformers: `"auto"`, `"cuda"`, or a dict from module to device, for several devices.
        quantization_config: passed to transformers, such as `transformers.BitsAndBytesConfig(load_in_4bit=True)`; needs
            the package that it names.
        tp_plan: passed to transformers: `"auto"` splits every weight over the processes that torchrun started.
        revision: hub branch, tag or commit.
        template: `"chat"` for the tokenizer's chat template, `"plain"` for the stated question-and-answer format,
            `"auto"` for chat where the tokenizer has a template.
        system: system prompt of every prompt; None leaves what the template itself says.
        template_options: the chat template's own variables, such as `{"enable_thinking": False}`.
        same_as: take the model for the one of this name: a local copy, another precision, a fine-tuned version.
            Adapters and profiles of that model are accepted, and what is made is said to be of it.
        trust_remote_code: run Python code that comes with the model. Off unless you say so.

    Raises:
        ModelError: not found, not a causal language model, or its blocks cannot be found.
        InputError: an unknown dtype, chat asked of a tokenizer without a chat template, or a system prompt or option
            that its template does not take, or a device that is not there.
    """
    import transformers

    from commandv.models.gguf import converted

    kind = resolve_dtype(dtype)
    require_device(device_map)
    name = str(id)
    require_model_name(name)
    place: str = name
    fingerprint = None
    if name in PACKAGED or name.endswith(".gguf"):
        directory = converted(name)
        place, fingerprint = str(directory), directory.name.rpartition("-")[2]
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    placing = {"device_map": device_map, "quantization_config": quantization_config, "tp_plan": tp_plan}
    if revision is not None:
        options["revision"] = revision
    try:
        if os.path.isdir(name):
            for file in sorted(Path(name).glob("*.json")):
                # Tokenizers of no stated length have one of 31 digits.
                read_json(file, most=MOST_TEXT, digits=40, once=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        model = _load_weights(place, kind, {name: one for name, one in placing.items() if one is not None}, options)
    except Exception as error:  # whatever files say, transformers and its parts build from it, and raise anything
        raise ModelError(
            f"{name}: cannot be loaded: {first_line(error)}. Expected a hub id, a local model directory, a .gguf file "
            f"or one of {', '.join(PACKAGED)}; `commandv doctor` checks the installation"
        ) from error
    commit = fingerprint or getattr(model.config, "_commit_hash", None)
    return wrap_model(
        model, tokenizer, name, revision=commit, template=template, system=system, template_options=template_options,
        same_as=same_as,
    )  # fmt: skip


@checked
def wrap_model(
    model: Any,
    tokenizer: Any,
    id: str,
    *,
    revision: str | None = None,
    template: Template = "auto",
    system: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    same_as: str = "",
) -> LM:
    """Make an `LM` of a transformers model and tokenizer that are already in memory; neither is changed.

    Args:
        model: a causal language model, in any mode; passes of our own run it in eval mode and restore what was set.
        tokenizer: its fast tokenizer.
        id: a name for messages and provenance.
        revision: hub commit, where there is one; the weights themselves are hashed when it matters.
        template: as in `load_model`, and so are the next three.

    Raises:
        ModelError: not a causal language model, compiled, its blocks cannot be found, or the tokenizer is a slow one
            (no character offsets).
        InputError: chat asked of a tokenizer without a chat template, or a system prompt or option that its template
            does not take.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{id}: the tokenizer has no fast version, which is needed for character offsets")
    try:
        tokenizer("tea?")
        tokenizer("tea?", add_special_tokens=False, return_offsets_mapping=True)
    except BaseException as error:  # whatever its files hold; a panic of Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"{id}: the tokenizer cannot read a word: {first_line(error)}; its files are damaged"
        ) from error
    if template == "chat" and not tokenizer.chat_template:
        raise InputError(f"{id}: asked for chat, but the tokenizer has no chat template; use template='plain'")
    if template not in ("auto", "chat", "plain"):
        raise InputError(f"template={template!r}: expected 'auto', 'chat' or 'plain'")
    _require_language_model(model, id)
    found = find_blocks(model)
    chat = bool(tokenizer.chat_template) and template != "plain"
    format = ChatFormat(system, template_options or {})
    return check_format(
        LM(
            model, tokenizer, id, revision or "", found.blocks, found.owner, found.d_model, chat, format, same_as,
            found.stream, found.recurrent,
        )
    )  # fmt: skip


@checked
def wrap_like(lm: LM, model: Any, id: str) -> LM:
    """Make an `LM` of another model in memory, which is asked as one that is known is.

    Raises:
        ModelError: as `wrap_model`.
    """
    return replace(wrap_model(model, lm.tokenizer, id, template="chat" if lm.chat else "plain"), format=lm.format)


def _require_language_model(model: Any, id: str) -> None:
    """Raise `ModelError` unless it is a decoder with a language-model head, as transformers or PEFT make it."""
    kind = type(model).__name__
    if compiled(model):
        raise ModelError(f"{id}: a compiled {kind}; wrap the model as it was before torch.compile")
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise ModelError(f"{id}: a {kind}; expected a transformers model (of a DataParallel, its .module)")
    if model.config.is_encoder_decoder:
        raise ModelError(f"{id}: {kind} is an encoder-decoder model; commandv needs a decoder-only one")
    if model.get_output_embeddings() is None or not hasattr(model, "generate"):
        raise ModelError(f"{id}: {kind} has no language-model head; load it with AutoModelForCausalLM")


def _load_weights(place: str, dtype: torch.dtype, placing: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(_configured(place), **options)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder model; commandv needs a decoder-only one")
    # Multimodal models (Llava, Gemma 3 4B and larger ...) are not in the causal-LM mapping.
    auto: Any = transformers.AutoModelForCausalLM
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not options["trust_remote_code"]:
        auto = transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(place, dtype=dtype, output_loading_info=True, **placing, **options)
    if missing := sorted(info["missing_keys"]):  # transformers would make them up at random
        raise ValueError(f"{len(missing)} weights of the model are not in its files ({', '.join(missing[:3])} ...)")
    return model


def _configured(place: str) -> str:
    """Return where a model's configuration is: of a LoRA directory, with its base."""
    lora = Path(place) / "adapter_config.json"
    if not os.path.isfile(lora) or (Path(place) / "config.json").is_file():
        return place
    return str(read_json(lora, most=MOST_TEXT)["base_model_name_or_path"])


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the torch dtype for a name; None picks bfloat16 where the hardware multiplies it fast, else float32."""
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
