"""One factorisation per profile layer: the spectrum from which every fit, strength and adapter is solved.

With X [n, d] (centred, scaled rows), the dual Gram X Xᵀ = U diag(e) Uᵀ serves n <= d, the primal Xᵀ X = V diag(e) Vᵀ
n > d. A regularised pseudo-inverse is X⁺ = Xᵀ U diag(f) Uᵀ = V diag(f) Vᵀ Xᵀ with the filter f(e) = 1/(e + lambda) for
ridge and 1/e (0 below a cut) for least squares.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from commandv.convert import blas
from commandv.convert.rows import Rows

# Strengths tried, relative to the mean eigenvalue.
STRENGTHS = 10.0 ** np.arange(-3.0, 2.76, 0.25)
SKETCH = 24  # random projections of the targets on which the strength is chosen
BATCH = 512  # rows whose leave-one-out residuals are computed together
EIGH_FLOAT32_FLOOR = 1e-4  # of the largest eigenvalue: a strength above it forgives float32 rounding
EXACT_RTOL = 1e-7  # of the largest singular value, when the exact solve meets rank deficiency
PIVOT_RTOL = 1e-6  # a smaller pivot of the Cholesky factor may be nothing but rounding


class Solver(Protocol):
    """Applies X⁺ from either side without forming it."""

    def right(self, targets: np.ndarray) -> np.ndarray:
        """Return X⁺ T [d, k] for targets T [n, k]."""

    def left(self, weights: np.ndarray) -> np.ndarray:
        """Return W X⁺ [k, n] for weights W [k, d]."""


@dataclass(frozen=True, eq=False)
class Factor:
    """The spectrum of X: eigenvalues descending, and eigenvectors of its smaller Gram matrix.

    Attributes:
        rows: X.
        values: e, [k] with k = min(n, d), clipped at 0.
        vectors: U [n, k] (dual) or V [d, k] (primal).
    """

    rows: Rows
    values: np.ndarray
    vectors: np.ndarray

    @classmethod
    def of(cls, rows: Rows, dtype: type) -> Factor:
        """Factorise in float32 or float64."""
        values, vectors = blas.eigh(rows.gram(dtype))
        return cls(rows, np.maximum(values.astype(np.float64), 0.0), vectors)

    @property
    def dual(self) -> bool:
        """True when the vectors are U [n, k]."""
        return self.rows.dual

    @property
    def unit(self) -> float:
        """The mean eigenvalue, to which strengths are relative; 1 when all rows are alike."""
        return float(self.values.mean()) or 1.0

    def _inverse_roots(self) -> np.ndarray:
        roots = np.sqrt(self.values)
        inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=self.values > 1e-12 * self.values[0])
        return inverse.astype(self.vectors.dtype)

    def left_vectors(self, index: np.ndarray) -> np.ndarray:
        """Return the rows of U at `index`, [len(index), k]; columns of zero eigenvalues are zero in the primal case."""
        if self.dual:
            return self.vectors[index]
        return self.rows.at(index).times(self.vectors) * self._inverse_roots()

    def spread(self, targets: np.ndarray) -> np.ndarray:
        """Return Uᵀ T [k, t] for targets T [n, t]."""
        if self.dual:
            return self.vectors.T @ targets
        return self._inverse_roots()[:, None] * (self.vectors.T @ self.rows.transposed_times(targets))

    def solver(self, gains: np.ndarray) -> Spectral:
        """Return the pseudo-inverse with the spectral filter `gains` [k]."""
        return Spectral(self, gains.astype(self.vectors.dtype))


@dataclass(frozen=True, eq=False)
class Spectral:
    """X⁺ with a spectral filter."""

    factor: Factor
    gains: np.ndarray

    def right(self, targets: np.ndarray) -> np.ndarray:
        """Return X⁺ T [d, k]."""
        x, basis = self.factor.rows, self.factor.vectors
        targets = targets.astype(basis.dtype)
        if self.factor.dual:
            return x.transposed_times(basis @ (self.gains[:, None] * (basis.T @ targets)))
        return basis @ (self.gains[:, None] * (basis.T @ x.transposed_times(targets)))

    def left(self, weights: np.ndarray) -> np.ndarray:
        """Return W X⁺ [k, n]."""
        x, basis = self.factor.rows, self.factor.vectors
        weights = weights.astype(basis.dtype)
        if self.factor.dual:
            return (basis @ (self.gains[:, None] * (basis.T @ x.times(weights.T)))).T
        return x.times(basis @ (self.gains[:, None] * (basis.T @ weights.T))).T


@dataclass(frozen=True, eq=False)
class Cholesky:
    """X⁺ of full-rank X in float64: the Gram's Cholesky factor and one step of iterative refinement.

    Refinement with products of X itself recovers the digits that squaring the condition number costs.
    """

    rows: Rows
    upper: np.ndarray  # Lᵀ, with nothing of use below it

    @classmethod
    def of(cls, rows: Rows) -> Cholesky | None:
        """Factorise, or return None when the rows (or columns) are not linearly independent."""
        gram = rows.gram(np.float64)
        if not blas.cholesky(gram):
            return None
        diagonal = np.abs(np.diag(gram))
        return cls(rows, gram) if diagonal.min() > PIVOT_RTOL * diagonal.max() else None

    def _apply(self, right: np.ndarray) -> np.ndarray:
        """Return (X Xᵀ)⁻¹ right in the dual case, (Xᵀ X)⁻¹ right in the primal one, refined once."""
        first = blas.cholesky_solve(self.upper, right)
        return first + blas.cholesky_solve(self.upper, right - self.rows.gram_times(first))

    def right(self, targets: np.ndarray) -> np.ndarray:
        """Return X⁺ T [d, k]."""
        x, targets = self.rows, targets.astype(np.float64)
        return x.transposed_times(self._apply(targets)) if x.dual else self._apply(x.transposed_times(targets))

    def left(self, weights: np.ndarray) -> np.ndarray:
        """Return W X⁺ [k, n]."""
        x, weights = self.rows, weights.astype(np.float64)
        return self._apply(x.times(weights.T)).T if x.dual else x.times(self._apply(weights.T)).T


def least_squares_gains(factor: Factor, rtol: float) -> np.ndarray:
    """Return 1/e where the singular value exceeds `rtol` of the largest, else 0: the minimum-norm solution."""
    keep = np.sqrt(factor.values) > rtol * np.sqrt(factor.values[0])
    return np.divide(1.0, factor.values, out=np.zeros_like(factor.values), where=keep & (factor.values > 0))


def choose_strength(factor: Factor, targets: np.ndarray, groups: np.ndarray, method: str) -> float:
    """Choose the ridge strength lambda in closed form from the spectrum.

    `loo` minimises the leave-one-out error (PRESS; Allen 1974): residuals r = (I - H) T with the hat matrix
    H = 11ᵀ/n + U diag(e/(e+lambda)) Uᵀ, each divided by what its own row contributed. Rows of one prompt are left out
    together: r_g -> (I - H_gg)⁻¹ r_g, or the strength would be chosen on near-copies. `gcv` (Golub, Heath and
    Wahba 1979) replaces each leverage by their mean.

    Args:
        factor: of the predictors, centred.
        targets: T, [n, k], centred.
        groups: prompt number of each row, int64 [n].
        method: `"loo"` or `"gcv"`.

    Returns:
        lambda in units of the eigenvalues.
    """
    values, n = factor.values, factor.rows.n
    grid = STRENGTHS * factor.unit
    spread = factor.spread(targets)
    if method == "gcv":
        energy = (spread.astype(np.float64) ** 2).sum(1)
        outside = max(0.0, float((targets.astype(np.float64) ** 2).sum()) - float(energy.sum()))
        shrink = grid[:, None] / (values + grid[:, None])
        trace = n - 1 - (1 - shrink).sum(1)
        scores = ((shrink**2 * energy).sum(1) + outside) / np.maximum(trace, 1e-9) ** 2
        return float(grid[np.argmin(scores)])
    keep = (values[:, None] / (values[:, None] + grid)).astype(spread.dtype)
    kept_spread = (keep[:, :, None] * spread[:, None, :]).reshape(len(keep), -1)
    scores = np.zeros(len(grid))
    for index, sizes in _batches(groups):
        u = factor.left_vectors(index)
        fitted = (u @ kept_spread).reshape(len(index), len(grid), -1)
        residual = np.subtract(targets[index, None], fitted, out=fitted)
        scores += _press(u, residual, keep, sizes, n)
    return float(grid[np.argmin(scores)])


def _batches(groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield row numbers, group after group, and the groups' sizes: at most `BATCH` rows unless one group has more."""
    order = np.argsort(groups, kind="stable")
    sizes = np.unique(groups, return_counts=True)[1]
    ends = np.cumsum(sizes)
    first = start = 0
    while first < len(sizes):
        after = max(first + 1, int(np.searchsorted(ends, start + BATCH, side="right")))
        yield order[start : ends[after - 1]], sizes[first:after]
        first, start = after, int(ends[after - 1])


