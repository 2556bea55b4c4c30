"""Affine converters between two residual streams, y = x A + a, applied to adapters by folding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from commandv.transfer.convert.factor import Solver
from commandv.transfer.convert.rows import Rows


class Converter(Protocol):
    """y = x A + a from one residual stream (x, width d_x) to another (y, width d_y).

    A fitter may also give a `Network`, which is not `affine` and can only be called.
    """

    affine: ClassVar[bool]

    @property
    def facts(self) -> dict[str, Any]:
        """What the fit chose, JSON-able."""

    def pull(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return (read Aᵀ [rank, d_x], read a [rank]): what reads y from x, for `read` [rank, d_y]."""

    def push(self, write: Tensor) -> Tensor:
        """Return write A [rank, d_y] for differences `write` [rank, d_x]; a difference takes no bias."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x A + a [..., d_y] for x [..., d_x]."""


class _Affine:
    """What every affine converter can do once it can pull and push."""

    affine: ClassVar[bool] = True

    def pull(self, read: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def matrix(self, d_y: int) -> tuple[Tensor, Tensor]:
        """Return A [d_x, d_y] and a [d_y], materialised; for tests and diagnostics, pasting never needs it."""
        pulled, shift = self.pull(torch.eye(d_y, dtype=torch.float64))
        return pulled.T, shift


@dataclass(frozen=True, eq=False)
class Solved(_Affine):
    """A converter kept as a solver over its fitting rows: A = X⁺ Y, never formed.

    Attributes:
        solver: applies X⁺.
        x: the predictors, as fitted (centred, scaled).
        y: the targets, centred but not scaled.
        project: optional [d_y, k] pair (V, Vᵀ-side inverse) that restricts the output to a subspace.
        facts: what the fit chose, JSON-able.
    """

    solver: Solver
    x: Rows
    y: Rows
    project: tuple[np.ndarray, np.ndarray] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def pull(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return (read Aᵀ [rank, d_x], read a [rank])."""
        r = read.double().numpy()
        projected = r if self.project is None else (r @ self.project[1]) @ self.project[0].T
        targets = self.y.times(np.ascontiguousarray(projected.T))
        coefficients = self.solver.right(targets).astype(np.float64) / self.x.scale[:, None]
        shift = r @ self.y.mean - self.x.mean @ coefficients
        return torch.from_numpy(np.ascontiguousarray(coefficients.T)), torch.from_numpy(shift)

    def push(self, write: Tensor) -> Tensor:
        """Return write A [rank, d_y]."""
        combination = self.solver.left(write.double().numpy() / self.x.scale)
        pushed = self.y.transposed_times(np.ascontiguousarray(combination.T)).T.astype(np.float64)
        if self.project is not None:
            pushed = (pushed @ self.project[0]) @ self.project[1].T
        return torch.from_numpy(np.ascontiguousarray(pushed))

    def __call__(self, x: Tensor) -> Tensor:
        """Return x A + a, [..., d_y]."""
        flat = x.reshape(-1, x.shape[-1])
        moved = self.push(flat.double() - torch.from_numpy(self.x.mean)) + torch.from_numpy(self.y.mean)
        return moved.reshape(*x.shape[:-1], -1).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Dense(_Affine):
    """A converter as a matrix, for methods that have no cheaper form.

    Attributes:
        weight: A, float32 [d_x, d_y].
        bias: a, float64 [d_y].
        facts: what the fit chose, JSON-able.
    """

    weight: Tensor
    bias: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    def pull(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return (read Aᵀ [rank, d_x], read a [rank])."""
        return (read.to(self.weight.dtype) @ self.weight.T).double(), read.double() @ self.bias

    def push(self, write: Tensor) -> Tensor:
        """Return write A [rank, d_y]."""
        return (write.to(self.weight.dtype) @ self.weight).double()

    def __call__(self, x: Tensor) -> Tensor:
        """Return x A + a, [..., d_y]."""
        return (x.double() @ self.weight.double() + self.bias).to(x.dtype)
