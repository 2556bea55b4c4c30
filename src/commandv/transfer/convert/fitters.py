"""The ways to fit a converter. A fitter is configuration; calling it on paired rows gives a converter.

Rows are paired activations of one matched layer: x [n, d_x] of the model that is read, y [n, d_y] of the other.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from commandv.arguments import checked
from commandv.errors import InputError, require_positive
from commandv.transfer.convert.factor import EXACT_RTOL, Cholesky, Factor, Solver, Spectral
from commandv.transfer.convert.kept import Kept
from commandv.transfer.convert.linear import Converter, Dense, Solved
from commandv.transfer.convert.rows import Rows
from commandv.transfer.convert.strength import FLOAT32_FLOOR, choose_strength

Groups: TypeAlias = np.ndarray | None  # prompt number of each row


class Fitter(Protocol):
    """Hyper-parameters of a converter; the data goes to the call.

    Any callable of (x, y) serves: what else is offered is given to those that name it. A frozen dataclass with a
    `name` has its fields recorded in what is pasted by it.
    """

    def __call__(self, x: Tensor, y: Tensor, *, groups: Groups = None, kept: Kept | None = None) -> Converter:
        """Fit y from x.

        Args:
            x: [n, d_x].
            y: [n, d_y], row i belonging to row i of `x`.
            groups: prompt number of each row; rows of one prompt are not independent. Default: all independent.
            kept: where what was made of `x` alone is kept for other fits of the same `x`; None keeps nothing.

        Raises:
            InputError: unequal numbers of rows, fewer than 2, or not finite.
        """


AnyFitter = Fitter | Callable[[Tensor, Tensor], Converter]


def fitted(fit: AnyFitter, x: Tensor, y: Tensor, groups: np.ndarray, kept: Kept | None) -> Converter:
    """Call a fitter with those of `groups` and `kept` that it takes; see `Fitter`."""
    taken = inspect.signature(fit).parameters
    more = any(one.kind is one.VAR_KEYWORD for one in taken.values())
    offered: dict[str, Any] = {"groups": groups, "kept": kept}
    made = fit(x, y, **{name: value for name, value in offered.items() if more or name in taken})
    if not (callable(made) and hasattr(made, "facts")):
        said = f"the fitter {fitter_settings(fit)['name']} returned a {type(made).__name__}"
        raise InputError(f"{said}, expected a converter, such as AffineMap or Dense")
    return made


def fitter_settings(fit: AnyFitter) -> dict[str, Any]:
    """Return a fitter's name and what decides its result, JSON-able."""
    name = getattr(fit, "name", None) or getattr(fit, "__name__", type(fit).__name__)
    if not is_dataclass(fit) or isinstance(fit, type):
        return {"name": name}
    known = asdict(fit)
    plain = json.loads(json.dumps({one.name: known[one.name] for one in fields(fit) if one.compare}, default=repr))
    return {"name": name, **plain}


@checked
@dataclass(frozen=True)
class Pinv:
    """A = X⁺ Y, uncentred, minimum norm: the published converter.

    Source: arXiv 2506.19140, section 3.2 and its released code. Singular values below max(n, d) · eps(float32) of the
    largest are cut, as `torch.linalg.pinv` does in float32; the arithmetic here is float64.

    Attributes:
        exact: keep every direction instead, by a float64 Cholesky solve with refinement (the limit that the
            published float32 computation approximates). Rank-deficient rows fall back to a cut at 1e-7.
    """

    name: ClassVar[str] = "pinv"
    exact: bool = False

    def __call__(self, x: Tensor, y: Tensor, *, groups: Groups = None, kept: Kept | None = None) -> Converter:
        """Fit; see `Fitter`."""
        check_pairs(x, y)
        rows = Rows.of(x, centre=False, standardise=False)
        solver = _least_squares(self, rows, self.exact, kept)
        return Solved(solver, rows, Rows.of(y, centre=False, standardise=False), facts={"fit": self.name})


@checked
@dataclass(frozen=True)
class Affine:
    """A = (X - x̄)⁺ (Y - ȳ) with intercept, unregularised. Fits its own rows and generalises badly near n = d."""

    name: ClassVar[str] = "affine"

    def __call__(self, x: Tensor, y: Tensor, *, groups: Groups = None, kept: Kept | None = None) -> Converter:
        """Fit; see `Fitter`."""
        check_pairs(x, y)
        rows = Rows.of(x, centre=True, standardise=False)
        solver = _least_squares(self, rows, True, kept)
        return Solved(solver, rows, Rows.of(y, centre=True, standardise=False), facts={"fit": self.name})


