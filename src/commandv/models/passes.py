"""What a forward pass is, and what may change in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from commandv.errors import InputError
from commandv.positions import Positions

# The stream [batch, sequence, d_model], which is the edit's own to change in place, -> what it becomes.
Edit = Callable[[Tensor], Tensor]


def stream_of(output: Any, index: int) -> Tensor:
    """Return the residual stream [batch, sequence, d_model] in what a block puts out; of several streams, one."""
    h = output[0] if isinstance(output, tuple) else output
    return h[index] if h.ndim == 4 else h


def with_stream(output: Any, stream: Tensor, index: int) -> Any:
    """Return what a block puts out with another stream in it."""
    h = output[0] if isinstance(output, tuple) else output
    new = torch.cat([h[:index], stream[None], h[index + 1 :]]) if h.ndim == 4 else stream
    return (new, *output[1:]) if isinstance(output, tuple) else new


class Pass(NamedTuple):
    """One forward pass through the blocks."""

    tokens: Tensor  # token ids [batch, n], or their embeddings [batch, n, d]
    ids: Tensor | None  # token ids [batch, n], None where only embeddings were given
    mask: Any  # the attention mask [batch, columns], None where nothing is padded; another shape hides the padding
    start: int | None  # columns that ran before, from the cache; None where a recurrent state does not tell
    n_prompt: int | None  # columns that are prompt, padding included; None where that is unknown

    def columns(self) -> tuple[int, int]:
        """Return the first column of this pass and one past its last."""
        if self.start is None:
            raise InputError(
                "this model goes on from a recurrent state, which does not tell how many tokens came before, so that "
                "positions are unknown; run it without one (use_cache=False) while something is attached"
            )
        return self.start, self.start + self.tokens.shape[1]

    def prompt(self, n_prompt: int) -> Tensor:
        """Return bool [batch, n_prompt], true at the prompt's real tokens."""
        if self.mask is None:
            return torch.ones((self.tokens.shape[0], n_prompt), dtype=torch.bool, device=self.tokens.device)
        if isinstance(self.mask, Tensor) and self.mask.ndim == 2:
            # Of a prompt fed in chunks, what is still to come is real: padding is at its left.
            mask = self.mask[:, :n_prompt].bool()
            return nn.functional.pad(mask, (0, n_prompt - mask.shape[1]), value=True)
        raise InputError(
            "attach needs the two-dimensional attention mask [batch, sequence]; static caches and prepared "
            "four-dimensional masks hide where the padding is. Use the default dynamic cache"
        )


class Change(Protocol):
    """What an attachment does to a model, pass by pass."""

    @property
    def name(self) -> str:
        """What it is, for people."""

    @property
    def layers(self) -> list[int]:
        """The layers that it may change."""

    @property
    def positions(self) -> set[Positions]:
        """Where it acts."""

    def edits(self, run: Pass) -> Mapping[int, Edit]:
        """Return what changes the output of which layer in this pass."""


class Addend(Protocol):
    """Something that is added to the stream at its positions."""

    @property
    def positions(self) -> Positions:
        """Where it acts."""

    def delta(self, h: Tensor) -> Tensor:
        """Return what is added to `h` [n, d_model], in the same shape and dtype."""


@dataclass(frozen=True, eq=False)
class Additions:
    """Adds deltas to the outputs of layers; those of one layer read the same stream."""

    name: str  # what does it, for people
    addends: Mapping[int, Sequence[Addend]]  # by layer
    scale: float = 1.0  # what their deltas are multiplied by already, for people
    n_prompt: int | None = None  # columns of each batch that hold the prompt, where the pass itself does not tell

    @property
    def layers(self) -> list[int]:
        """The layers that it may change."""
        return sorted(self.addends)

    @functools.cached_property
    def positions(self) -> set[Positions]:
        """Where it acts."""
        return {one.positions for many in self.addends.values() for one in many}

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        at = ", ".join(sorted(map(str, self.positions)))
        return f"{self.name} on layers {layers} at {at}, scale {self.scale:g}"

    def edits(self, run: Pass) -> dict[int, Edit]:
        """Return the layers that are changed in this pass, with what changes them."""
        start, stop = run.columns()
        n_prompt = self.n_prompt if self.n_prompt is not None else run.n_prompt
        if n_prompt is None:
            if not all(one.everywhere for one in self.positions):
                raise InputError(
                    f"{self.name}: nobody knows where the prompt ends when several tokens go on from a cache, or when "
                    "it was filled before attaching; give n_prompt=, or run the prompt in one pass while attached"
                )
            n_prompt = start
        if not any(one.touches(n_prompt, start) for one in self.positions):
            return {}
        prompt = run.prompt(n_prompt)
        places = {one: Places(one.select(prompt, start, stop)) for one in self.positions}
        acting = {
            layer: [(one, places[one.positions]) for one in many if places[one.positions].any]
            for layer, many in self.addends.items()
        }
        return {layer: _adding(many) for layer, many in acting.items() if many}


class Places:
    """Positions in one forward pass as row and column indices, computed once for all layers."""

    def __init__(self, mask: Tensor) -> None:
        self.rows, self.columns = mask.nonzero(as_tuple=True)
        self.any = bool(len(self.rows))
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {mask.device: (self.rows, self.columns)}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the indices on a device."""
        if device not in self._moved:
            self._moved[device] = (self.rows.to(device), self.columns.to(device))
        return self._moved[device]


def _adding(many: Sequence[tuple[Addend, Places]]) -> Edit:
    def edit(h: Tensor) -> Tensor:
        found = [(at := places.on(h.device), one.delta(h[at])) for one, places in many]  # before any is added
        for at, delta in found:
            h.index_put_(at, delta, accumulate=True)
        return h

    return edit
