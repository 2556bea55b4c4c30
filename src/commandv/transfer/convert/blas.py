"""Symmetric linear algebra in place, free of the interpreter lock.

SciPy's wrappers of these routines hold the lock, so that workers would wait for each other; NumPy's copy their
argument, and need a second matrix to accumulate a Gram matrix in. SciPy publishes the routines' addresses
(`scipy.linalg.cython_blas`, `cython_lapack`), and ctypes lets go of the lock while they run. Matrices are C-ordered;
of symmetric ones only the upper triangle is read or written.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

# Fortran sees a C-ordered array transposed, so what is upper here is lower there; a tenth faster than the other one.
_UPPER = "L"
_BLOCK = 64  # columns that LAPACK works on together, at most


def add_gram(total: np.ndarray, block: np.ndarray, *, dual: bool) -> None:
    """Add block blockᵀ (dual) or blockᵀ block (primal) to the upper triangle of `total`."""
    n, width = len(total), block.shape[1]
    trans, inner = ("T", width) if dual else ("N", len(block))
    _call("syrk", total.dtype, _UPPER, trans, n, inner, 1.0, block, width, 1.0, total, n)


def cholesky(matrix: np.ndarray) -> bool:
    """Replace the upper triangle of a matrix by Lᵀ, matrix = L Lᵀ; False when it is not positive definite."""
    n, info = len(matrix), ctypes.c_int()
    _call("potrf", matrix.dtype, _UPPER, n, matrix, n, info)
    return info.value == 0


def cholesky_solve(upper: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return (L Lᵀ)⁻¹ right [n, k] for Lᵀ in the upper triangle."""
    n, out = len(upper), np.array(right, upper.dtype, order="F")
    _call("potrs", upper.dtype, _UPPER, n, out.shape[1], upper, n, out, n, ctypes.c_int())
    return out


def eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvalues, ascending, and the eigenvectors as columns; `matrix` is overwritten.

    Raises:
        numpy.linalg.LinAlgError: no convergence.
    """
    n, info = len(matrix), ctypes.c_int()
    values = np.empty(n, matrix.dtype)
    work, iwork = np.empty(1 + 6 * n + 2 * n * n, matrix.dtype), np.empty(3 + 5 * n, np.int32)
    _call("syevd", matrix.dtype, "V", _UPPER, n, matrix, n, values, work, len(work), iwork, len(iwork), info)
    if info.value:
        raise np.linalg.LinAlgError(f"the eigenvalues of a {n} x {n} matrix did not converge")
    return values, matrix.T


def tridiagonalise(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reduce a matrix to Q T Qᵀ with T tridiagonal; its upper triangle is replaced by what `rotate` needs of Q.

    Returns:
        T's diagonal [n], what stands beside it [n - 1], and the reflectors' factors [n - 1].
    """
    n, dtype = len(matrix), matrix.dtype
    diagonal, beside, factors = np.empty(n, dtype), np.empty(n - 1, dtype), np.empty(n - 1, dtype)
    work = np.empty(_BLOCK * n, dtype)
    shared = diagonal, beside, factors, work, len(work)
    _call("sytrd", dtype, _UPPER, n, matrix, n, *shared, ctypes.c_int())
    return diagonal, beside, factors


def rotate(reflectors: np.ndarray, factors: np.ndarray, right: np.ndarray, *, back: bool) -> np.ndarray:
    """Return Qᵀ right, or Q right (back), [n, k] in Fortran order, for Q as `tridiagonalise` leaves it."""
    n, out = len(reflectors), np.array(right, reflectors.dtype, order="F")
    # Room for the blocks that LAPACK likes, and its triangular factor of 65 x 64.
    width = out.shape[1]
    work = np.empty(_BLOCK * (width + 65), out.dtype)
    shared = reflectors, n, factors, out, n, work, len(work)
    _call("ormtr", out.dtype, "L", _UPPER, "N" if back else "T", n, width, *shared, ctypes.c_int())
    return out


def tridiagonal_values(diagonal: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """Return the eigenvalues of a tridiagonal matrix, ascending.

    Raises:
        numpy.linalg.LinAlgError: no convergence.
    """
    values, info = diagonal.copy(), ctypes.c_int()
    _call("sterf", values.dtype, len(values), values, beside.copy(), info)
    if info.value:
        raise np.linalg.LinAlgError(f"the eigenvalues of a {len(values)} x {len(values)} matrix did not converge")
    return values


def tridiagonal_factor(diagonal: np.ndarray, beside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return D [n] and what stands below the diagonal of L [n - 1], for a tridiagonal matrix = L D Lᵀ.

    Raises:
        numpy.linalg.LinAlgError: not positive definite.
    """
    pivots, lower, info = diagonal.copy(), beside.copy(), ctypes.c_int()
    _call("pttrf", pivots.dtype, len(pivots), pivots, lower, info)
    if info.value:
        raise np.linalg.LinAlgError(f"a {len(pivots)} x {len(pivots)} tridiagonal matrix is not positive definite")
    return pivots, lower


def tridiagonal_solve(pivots: np.ndarray, lower: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return (L D Lᵀ)⁻¹ right, [n, k] in Fortran order."""
    n, out = len(pivots), np.array(right, pivots.dtype, order="F")
    _call("pttrs", out.dtype, n, out.shape[1], pivots, lower, out, n, ctypes.c_int())
    return out


@functools.cache
def _routine(name: str) -> Any:
    table = cython_blas if name.endswith("syrk") else cython_lapack
    capsule = table.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None)(api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule)))


def _call(name: str, dtype: np.dtype[Any], *arguments: Any) -> None:
    """Call a routine by its name without the letter of its precision; all arguments go by reference."""
    number = {"f": ctypes.c_float, "d": ctypes.c_double}[dtype.char]
    passed: list[Any] = []
    for one in arguments:
        if isinstance(one, np.ndarray):
            assert one.dtype in (dtype, np.int32)
            assert one.flags.c_contiguous or one.flags.f_contiguous
            passed.append(ctypes.c_void_p(one.ctypes.data))
        elif isinstance(one, ctypes.c_int):
            passed.append(ctypes.byref(one))
        else:
            kind: Any = {str: ctypes.c_char, int: ctypes.c_int, float: number}[type(one)]
            passed.append(ctypes.byref(kind(one.encode() if isinstance(one, str) else one)))
    _routine({"f": "s", "d": "d"}[dtype.char] + name)(*passed)
