"""Affine converters between two residual streams, y = x A + a, applied to adapters by folding."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from commandv.adapters.network import Network
from commandv.arguments import checked
from commandv.transfer.convert.factor import Solver
from commandv.transfer.convert.rows import Rows


class Converter(Protocol):
    """A fitted map from one residual stream (x, width d_x) to another (y, width d_y), affine or not.

    What a fitter returns: an `AffineMap` (`Dense` for one that is a matrix), or a `commandv.adapters.network.Network`.
    """

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the fit chose, JSON-able."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return y [..., d_y] for x [..., d_x]."""

    def pull(self, read: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return (read Aᵀ [rank, d_x], read a [rank]), which read in x what `read` [rank, d_y] reads in y.

        None where the map is not affine.
        """

    def push(self, write: Tensor) -> Tensor | None:
        """Return write A [rank, d_y] for differences `write` [rank, d_x], which take no bias; None if not affine."""

    def steps(self, write: Tensor, states: Tensor) -> Tensor:
        """Return what a step along each row of `write` [k, d_x] becomes on average over `states` [n, d_x], [k, d_y]."""

    def network(self) -> Network:
        """Return the map in the form that can be attached and saved."""

    def dense(self) -> Converter:
        """Return the same map in the form that is quickest for many states."""


class AffineMap(abc.ABC):
    """y = x A + a: the converters through which interventions fold.

    A class of your own says `d_y`, `pull` and `push`, and `facts` if there is something to tell; the rest follows.
    """

    facts: Mapping[str, Any] = MappingProxyType({})

    @property
    @abc.abstractmethod
    def d_y(self) -> int:
        """Width of what it gives."""

    @abc.abstractmethod
    def pull(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return (read Aᵀ [rank, d_x], read a [rank]) for `read` [rank, d_y], float64."""

    @abc.abstractmethod
    def push(self, write: Tensor) -> Tensor:
        """Return write A [rank, d_y] for `write` [rank, d_x], float64."""

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Return A [d_x, d_y] and a [d_y], float64, materialised; folding never needs it."""
        pulled, shift = self.pull(torch.eye(self.d_y, dtype=torch.float64))
        return pulled.T, shift

    def __call__(self, x: Tensor) -> Tensor:
        """Return x A + a, [..., d_y]."""
        return self.dense()(x)

    def steps(self, write: Tensor, states: Tensor) -> Tensor:
        """Return write A: what a step becomes does not depend on the state."""
        return self.push(write)

    def network(self) -> Network:
        """Return it as a network without hidden units."""
        weight, bias = self.matrix()
        d_x, none = len(weight), torch.zeros(0)
        linear = weight.float().contiguous()
        parts = (none.reshape(d_x, 0), none, none.reshape(0, self.d_y))
        return Network(torch.zeros(d_x), *parts, bias.float(), linear, facts=dict(self.facts))

    def dense(self) -> Dense:
        """Return it as a matrix."""
        return Dense(*self.matrix(), dict(self.facts))


@dataclass(frozen=True, eq=False)
class Solved(AffineMap):
    """A converter kept as a solver over its fitting rows: A = X⁺ Y, never formed."""

    solver: Solver  # applies X⁺
    x: Rows  # the predictors, as fitted (centred, scaled)
    y: Rows  # the targets, centred but not scaled
    # optional [d_y, k] pair (V, Vᵀ-side inverse) that restricts the output to a subspace
    project: tuple[np.ndarray, np.ndarray] | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # what the fit chose, JSON-able

    @property
    def d_y(self) -> int:
        """Width of what it gives."""
        return self.y.d

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


@checked
@dataclass(frozen=True, eq=False)
class Dense(AffineMap):
    """A converter as a matrix, for methods that have no cheaper form.

    Attributes:
        weight: A, [d_x, d_y].
        bias: a, float64 [d_y].
        facts: what the fit chose, JSON-able.
    """

    weight: Tensor
    bias: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def d_y(self) -> int:
        """Width of what it gives."""
        return self.weight.shape[1]

    def dense(self) -> Dense:
        """Return itself."""
        return self

    def pull(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return (read Aᵀ [rank, d_x], read a [rank])."""
        return (read.to(self.weight.dtype) @ self.weight.T).double(), read.double() @ self.bias

    def push(self, write: Tensor) -> Tensor:
        """Return write A [rank, d_y]."""
        return (write.to(self.weight.dtype) @ self.weight).double()

    def __call__(self, x: Tensor) -> Tensor:
        """Return x A + a, [..., d_y]."""
        return (x.double() @ self.weight.double() + self.bias).to(x.dtype)
