"""Our hooks on a model, which are the only place where it is kept what lives on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


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


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None: ...
