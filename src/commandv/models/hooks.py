"""Our hooks on a model, which are the only place where it is kept what lives on it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Hook:
    """One of our hooks. A copy of the model, or a pickle, gets one that does nothing: nothing is attached to it."""

    def __init__(self, live: Any, run: Callable[..., Any]) -> None:
        self.live, self._run = live, run

    def __call__(self, *args: Any) -> Any:
        """Do what the hook is for."""
        return self._run(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


def live_on(owner: nn.Module) -> Any:
    """Return the `commandv.models.live.Live` whose hooks are on the module that runs a model's blocks, or None."""
    return next((hook.live for hook in owner._forward_pre_hooks.values() if isinstance(hook, Hook)), None)


def attachments(owner: nn.Module) -> tuple[Any, ...]:
    """Return what is attached to the model, in the order in which it acts."""
    live = live_on(owner)
    return live.attachments if live else ()


def is_held(h: Tensor, output: Any) -> bool:
    """Tell, in a function that a `Hook` runs, whether others keep a block's output, or a view of the stream `h` in it.

    Where this PyTorch does not tell how many tensors share a memory, it counts as held.
    """
    return _USES is None or _holders(h, output) != _unheld(isinstance(output, tuple))


# No public name tells; PyTorch's own CUDA graphs ask the same.
_USES: Callable[[Any], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def _holders(h: Tensor, _output: Any) -> tuple[int, int]:
    """Return how often a block's output is referred to, and its memory by other tensors."""
    assert _USES is not None
    return sys.getrefcount(h), _USES(h.untyped_storage()._cdata)


@functools.cache
def _unheld(as_tuple: bool) -> tuple[int, int]:
    """Return what `_holders` says of an output that nobody has but PyTorch's call of the block and the hook itself."""
    found: list[tuple[int, int]] = []

    def hook(_block: nn.Module, _inputs: Any, output: Any) -> None:
        h = output[0] if as_tuple else output
        found.append(asked(h, output))

    def asked(h: Tensor, output: Any) -> tuple[int, int]:  # as far from the hook as in `is_held`
        return _holders(h, output)

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x + 1,) if as_tuple else x + 1

    block = Block()
    block.register_forward_hook(Hook(None, hook))
    block(torch.zeros(1, 1, 1))
    return found[0]


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None: ...