def _press(u: np.ndarray, residual: np.ndarray, keep: np.ndarray, sizes: np.ndarray, n: int) -> np.ndarray:
    """Return the sums of squared residuals with each group of rows left out, one for each of s strengths.

    Args:
        u: some rows of U, group after group, [m, k].
        residual: of these rows, with all n rows fitted, [m, s, t].
        keep: e / (e + lambda), [k, s].
        sizes: of the groups.
        n: rows in all.
    """
    if sizes.max() == 1:
        left_out = np.sqrt(np.einsum("mst,mst->ms", residual, residual)) / np.maximum(1 - 1 / n - (u * u) @ keep, 1e-6)
        return (left_out.astype(np.float64) ** 2).sum(0)
    total, start = np.zeros(keep.shape[1]), 0
    for size in sizes:
        rows = slice(start, start := start + size)
        own = (u[rows] * keep.T[:, None]) @ u[rows].T + 1 / n
        left_out = np.linalg.solve(np.eye(size) * (1 + 1e-6) - own, residual[rows].swapaxes(0, 1))
        total += (left_out**2).sum((1, 2))
    return total


def sketch(rows: Rows, dtype: type) -> np.ndarray:
    """Project rows [n, d] on `SKETCH` fixed random directions, so that sums of squares keep their proportions."""
    return rows.times(_directions(rows.d).astype(dtype))


@functools.cache
def _directions(d: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((d, SKETCH)) / np.sqrt(SKETCH)


@dataclass
class FactorStore:
    """Factorisations kept in memory, so that a second adapter over the same profiles costs almost nothing.

    Hand the same store to several `paste` calls; it belongs to the caller and dies with it.
    """

    entries: dict[Any, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def get(self, key: Any, make: Any) -> Any:
        """Return the entry for `key`, made by `make()` the first time."""
        with self.lock:
            if key in self.entries:
                return self.entries[key]
        value = make()
        with self.lock:
            return self.entries.setdefault(key, value)
