"""What is going on with a model: which call a pass belongs to, who else runs it, how its modules are set."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from commandv.models.lm import LM

_PATIENCE = 1.0  # seconds that another thread which is about to be done is waited for
_LOCK = threading.Lock()  # over the mode of modules


@contextlib.contextmanager
def own_pass(lm: LM) -> Iterator[None]:
    """Run passes of our own: in eval mode, with the head fed contiguously; what the user set is restored.

    PyTorch multiplies a strided slice of states, as `logits_to_keep` makes them, by a copy of a *frozen* head for each
    sequence: with a large vocabulary gigabytes, and a minute where a tenth of a second would do.
    """
    head = lm.model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(_contiguous)
    try:
        with evaluating(lm.model):
            yield
    finally:
        if handle is not None:
            handle.remove()


def _contiguous(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.contiguous() if isinstance(one, Tensor) else one for one in args)


def compiled(model: Any) -> bool:
    """True for a model that `torch.compile` has changed, in any of the ways that it offers."""
    forward = model.__dict__.get("forward")
    return (
        "_orig_mod" in model.__dict__.get("_modules", ())
        or model.__dict__.get("_compiled_call_impl") is not None
        or (forward is not None and hasattr(forward, "_torchdynamo_orig_callable"))
    )


_evaluating_now: dict[int, tuple[int, list[nn.Module]]] = {}  # id of the model -> passes that run, modules to restore


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode; the last of several threads to leave restores the mode of every module."""
    with _LOCK:
        count, training = _evaluating_now.get(id(model), (0, []))
        if not count:
            training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        _evaluating_now[id(model)] = (count + 1, training)
    try:
        yield
    finally:
        with _LOCK:
            count, training = _evaluating_now.pop(id(model))
            if count > 1:
                _evaluating_now[id(model)] = (count - 1, training)
            else:
                for module in training:
                    module.training = True


# -- what the threads' stacks tell ------------------------------------------------------------------------------------


def containing(model: nn.Module, owner: nn.Module) -> list[nn.Module]:
    """Return the modules from the model down to the one that runs the blocks."""
    path = next(name for name, module in model.named_modules() if module is owner).split(".")
    return [model, *(model.get_submodule(".".join(path[: i + 1])) for i in range(len(path)) if path[0])]


def generating(hosts: list[nn.Module]) -> int | None:
    """Return the prompt's columns of the `generate` that this pass belongs to, None outside one.

    The arguments are read where they are, in the running call: replacing the model's `generate` to see them would
    outlive interrupts, go into copies of the model and miss calls through its class.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and any(frame.f_locals.get("self") is one for one in hosts):
            given = {"inputs": frame.f_locals.get("inputs"), **frame.f_locals.get("kwargs", {})}
            tokens = next(
                (given[k] for k in ("inputs", "input_ids", "inputs_embeds") if given.get(k) is not None), None
            )
            if isinstance(tokens, Tensor):
                return tokens.shape[1]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def others_run(lm: LM) -> bool:
    """True when another thread is in the middle of running the model, and still is after a moment."""
    end = time.monotonic() + _PATIENCE
    hosts = containing(lm.model, lm.owner)
    while threading.active_count() > 1:
        busy = any(
            _runs(frame, hosts) for ident, frame in sys._current_frames().items() if ident != threading.get_ident()
        )
        if not busy or time.monotonic() > end:
            return busy
        time.sleep(0.005)
    return False


def _runs(frame: Any, hosts: list[nn.Module]) -> bool:
    while frame is not None:
        if frame.f_code.co_name in ("generate", "_call_impl") and any(frame.f_locals.get("self") is h for h in hosts):
            return True
        frame = frame.f_back
    return False
