"""One factorisation per profile layer, from which every fit, strength and adapter is solved.

With X [n, d] (centred, scaled rows), the smaller Gram matrix is K = X Xᵀ when n <= d (dual), else Xᵀ X (primal). A
pseudo-inverse, regularised or not, is X⁺ = Xᵀ M (dual) or M Xᵀ (primal) with M = (K + lambda I)⁻¹ for ridge and K⁻¹,
cut where it is not to be had, for least squares.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from commandv.transfer.convert import blas
from commandv.transfer.convert.rows import Rows

EXACT_RTOL = 1e-7  # of the largest singular value, when the exact solve meets rank deficiency
LEAST_PENALTY = 1e-12  # of the greatest eigenvalue: with less, T + lambda I would be rounding, or not even definite
PIVOT_RTOL = 1e-6  # a smaller pivot of the Cholesky factor may be nothing but rounding


class Solver(Protocol):
    """Applies X⁺ from either side without forming it."""

    def right(self, targets: np.ndarray) -> np.ndarray:
        """Return X⁺ T [d, k] for targets T [n, k]."""

    def left(self, weights: np.ndarray) -> np.ndarray:
        """Return W X⁺ [k, n] for weights W [k, d]."""


class _GramSolver:
    """X⁺ of `rows` from M, which stands for the inverse of the smaller Gram matrix."""

    rows: Rows

    def inverse(self, right: np.ndarray) -> np.ndarray:
        """Return M right [k, c]."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """The precision to work in."""
        return np.dtype(np.float64)

    def right(self, targets: np.ndarray) -> np.ndarray:
        """Return X⁺ T [d, k]."""
        x, targets = self.rows, targets.astype(self.dtype)
        return x.transposed_times(self.inverse(targets)) if x.dual else self.inverse(x.transposed_times(targets))

    def left(self, weights: np.ndarray) -> np.ndarray:
        """Return W X⁺ [k, n]."""
        x, weights = self.rows, weights.astype(self.dtype)
        return self.inverse(x.times(weights.T)).T if x.dual else x.times(self.inverse(weights.T)).T


# -- ridge ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Factor:
    """K = Q T Qᵀ with T tridiagonal, which serves every strength: (K + lambda I)⁻¹ = Q (T + lambda I)⁻¹ Qᵀ.

    A quarter of the time of a spectrum, and no more memory than K. Source: Eldén, BIT 17 (1977), who bidiagonalises X;
    Golub and Van Loan, Matrix Computations, section 8.3.1.
    """

    rows: Rows  # X
    reflectors: np.ndarray  # Q as Householder vectors in the place of K, [k, k] with k = min(n, d)
    factors: np.ndarray  # of the reflectors, [k - 1]
    diagonal: np.ndarray  # of T, [k]
    beside: np.ndarray  # what stands beside it, [k - 1]

    @classmethod
    def of(cls, rows: Rows, dtype: type) -> Factor:
        """Factorise in float32 or float64."""
        gram = rows.gram(dtype)
        diagonal, beside, factors = blas.tridiagonalise(gram)
        return cls(rows, gram, factors, diagonal, beside)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The precision of the factorisation."""
        return self.diagonal.dtype

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The eigenvalues, ascending, clipped at 0, float64 [k]."""
        return np.maximum(blas.tridiagonal_values(self.diagonal, self.beside).astype(np.float64), 0.0)

    @property
    def bound(self) -> float:
        """An upper bound of the greatest eigenvalue (Gershgorin), for less than computing it."""
        beside = np.abs(np.concatenate([[0.0], self.beside, [0.0]]))
        return float((self.diagonal + beside[:-1] + beside[1:]).max())

    @property
    def unit(self) -> float:
        """The mean eigenvalue, to which strengths are relative; 1 when all rows are alike."""
        return float(self.diagonal.mean(dtype=np.float64)) or 1.0

    def rotate(self, right: np.ndarray, *, back: bool = False) -> np.ndarray:
        """Return Qᵀ right, or Q right (back), [k, c]."""
        return blas.rotate(self.reflectors, self.factors, right, back=back)

    def ridge(self, strength: float) -> Regularised:
        """Return the pseudo-inverse regularised by `strength`, relative to the mean eigenvalue."""
        penalty = max(strength * self.unit, LEAST_PENALTY * (self.bound or 1.0))
        pivots, lower = blas.tridiagonal_factor(self.diagonal + self.dtype.type(penalty), self.beside)
        return Regularised(self.rows, self, penalty, pivots, lower)


@dataclass(frozen=True, eq=False)
class Regularised(_GramSolver):
    """X⁺ of ridge: M = Q (L D Lᵀ)⁻¹ Qᵀ with T + lambda I = L D Lᵀ."""

    rows: Rows  # X
    factor: Factor  # of X
    penalty: float  # lambda in units of the eigenvalues
    pivots: np.ndarray  # D, [k]
    lower: np.ndarray  # what stands below the diagonal of L, [k - 1]

    @property
    def dtype(self) -> Any:
        """The precision of the factorisation."""
        return self.factor.dtype

    def solve(self, rotated: np.ndarray) -> np.ndarray:
        """Return (T + lambda I)⁻¹ rotated [k, c]."""
        return blas.tridiagonal_solve(self.pivots, self.lower, rotated)

    def inverse(self, right: np.ndarray) -> np.ndarray:
        """Return (K + lambda I)⁻¹ right [k, c]."""
        return self.factor.rotate(self.solve(self.factor.rotate(right)), back=True)


# -- least squares ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Spectral(_GramSolver):
    """X⁺ in float64 without the singular values below a cut: M = V diag(1/e, or 0) Vᵀ, the minimum-norm solution."""

    rows: Rows  # X
    vectors: np.ndarray  # V, [k, k]
    gains: np.ndarray  # 1/e, or 0 below the cut, [k]

    @classmethod
    def of(cls, rows: Rows, rtol: float) -> Spectral:
        """Factorise; singular values up to `rtol` of the largest are cut."""
        values, vectors = blas.eigh(rows.gram(np.float64))
        values = np.maximum(values, 0.0)
        keep = np.sqrt(values) > rtol * np.sqrt(values[-1])
        return cls(rows, vectors, np.divide(1.0, values, out=np.zeros_like(values), where=keep))

    def inverse(self, right: np.ndarray) -> np.ndarray:
        """Return M right [k, c]."""
        return self.vectors @ (self.gains[:, None] * (self.vectors.T @ right))


@dataclass(frozen=True, eq=False)
class Cholesky(_GramSolver):
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

    def inverse(self, right: np.ndarray) -> np.ndarray:
        """Return K⁻¹ right [k, c], refined once."""
        first = blas.cholesky_solve(self.upper, right)
        return first + blas.cholesky_solve(self.upper, right - self.rows.gram_times(first))
