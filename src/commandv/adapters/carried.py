"""Interventions carried through converters that are not affine, where nothing can be folded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from commandv.adapters.adapter import Intervention
from commandv.adapters.network import Network
from commandv.errors import InputError, MismatchError
from commandv.positions import Positions


class Carried(Intervention):
    """Delta(h) = s · [back(into(h) + Delta_D(into(h))) - back(into(h))]: a difference is carried, not a state.

    Where the donor's intervention changes nothing, exactly nothing is added: both calls of `back` are then the same.
    It is an intervention without matrices of its own; whatever asks for them (exporting, folding once more) is told
    so by an `InputError`.

    Source: converters that are not affine are those of arXiv 2503.04429, which maps states; carrying the difference
    is ours, and what folding does where they are affine.

    Attributes:
        inner: the donor's intervention, [rank, d_donor].
        into: recipient -> donor.
        back: donor -> recipient.
        scale: s.
    """

    inner: Intervention
    into: Network
    back: Network
    scale: float

    def __init__(self, inner: Intervention, into: Network, back: Network, scale: float = 1.0) -> None:
        if isinstance(inner, Carried):
            raise InputError("an intervention that is carried already; carry the donor's own adapter instead")
        widths = (into.d_x, into.d_y, back.d_x, back.d_y)
        if widths != (into.d_x, inner.d_model, inner.d_model, into.d_x):
            raise MismatchError(
                f"an intervention of width {inner.d_model} between converters {widths[0]} -> {widths[1]} and "
                f"{widths[2]} -> {widths[3]}; they belong to another pair of models"
            )
        if not torch.isfinite(torch.tensor(scale)):
            raise InputError(f"scale={scale}: expected a finite number")
        inner = replace(inner, read=inner.read.float(), bias=inner.bias.float(), write=inner.write.float())
        for name, value in {"inner": inner, "into": into, "back": back, "scale": float(scale)}.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        how = f"{self.into.activation}, {len(self.into.shift)} and {len(self.back.shift)} hidden units"
        return f"Carried(rank {self.rank}, {self.inner.d_model} -> {self.d_model} by {how}, scale {self.scale:g})"

    @property
    def activation(self) -> str:
        """The inner intervention's."""
        return self.inner.activation

    @property
    def positions(self) -> Positions:
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
    def n_parameters(self) -> int:
        """Numbers it holds, both converters included."""
        maps = [value for one in (self.into, self.back) for value in one.tensors().values()]
        return self.inner.n_parameters + sum(value.numel() for value in maps)

    @property
    def write_norm(self) -> float:
        """Norm of what is written, in the donor, times the scale."""
        return abs(self.scale) * self.inner.write_norm

    def delta(self, h: Tensor) -> Tensor:
        """Return what is added to `h` [..., d_model], in the same shape; computed in float32."""
        seen = self.into(h.float())
        return (self.scale * (self.back(seen + self.inner.delta(seen)) - self.back(seen))).to(h.dtype)

    def scaled(self, scale: float) -> Carried:
        """Return it with its delta multiplied."""
        return Carried(self.inner, self.into, self.back, scale * self.scale)

    def at(self, positions: Positions) -> Carried:
        """Return it acting elsewhere."""
        return Carried(self.inner.at(positions), self.into, self.back, self.scale)

    @property
    def writes(self) -> Tensor:
        """Rows [k, d_model] in whose span all its deltas lie."""
        return self.back.writes

    def turned(self, turn: Callable[[Tensor], Tensor]) -> Carried:
        """Return it with its delta turned, Delta(h) Q, for `turn`: rows [k, d_model] -> rows Q."""
        return Carried(self.inner, self.into, self.back.turned(turn), self.scale)

    def to(self, device: torch.device) -> Carried:
        """Return it on another device."""
        parts = {name: getattr(self.inner, name).to(device) for name in ("read", "bias", "write")}
        return Carried(replace(self.inner, **parts), self.into.to(device), self.back.to(device), self.scale)

    def _no_matrices(self) -> NoReturn:
        raise InputError(
            "an intervention that goes through converters which are not affine has no read, bias and write of its "
            "own: it can be attached, scaled and saved in our format; paste with an affine fitter for anything else"
        )

    read = property(_no_matrices)
    bias = property(_no_matrices)
    write = property(_no_matrices)


def low_rank(one: Intervention, what: str) -> Intervention:
    """Return an intervention that has read, bias and write of its own.

    Args:
        one: any.
        what: what needs them, for the message.

    Raises:
        InputError: it goes through converters that are not affine.
    """
    if isinstance(one, Carried):
        raise InputError(
            f"{what} needs read, bias and write, which an intervention that goes through converters that are not "
            "affine has none of: it can be attached, scaled and saved in our format; use an affine fitter"
        )
    return one