@checked
@dataclass(frozen=True)
class Ridge:
    """A = S⁻¹ (XᵀX + lambda I)⁻¹ Xᵀ (Y - ȳ) for centred, standardised X = (x - x̄) S⁻¹: the default converter.

    Source: Hoerl and Kennard 1970; strength by leave-one-out (Allen 1974) or GCV (Golub, Heath and Wahba 1979).

    Attributes:
        strength: lambda relative to the mean eigenvalue; chosen per layer in closed form when None.
        select: how it is chosen, `"loo"` (rows of one prompt left out together) or `"gcv"`.
        standardise: divide each predictor by its standard deviation.
    """

    name: ClassVar[str] = "ridge"
    strength: float | None = None
    select: Literal["loo", "gcv"] = "loo"
    standardise: bool = True

    def __post_init__(self) -> None:
        if self.strength is not None and not (np.isfinite(self.strength) and self.strength > 0):
            raise InputError(f"strength={self.strength}: expected a positive number, or None to choose it per layer")

    def __call__(self, x: Tensor, y: Tensor, *, groups: Groups = None, kept: Kept | None = None) -> Converter:
        """Fit; see `Fitter`."""
        solver, rows, targets, facts = self.solve(x, y, groups=groups, kept=kept)
        return Solved(solver, rows, targets.unscaled(), facts=facts)

    def solve(
        self, x: Tensor, y: Tensor, *, groups: Groups, kept: Kept | None
    ) -> tuple[Solver, Rows, Rows, dict[str, Any]]:
        """Return the regularised pseudo-inverse of x, its rows, the rows of y standardised, and what was chosen."""
        check_pairs(x, y)
        own = Kept() if kept is None else kept
        rows = own.get(("rows", self.standardise), lambda: Rows.of(x, centre=True, standardise=self.standardise))
        targets = Rows.of(y, centre=True, standardise=True)

        def factorise(dtype: type) -> Factor:
            return own.get(("factor", self.standardise, dtype), lambda: Factor.of(rows, dtype))

        def choose() -> float:
            return choose_strength(factorise, targets, np.arange(len(x)) if groups is None else groups, self.select)

        strength = self.strength or choose()
        factor = factorise(np.float32)
        if strength * factor.unit < FLOAT32_FLOOR * factor.bound:
            factor = factorise(np.float64)
        return factor.ridge(strength), rows, targets, {"fit": self.name, "strength": strength}


@checked
@dataclass(frozen=True)
class ReducedRank:
    """Ridge whose fitted values are projected on their leading principal directions.

    A_k = A Π with Π = S_y⁻¹ V Vᵀ S_y and V the k leading right singular vectors of the standardised fitted values.
    Source: Izenman 1975, on top of a ridge solution.

    Attributes:
        rank: k; capped at what the rows allow.
        ridge: the underlying ridge.
    """

    name: ClassVar[str] = "reduced-rank"
    rank: int = 128
    ridge: Ridge = Ridge()

    def __post_init__(self) -> None:
        require_positive(rank=self.rank)

    def __call__(self, x: Tensor, y: Tensor, *, groups: Groups = None, kept: Kept | None = None) -> Converter:
        """Fit; see `Fitter`."""
        solver, rows, targets, facts = self.ridge.solve(x, y, groups=groups, kept=kept)
        everything = targets.dense(np.float32)
        fitted = rows.times(solver.right(everything))
        vectors = torch.linalg.eigh(torch.from_numpy(fitted.T @ fitted))[1].numpy()[:, ::-1]
        v = vectors[:, : min(self.rank, len(x) - 1, y.shape[1])].astype(np.float64)
        project = (v / targets.scale[:, None], v * targets.scale[:, None])
        return Solved(solver, rows, targets.unscaled(), project, {**facts, "fit": self.name, "rank": v.shape[1]})


@checked
@dataclass(frozen=True)
class Procrustes:
    """A = S_x⁻¹ c Q S_y with Q the semi-orthogonal map nearest to the standardised rows and c the best scale.

    Source: Schönemann 1966: Q = U Vᵀ for Xᵀ Y = U Σ Vᵀ, c = tr Σ / ||X Q||². Directions that the rows do not relate
    (Σ = 0: few rows, constant columns) are mapped to zero, where the textbook solution pairs them arbitrarily.
    """

    name: ClassVar[str] = "procrustes"

    def __call__(self, x: Tensor, y: Tensor, *, groups: Groups = None, kept: Kept | None = None) -> Converter:
        """Fit; see `Fitter`."""
        check_pairs(x, y)
        rows = Rows.of(x, centre=True, standardise=True)
        targets = Rows.of(y, centre=True, standardise=True)
        cross = rows.transposed_times(targets.dense(np.float32))
        u, singular, vt = torch.linalg.svd(torch.from_numpy(cross).double(), full_matrices=False)
        related = singular > max(cross.shape) * float(np.finfo(np.float32).eps) * singular[0]
        rotation = u[:, related] @ vt[related]
        energy = float((rows.times(rotation.numpy()) ** 2).sum())
        factor = float(singular.sum()) / energy if energy else 0.0
        weight = factor * rotation / torch.from_numpy(rows.scale)[:, None] * torch.from_numpy(targets.scale)
        bias = torch.from_numpy(targets.mean) - torch.from_numpy(rows.mean) @ weight
        return Dense(weight.float(), bias, {"fit": self.name})


def check_pairs(x: Tensor, y: Tensor) -> None:
    """Raise `InputError` unless there are as many rows of x as of y."""
    if len(x) != len(y):
        raise InputError(f"{len(x)} rows of x and {len(y)} rows of y; expected pairs")


def _least_squares(fitter: Pinv | Affine, rows: Rows, exact: bool, kept: Kept | None) -> Solver:
    def make() -> Solver:
        if exact and (cholesky := Cholesky.of(rows)) is not None:
            return cholesky
        return Spectral.of(rows, EXACT_RTOL if exact else max(rows.n, rows.d) * float(np.finfo(np.float32).eps))

    return make() if kept is None else kept.get(fitter, make)
