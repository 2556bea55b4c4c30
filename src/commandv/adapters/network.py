"""Converters that are not affine: a linear part and one hidden layer, small enough to run when the model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from commandv.adapters.edit import require_shapes
from commandv.arguments import checked
from commandv.errors import require_known

HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {"cos": torch.cos, "relu": torch.relu}


@checked
@dataclass(frozen=True, eq=False)
class Network:
    """y = (x - m) L + act((x - m) E + e) O + o, from one residual stream (x, width d_x) to another (y, width d_y).

    It answers what a `commandv.transfer.convert.linear.Converter` is asked; nothing folds through it, so an
    intervention is carried by wrapping it (`commandv.adapters.carried`). Everything is float32, and so is the
    arithmetic. Without hidden units it is an affine map, as which it stands in for one beside another that is not.

    Attributes:
        mean: m, [d_x]; taken off first, so that streams far from zero do not cost digits.
        encode: E, [d_x, hidden].
        shift: e, [hidden].
        decode: O, [hidden, d_y].
        bias: o, [d_y].
        linear: L, [d_x, d_y], or None.
        activation: a name in `HIDDEN`.
        facts: what the fit chose, JSON-able.
    """

    mean: Tensor
    encode: Tensor
    shift: Tensor
    decode: Tensor
    bias: Tensor
    linear: Tensor | None = None
    activation: str = "relu"
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_known("activation of a converter", self.activation, HIDDEN)
        expected = shapes(self.d_x, self.d_y, len(self.shift), self.linear is not None)
        require_shapes("converter", self.tensors(), expected)

    @property
    def d_x(self) -> int:
        """Width of what it reads."""
        return len(self.mean)

    @property
    def d_y(self) -> int:
        """Width of what it gives."""
        return len(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Return y [..., d_y] for x [..., d_x], in the dtype of x."""
        centred = x.float() - self.mean
        y = HIDDEN[self.activation](centred @ self.encode + self.shift) @ self.decode + self.bias
        return (y if self.linear is None else y + centred @ self.linear).to(x.dtype)

    def pull(self, read: Tensor) -> None:
        """Return None: no rows of x read what `read` reads of y."""

    def push(self, write: Tensor) -> None:
        """Return None: what a difference of x becomes depends on the state."""

    def steps(self, write: Tensor, states: Tensor) -> Tensor:
        """Return the mean over states x [n, d_x] of y(x + w) - y(x), for each row w of `write` [k, d_x]; [k, d_y]."""
        before = self(states)
        return torch.stack([(self(states + step) - before).mean(0) for step in write])

    def network(self) -> Network:
        """Return itself."""
        return self

    def dense(self) -> Network:
        """Return itself: nothing is gained by forming a matrix."""
        return self

    @property
    def writes(self) -> Tensor:
        """Rows [k, d_y] in whose span all differences of y lie."""
        return self.decode if self.linear is None else torch.cat([self.decode, self.linear])

    def turned(self, turn: Callable[[Tensor], Tensor]) -> Network:
        """Return x -> y Q for `turn`, rows [k, d_y] -> rows Q."""
        linear = None if self.linear is None else turn(self.linear)
        return replace(self, decode=turn(self.decode), bias=turn(self.bias[None])[0], linear=linear)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything it is made of, by name."""
        parts = {name: getattr(self, name) for name in ("mean", "encode", "shift", "decode", "bias")}
        return parts if self.linear is None else {**parts, "linear": self.linear}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], activation: str) -> Network:
        """Return the network made of `tensors`, as `tensors()` gives them.

        Raises:
            InputError: shapes that do not belong together, values that are not finite, an unknown activation.
        """
        given: dict[str, Any] = dict(tensors)
        return cls(**given, activation=activation)

    def to(self, device: torch.device) -> Network:
        """Return it on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)


def shapes(d_x: int, d_y: int, hidden: int, linear: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's tensors by name."""
    out: dict[str, tuple[int, ...]] = {
        "mean": (d_x,),
        "encode": (d_x, hidden),
        "shift": (hidden,),
        "decode": (hidden, d_y),
        "bias": (d_y,),
    }
    return {**out, "linear": (d_x, d_y)} if linear else out
