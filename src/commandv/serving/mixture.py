"""Behaviours of each row of a batch, in one pass.

Of one layer, the interventions Delta_i(h) = act(h R_iᵀ + b_i) W_i of all adapters in use are stacked into one, and a
matrix of factors says which of them acts where: Delta(h) = (act(h Rᵀ + b) * F) W, with F [places, sum of ranks] holding
the row's scale where its behaviour has the adapter and the adapter acts at this token, else 0. A mixture of behaviours
thus costs about what one behaviour costs, and a scale of its own for each request costs nothing.

A behaviour's second adapter reads a stream that its first has changed, as with two calls of `attach`: the first ones of
all rows act, then the second ones.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from commandv.adapters.adapter import ACTIVATIONS, Adapter, Intervention
from commandv.adapters.edit import Edit as Acting
from commandv.models.passes import Edit, Pass, Places
from commandv.positions import Positions
from commandv.serving.behaviours import Behaviour

_KEPT = 32  # stacks for so many sets of adapters


class _Member(NamedTuple):
    """Where the columns of a stack come from."""

    adapter: str
    positions: Positions
    rank: int


@dataclass(eq=False)
class _Stack:
    """Interventions of one layer and activation, one under the other; or one that cannot be stacked."""

    members: tuple[_Member, ...]
    edit: Acting

    def delta(self, h: Tensor, factors: Tensor) -> Tensor:
        """Return what is added to `h` [n, d_model], float32; `factors` is [n, members]."""
        if self.edit.device != h.device:
            self.edit = self.edit.to(h.device)
        if not isinstance(self.edit, Intervention):
            return self.edit.delta(h) * factors
        one = self.edit
        columns = factors.repeat_interleave(torch.tensor([m.rank for m in self.members], device=h.device), 1)
        hidden = ACTIVATIONS[one.activation](torch.nn.functional.linear(h, one.read, one.bias))
        return torch.where(columns != 0, hidden * columns, 0) @ one.write


class Row(NamedTuple):
    """What a pass must know of a row: its behaviour, and how many of its generated tokens ran before this pass."""

    behaviour: Behaviour
    generated: int


@dataclass(eq=False)
class Mixture:
    """The change that an engine attaches to its model, once; `prepare` says what the next pass is."""

    adapters: Mapping[str, Adapter]  # by name
    _plan: Mapping[int, Edit] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._stacks = functools.lru_cache(_KEPT)(self._stacked)

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"behaviours {', '.join(self.adapters) or 'none'} by request"

    @property
    def layers(self) -> list[int]:
        """The layers that it may change."""
        return sorted({layer for one in self.adapters.values() for layer in one.layers})

    @property
    def positions(self) -> set[Positions]:
        """Where it acts."""
        return set().union(*(one.positions for one in self.adapters.values()))

    def __str__(self) -> str:
        return self.name

    def edits(self, run: Pass) -> Mapping[int, Edit]:
        """Return what changes the output of which layer in the pass that was prepared."""
        return self._plan

    def prepare(self, rows: Sequence[Row], mask: Tensor | None = None) -> None:
        """Plan the next pass.

        Args:
            rows: the rows of the batch.
            mask: [batch, columns], 1 at real tokens, of a pass over whole prompts; None for one generated token a row.
        """
        depth = max((len(row.behaviour) for row in rows), default=0)
        rounds = [one for one in (self._round(rows, mask, i) for i in range(depth)) if one]
        layers = {layer for one in rounds for layer in one}
        self._plan = {layer: _in_turn([one[layer] for one in rounds if layer in one]) for layer in layers}

    def _round(self, rows: Sequence[Row], mask: Tensor | None, i: int) -> dict[int, Edit]:
        """Return what the rows' adapters number `i` change in a pass."""
        chosen = [row.behaviour[i] if i < len(row.behaviour) else None for row in rows]
        names = sorted({one.adapter for one in chosen if one})
        scales = {
            name: torch.tensor([one.scale if one and one.adapter == name else 0.0 for one in chosen]) for name in names
        }
        acting = {one: _selected(one, rows, mask) for name in names for one in self.adapters[name].positions}
        names = [name for name in names if any(acting[one].any() for one in self.adapters[name].positions)]
        if not names:
            return {}
        shared: dict[Hashable, tuple[Places, Tensor] | None] = {}  # most layers have the same members
        edits = {}
        for layer, stacks in self._stacks(tuple(names)).items():
            ready = []
            for stack in stacks:
                if stack.members not in shared:
                    shared[stack.members] = _factors(stack.members, scales, acting)
                if (found := shared[stack.members]) is not None:
                    ready.append((stack, *found))
            if ready:
                edits[layer] = _adding(ready)
        return edits

    def _stacked(self, names: tuple[str, ...]) -> dict[int, list[_Stack]]:
        groups: defaultdict[int, defaultdict[Hashable, list[tuple[str, Acting]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for name in names:
            for layer, many in self.adapters[name].interventions.items():
                for one in many:
                    alike = one.activation if isinstance(one, Intervention) else one
                    groups[layer][alike].append((name, one))
        return {
            layer: [_stack(members) for members in alike.values()]
            for layer, alike in sorted(groups.items(), key=lambda item: item[0])
        }


def _stack(many: Sequence[tuple[str, Acting]]) -> _Stack:
    members = tuple(_Member(name, one.positions, one.rank) for name, one in many)
    first, *others = (one for _, one in many)
    return _Stack(members, first.joined(others))


def _selected(positions: Positions, rows: Sequence[Row], mask: Tensor | None) -> Tensor:
    """Return bool [batch, columns of the pass], true where an adapter of these positions would act."""
    if mask is None:
        return torch.tensor([[positions.touches(0, row.generated)] for row in rows])
    return positions.select(mask.bool().cpu(), 0, mask.shape[1])


def _factors(
    members: Sequence[_Member], scales: Mapping[str, Tensor], acting: Mapping[Positions, Tensor]
) -> tuple[Places, Tensor] | None:
    """Return the tokens at which any of a stack's members acts, and its factor there, [tokens, members]."""
    factors = torch.stack([scales[one.adapter][:, None] * acting[one.positions] for one in members], -1)
    places = Places((factors != 0).any(-1))
    return (places, factors[places.rows, places.columns]) if places.any else None


def _adding(ready: Sequence[tuple[_Stack, Places, Tensor]]) -> Edit:
    def edit(h: Tensor) -> Tensor:
        found = []
        for stack, places, factors in ready:  # all read the same stream
            at = places.on(h.device)
            found.append((at, stack.delta(h[at].float(), factors.to(h.device)).to(h.dtype)))
        for at, delta in found:
            h.index_put_(at, delta, accumulate=True)
        return h

    return edit


def _in_turn(edits: Sequence[Edit]) -> Edit:
    def edit(h: Tensor) -> Tensor:
        for one in edits:
            h = one(h)
        return h

    return edit
