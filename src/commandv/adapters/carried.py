"""Interventions carried through converters that are not affine, where nothing can be folded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor

from commandv.adapters.adapter import Intervention
from commandv.adapters.edit import Edit, Spec
from commandv.adapters.network import Network, shapes
from commandv.adapters.outline import require_scale
from commandv.arguments import checked
from commandv.errors import MismatchError
from commandv.positions import Positions


class _NetworkSpec(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    activation: str
    hidden: int
    linear: bool

    @classmethod
    def of(cls, net: Network) -> _NetworkSpec:
        return cls(activation=net.activation, hidden=len(net.shift), linear=net.linear is not None)


class _Through(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    d_donor: int
    into: _NetworkSpec
    back: _NetworkSpec
    scale: float


class CarriedSpec(Spec):
    """The spec of what is carried, and what it is carried through."""

    carried: _Through


@checked
@dataclass(frozen=True, eq=False)
class Carried(Edit):
    """Delta(h) = s · [back(into(h) + Delta_D(into(h))) - back(into(h))]: a difference is carried, not a state.

    Where the donor's intervention changes nothing, exactly nothing is added: both calls of `back` are then the same.
    It has no matrices of its own; whatever needs them (exporting, folding once more) says so.

    Source: converters that are not affine are those of arXiv 2503.04429, which maps states; carrying the difference
    is ours, and what folding does where they are affine.

    Attributes:
        inner: the donor's intervention, [rank, d_donor].
        into: recipient -> donor.
        back: donor -> recipient.
        scale: s.
    """

    kind: ClassVar[str] = "carried"
    spec_type: ClassVar[type[Spec]] = CarriedSpec
    inner: Intervention
    into: Network
    back: Network
    scale: float = 1.0

    def __post_init__(self) -> None:
        into, back, inner = self.into, self.back, self.inner
        if (into.d_x, into.d_y, back.d_x, back.d_y) != (into.d_x, inner.d_model, inner.d_model, into.d_x):
            raise MismatchError(
                f"an intervention of width {inner.d_model} between converters {into.d_x} -> {into.d_y} and "
                f"{back.d_x} -> {back.d_y}; they belong to another pair of models"
            )
        require_scale(self.scale)
        plain = replace(inner, read=inner.read.float(), bias=inner.bias.float(), write=inner.write.float())
        object.__setattr__(self, "inner", plain)

    def __repr__(self) -> str:
        how = f"{self.into.activation}, {len(self.into.shift)} and {len(self.back.shift)} hidden units"
        return f"Carried(rank {self.rank}, {self.inner.d_model} -> {self.d_model} by {how}, scale {self.scale:g})"

    @property
    def activation(self) -> str:  # type: ignore[override]
        """The inner intervention's."""
        return self.inner.activation

    @property
    def positions(self) -> Positions:  # type: ignore[override]
        """The inner intervention's."""
        return self.inner.positions

    @property
    def rank(self) -> int:
        """Directions that the inner intervention reads and writes, in the donor."""
        return self.inner.rank

    @property
    def d_model(self) -> int:
        """Width of the recipient's residual stream."""
        return self.into.d_x

    @property
    def write_norm(self) -> float:
        """Norm of what is written, in the donor, times the scale."""
        return abs(self.scale) * self.inner.write_norm

    @property
    def writes(self) -> Tensor:
        """Rows [k, d_model] in whose span all its deltas lie."""
        return self.back.writes

    def delta(self, h: Tensor) -> Tensor:
        """Return what is added to `h` [..., d_model], in the same shape; computed in float32."""
        seen = self.into(h.float())
        return (self.scale * (self.back(seen + self.inner.delta(seen)) - self.back(seen))).to(h.dtype)

    def scaled(self, scale: float) -> Carried:
        """Return it with its delta multiplied."""
        return replace(self, scale=float(scale * self.scale))

    def at(self, positions: Positions) -> Carried:
        """Return it acting elsewhere."""
        return replace(self, inner=self.inner.at(positions))

    def turned(self, turn: Callable[[Tensor], Tensor]) -> Carried:
        """Return it with its delta turned, Delta(h) Q, for `turn`: rows [k, d_model] -> rows Q."""
        return replace(self, back=self.back.turned(turn))

    def to(self, device: torch.device) -> Carried:
        """Return it on another device."""
        return replace(self, inner=self.inner.to(device), into=self.into.to(device), back=self.back.to(device))

    @property
    def group(self) -> Hashable:
        """Itself: it cannot be stacked."""
        return self

    def joined(self, others: Sequence[Carried]) -> Carried:
        """Return itself; there are no others of its group."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the inner intervention's tensors, and those of both converters, by name."""
        sides = {"into": self.into, "back": self.back}
        maps = {f"{side}.{part}": value for side, net in sides.items() for part, value in net.tensors().items()}
        return {**self.inner.tensors(), **maps}

    def facts(self) -> dict[str, Any]:
        """Return what it is, for people."""
        return {**super().facts(), "through": repr(self)}

    def spec(self, layer: int) -> CarriedSpec:
        """Return what a file says of it, acting on a layer."""
        into, back = _NetworkSpec.of(self.into), _NetworkSpec.of(self.back)
        through = _Through(d_donor=self.inner.d_model, into=into, back=back, scale=self.scale)
        return CarriedSpec(**dict(super().spec(layer)), carried=through)

    @classmethod
    def shapes(cls, spec: CarriedSpec, d_model: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that belong to a spec, by name."""
        d_donor, into, back = spec.carried.d_donor, spec.carried.into, spec.carried.back
        of_into = shapes(d_model, d_donor, into.hidden, into.linear)
        of_back = shapes(d_donor, d_model, back.hidden, back.linear)
        return {
            **Intervention.shapes(spec, d_donor),
            **{f"into.{part}": shape for part, shape in of_into.items()},
            **{f"back.{part}": shape for part, shape in of_back.items()},
        }

    @classmethod
    def from_tensors(cls, spec: CarriedSpec, tensors: Mapping[str, Tensor]) -> Carried:
        """Return the edit that a spec and its tensors describe; see `Edit`."""

        def network(side: str, net: _NetworkSpec) -> Network:
            start = f"{side}."
            own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
            return Network.from_tensors(own, net.activation)

        into, back = network("into", spec.carried.into), network("back", spec.carried.back)
        return cls(Intervention.from_tensors(spec, tensors), into, back, spec.carried.scale)
