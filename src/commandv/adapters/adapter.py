"""Adapters: edits of the residual stream by layer, and the form that nearly all of them have.

An intervention is Delta(h) = act(h Rᵀ + b) W with read R [rank, d_model], bias b [rank], write W [rank, d_model].
What constructs them is in `commandv.adapters.kinds`; carrying one through affine converters gives the same form again
(`commandv.transfer.fold`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from commandv.adapters.edit import Edit, Spec, require_numbers
from commandv.adapters.outline import MOST_LAYERS, require_scale
from commandv.arguments import checked
from commandv.errors import InputError, require_known
from commandv.models.identity import ModelRef
from commandv.positions import LAST, Positions

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


@checked
@dataclass(frozen=True, eq=False)
class Intervention(Edit):
    """Delta(h) = act(h Rᵀ + b) W, added to the residual stream at some positions.

    Attributes:
        read: R, [rank, d_model].
        bias: b, [rank].
        write: W, [rank, d_model].
        activation: a name in `ACTIVATIONS`.
        positions: where it acts.
    """

    kind: ClassVar[str] = "affine"
    read: Tensor
    bias: Tensor
    write: Tensor
    activation: str = "linear"
    positions: Positions = LAST

    def __post_init__(self) -> None:
        require_known("activation", self.activation, ACTIVATIONS)
        shapes = (tuple(self.read.shape), tuple(self.bias.shape), tuple(self.write.shape))
        if self.read.ndim != 2 or shapes != ((rank := len(self.bias), self.d_model), (rank,), (rank, self.d_model)):
            raise InputError(
                f"intervention of shapes read {shapes[0]}, bias {shapes[1]}, write {shapes[2]}; "
                "expected [rank, d_model], [rank], [rank, d_model]"
            )
        for name in ("read", "bias", "write"):
            require_numbers(getattr(self, name), f"intervention: {name}")

    @property
    def rank(self) -> int:
        """Number of directions read and written."""
        return self.read.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.read.shape[-1]

    @property
    def write_norm(self) -> float:
        """Norm of W."""
        return float(self.write.norm())

    @property
    def writes(self) -> Tensor:
        """W."""
        return self.write

    def delta(self, h: Tensor) -> Tensor:
        """Return what is added to `h` [..., d_model], in the same shape."""
        return ACTIVATIONS[self.activation](torch.nn.functional.linear(h, self.read, self.bias)) @ self.write

    def scaled(self, scale: float) -> Intervention:
        """Return it with its delta multiplied."""
        return replace(self, write=self.write * scale)

    def at(self, positions: Positions) -> Intervention:
        """Return it acting elsewhere."""
        return replace(self, positions=positions)

    def turned(self, turn: Callable[[Tensor], Tensor]) -> Intervention:
        """Return it with its delta turned, Delta(h) Q, for `turn`: rows [k, d_model] -> rows Q."""
        return replace(self, write=turn(self.write))

    def to(self, device: torch.device) -> Intervention:
        """Return it on another device."""
        return replace(self, read=self.read.to(device), bias=self.bias.to(device), write=self.write.to(device))

    @property
    def group(self) -> Hashable:
        """Positions and activation: what agrees in them stacks."""
        return self.kind, self.positions, self.activation

    def joined(self, others: Sequence[Intervention]) -> Intervention:
        """Return one intervention, float32, that adds what this one and others of its group add."""
        many = (self, *others)
        read, bias, write = (
            torch.cat(parts).float() for parts in zip(*(one.tensors().values() for one in many), strict=True)
        )
        return replace(self, read=read, bias=bias, write=write)

    def tensors(self) -> dict[str, Tensor]:
        """Return R, b and W by name."""
        return {"read": self.read, "bias": self.bias, "write": self.write}

    @classmethod
    def shapes(cls, spec: Spec, d_model: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that belong to a spec, by name."""
        return {"read": (spec.rank, d_model), "bias": (spec.rank,), "write": (spec.rank, d_model)}

    @classmethod
    def from_tensors(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Intervention:
        """Return the intervention that a spec and its tensors describe; see `Edit`."""
        own = {name: tensors[name] for name in ("read", "bias", "write")}
        return cls(**own, activation=spec.activation, positions=Positions.parse(spec.positions))


def low_rank(one: Edit, what: str) -> Intervention:
    """Return an edit as one that has read, bias and write of its own; `what` needs them, for the message."""
    if not isinstance(one, Intervention):
        raise InputError(
            f"{what} needs read, bias and write, which an intervention that goes through converters that are not "
            "affine has none of: it can be attached, scaled and saved in our format; use an affine fitter"
        )
    return one


@checked
@dataclass(frozen=True, eq=False)
class Adapter:
    """Interventions by layer, and where they come from.

    Attributes:
        interventions: layer (0-based, its *output* is changed) -> interventions that all read the same stream and
            whose deltas add up.
        model: the model it is for.
        name: what it does, for people.
        provenance: JSON-able facts about how it was made.
    """

    interventions: Mapping[int, tuple[Edit, ...]]
    model: ModelRef
    name: str = "adapter"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widths = {one.d_model for many in self.interventions.values() for one in many}
        if not widths:
            raise InputError(f"{self.name}: an adapter without interventions")
        if len(widths) > 1 or (self.model.d_model and widths != {self.model.d_model}):
            raise InputError(f"{self.name}: interventions of width {sorted(widths)} for d_model {self.model.d_model}")
        for layer in self.interventions:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise InputError(f"{self.name}: layer {layer!r}, expected a whole number")
            if not 0 <= layer <= MOST_LAYERS or (self.model.n_layers and layer >= self.model.n_layers):
                known = f"0 .. {self.model.n_layers - 1}" if self.model.n_layers else "0 and up"
                raise InputError(f"{self.name}: layer {layer} is outside {known}")

    @property
    def layers(self) -> list[int]:
        """The layers it acts on, ascending."""
        return sorted(self.interventions)

    @property
    def d_model(self) -> int:
        """Width of the residual stream it is for."""
        return next(iter(self.interventions.values()))[0].d_model

    @property
    def prefill_only(self) -> bool:
        """True when it never acts on a generated token."""
        return all(one.prefill_only for one in self.positions)

    @property
    def positions(self) -> set[Positions]:
        """Where it acts."""
        return {one.positions for many in self.interventions.values() for one in many}

    @property
    def n_parameters(self) -> int:
        """Numbers it holds."""
        return sum(one.n_parameters for many in self.interventions.values() for one in many)

    def map(self, change: Callable[[Edit], Edit], **fields: Any) -> Adapter:
        """Return an adapter with every intervention changed, and other fields replaced."""
        changed = {layer: tuple(change(one) for one in many) for layer, many in self.interventions.items()}
        return replace(self, interventions=changed, **fields)

    def scaled(self, scale: float) -> Adapter:
        """Return the adapter with its deltas multiplied by `scale`.

        Raises:
            InputError: not a finite number, or one that makes the deltas overflow.
        """
        require_scale(scale)
        return self.map(lambda one: one.scaled(scale))

    def at(self, positions: Positions) -> Adapter:
        """Return the adapter acting at other positions."""
        return self.map(lambda one: one.at(positions))

    def on_layers(self, layers: Mapping[int, Any] | list[int] | range) -> Adapter:
        """Return the part of the adapter that acts on some layers.

        Raises:
            InputError: none of them is among the adapter's layers.
        """
        kept = {layer: many for layer, many in self.interventions.items() if layer in layers}
        if not kept:
            raise InputError(f"{self.name}: acts on layers {self.layers}, none of them among {list(layers)}")
        return replace(self, interventions=kept)
