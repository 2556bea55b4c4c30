"""What every edit of a residual stream answers, whatever it is made of."""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor

from commandv.adapters.outline import LARGEST
from commandv.errors import InputError
from commandv.positions import Positions


def require_numbers(tensor: Tensor, what: str) -> None:
    """Raise `InputError` unless a tensor holds floating-point numbers of at most `LARGEST` in size."""
    if not tensor.is_floating_point():
        raise InputError(f"{what} holds {tensor.dtype}, expected floating-point numbers")
    if tensor.layout != torch.strided:
        raise InputError(f"{what} is {tensor.layout}, expected plain numbers; give it .to_dense()")
    if tensor.numel() and not float(tensor.detach().abs().amax()) <= LARGEST:  # NaN is not, either
        raise InputError(
            f"{what} holds NaN or infinity, or numbers beyond {LARGEST:.0e}; the file, its training or its scale is "
            "broken"
        )


def require_shapes(what: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InputError` unless tensors have the shapes that are expected, and hold numbers."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise InputError(f"{what}: {name} is of shape {tuple(tensor.shape)}, expected {expected[name]}")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{what}: {name} holds NaN or infinity; the file or its training is broken")


class Spec(pydantic.BaseModel):
    """What a file says of an edit beside its tensors; a kind that needs more has a model of its own."""

    model_config = pydantic.ConfigDict(extra="forbid")
    layer: int
    kind: str
    rank: int
    activation: str
    positions: str


class Edit(abc.ABC):
    """Delta(h), added to the residual stream at some positions.

    The kinds are final: `Intervention`, which is low-rank, and `Carried`, which goes through converters that are not
    affine. Attaching, scaling, saving and measuring ask what follows, and do not ask what kind it is.
    """

    kind: ClassVar[str]  # its name in files
    spec_type: ClassVar[type[Spec]] = Spec
    positions: Positions
    activation: str

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """Number of directions read and written."""

    @property
    @abc.abstractmethod
    def d_model(self) -> int:
        """Width of the residual stream."""

    @property
    @abc.abstractmethod
    def write_norm(self) -> float:
        """Norm of what is written."""

    @property
    @abc.abstractmethod
    def writes(self) -> Tensor:
        """Rows [k, d_model] in whose span all its deltas lie."""

    @abc.abstractmethod
    def delta(self, h: Tensor) -> Tensor:
        """Return what is added to `h` [..., d_model], in the same shape."""

    @abc.abstractmethod
    def scaled(self, scale: float) -> Edit:
        """Return it with its delta multiplied."""

    @abc.abstractmethod
    def at(self, positions: Positions) -> Edit:
        """Return it acting elsewhere."""

    @abc.abstractmethod
    def turned(self, turn: Callable[[Tensor], Tensor]) -> Edit:
        """Return it with its delta turned, Delta(h) Q, for `turn`: rows [k, d_model] -> rows Q."""

    @abc.abstractmethod
    def to(self, device: torch.device) -> Edit:
        """Return it on another device."""

    @property
    @abc.abstractmethod
    def group(self) -> Hashable:
        """What it shares with the edits of a layer that can be `joined` with it into one."""

    @abc.abstractmethod
    def joined(self, others: Sequence[Any]) -> Edit:
        """Return one edit that adds what this one and others of its group add."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return everything it is made of, by name."""

    @property
    def n_parameters(self) -> int:
        """Numbers it holds."""
        return sum(value.numel() for value in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(iter(self.tensors().values())).device

    def facts(self) -> dict[str, Any]:
        """Return what it is, for people."""
        return {
            "rank": self.rank,
            "activation": self.activation,
            "positions": str(self.positions),
            "write_norm": round(self.write_norm, 4),
        }

    def spec(self, layer: int) -> Spec:
        """Return what a file says of it, acting on a layer."""
        return Spec(
            layer=layer, kind=self.kind, rank=self.rank, activation=self.activation, positions=str(self.positions)
        )

    @classmethod
    @abc.abstractmethod
    def shapes(cls, spec: Any, d_model: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that belong to a spec, by name, for a stream of width `d_model`."""

    @classmethod
    @abc.abstractmethod
    def from_tensors(cls, spec: Any, tensors: Mapping[str, Tensor]) -> Edit:
        """Return the edit that a spec and its tensors describe.

        Raises:
            InputError: values that are not finite, or an unknown activation or position.
        """
