"""vLLM with adapters attached, another one for each request: a general plug-in, which vLLM loads in every process.

    COMMANDV_VLLM="pirate=DIR,list=builtin:numbered-list@smollm2-135m-instruct" \\
        vllm serve MODEL --enforce-eager --no-enable-prefix-caching

A request says which adapter it wants, `SamplingParams(extra_args={"commandv": "pirate"})`, over HTTP
`"vllm_xargs": {"commandv": "pirate"}`; without, it gets the model as it is. Requests with different adapters share
batches. Prefix caching is refused: a prefix computed under one adapter is wrong under another. So are compiled graphs,
which leave hooks out, and models that are split over several devices.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from commandv.adapters.adapter import Adapter
from commandv.errors import InputError, MismatchError, ModelError
from commandv.interop.load import load_adapter

VARIABLE = "COMMANDV_VLLM"
KEY = "commandv"  # in a request's extra arguments
_MARK = "_commandv"


def register() -> None:
    """Have vLLM attach the adapters that the environment names; without any, change nothing."""
    named = sources(os.environ.get(VARIABLE, ""))
    if not named:
        return
    from vllm import SamplingParams
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if hasattr(GPUModelRunner, _MARK):
        return
    setattr(GPUModelRunner, _MARK, True)
    _before(SamplingParams, "verify", lambda params, *_, **__: _require_known(params, named))
    _before(GPUModelRunner, "execute_model", functools.partial(_before_step, named))


def sources(text: str) -> dict[str, str]:
    """Return name -> source of the adapters in the environment variable's text, `NAME=SOURCE,NAME=SOURCE`."""
    found: dict[str, str] = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, equals, source = part.partition("=")
        if not (equals and name and source) or name in found:
            raise InputError(f"{VARIABLE}: {part!r}: expected NAME=ADAPTER, each name once, separated by commas")
        found[name] = source
    return found


def _before(owner: type, name: str, run: Callable[..., None]) -> None:
    """Run something before each call of a method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *given: Any, **named: Any) -> Any:
        run(self, *given, **named)
        return original(self, *given, **named)

    setattr(owner, name, method)


def _require_known(params: Any, named: Mapping[str, str]) -> None:
    """Raise `InputError`, a ValueError as vLLM expects of a bad request, for an adapter that is not there."""
    asked = (params.extra_args or {}).get(KEY)
    if asked is not None and asked not in named:
        raise InputError(f"{KEY}={asked!r}: no adapter of this name is loaded; there are {', '.join(named)}")


def _before_step(named: Mapping[str, str], runner: Any, scheduled: Any, *_: Any, **__: Any) -> None:
    """Note what this step runs; before the first one, load the adapters and put the hooks on the model."""
    if not hasattr(runner, _MARK + "_state"):
        setattr(runner, _MARK + "_state", Attached(runner, {name: load_adapter(one) for name, one in named.items()}))
    getattr(runner, _MARK + "_state").scheduled = scheduled.num_scheduled_tokens


class Attached:
    """The adapters on one runner's model, and which rows of the step each of them acts on."""

    def __init__(self, runner: Any, adapters: Mapping[str, Adapter]) -> None:
        _require_plain(runner)
        self.runner, self.adapters = runner, adapters
        self.scheduled: Mapping[str, int] = {}
        blocks = blocks_of(runner.get_model(), runner.model_config.hf_text_config.num_hidden_layers)
        width = runner.model_config.hf_text_config.hidden_size
        for name, one in adapters.items():
            if one.d_model != width or one.layers[-1] >= len(blocks):
                raise MismatchError(
                    f"adapter {name}: width {one.d_model}, layers up to {one.layers[-1]}; the model has width {width} "
                    f"and layers 0 .. {len(blocks) - 1}"
                )
        for layer in sorted({layer for one in adapters.values() for layer in one.layers}):
            blocks[layer].register_forward_hook(functools.partial(self._hook, layer))

    def _hook(self, layer: int, _block: nn.Module, _given: Any, output: Any) -> Any:
        """Add to a block's output; vLLM's blocks hand on the stream as two parts, whose sum it is."""
        parts = output if isinstance(output, tuple) else (output,)
        stream = parts[0] if len(parts) < 2 or parts[1] is None else parts[0] + parts[1]
        changed = None
        for name, rows in self._rows().items():
            for edit in self.adapters[name].interventions.get(layer, ()):
                mask = torch.cat([_marked(edit.positions, *place) for place in rows])
                at = torch.cat([torch.arange(*place[0]) for place in rows])[mask].to(stream.device)
                if len(at):
                    changed = parts[0].clone() if changed is None else changed
                    delta = edit.to(stream.device).delta(stream[at].float())
                    changed[at] += delta.to(changed.dtype)
        if changed is None:
            return output
        return (changed, *parts[1:]) if isinstance(output, tuple) else changed

    def _rows(self) -> dict[str, list[tuple[tuple[int, int], int, int]]]:
        """Return adapter -> for each of its requests (rows of the step, first token's place, prompt tokens)."""
        found: dict[str, list[tuple[tuple[int, int], int, int]]] = {}
        batch, row = self.runner.input_batch, 0
        for number, request in enumerate(batch.req_ids):
            count = self.scheduled.get(request, 0)
            asked = (self.runner.requests[request].sampling_params.extra_args or {}).get(KEY)
            if asked is not None and count:
                start = int(batch.num_computed_tokens_cpu[number])
                found.setdefault(asked, []).append(((row, row + count), start, int(batch.num_prompt_tokens[number])))
            row += count
        return found


def _marked(positions: Any, rows: tuple[int, int], start: int, n_prompt: int) -> Tensor:
    """Return for a request's rows in a step whether they are acted on, bool [rows]."""
    return positions.select(torch.ones(1, n_prompt, dtype=torch.bool), start, start + rows[1] - rows[0])[0]


def blocks_of(model: nn.Module, n_layers: int) -> list[nn.Module]:
    """Return the decoder blocks of a model of vLLM."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return list(module)
    raise ModelError(f"{type(model).__name__}: found no list of {n_layers} decoder blocks to attach to")


def _require_plain(runner: Any) -> None:
    config = runner.vllm_config
    split = max(config.parallel_config.tensor_parallel_size, config.parallel_config.pipeline_parallel_size)
    for bad, what in (
        (config.cache_config.enable_prefix_caching, "prefix caching shares what one adapter computed with others: "
         "--no-enable-prefix-caching"),
        (not config.model_config.enforce_eager, "compiled graphs leave hooks out: --enforce-eager"),
        (split > 1, "a model split over devices is not supported: one device"),
        (config.speculative_config is not None, "speculative decoding is not supported: leave it out"),
    ):  # fmt: skip
        if bad:
            raise InputError(f"commandv in vLLM: {what}")
