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
    """Return the eigenvalues, descending, and the eigenvectors as columns; `matrix` is overwritten.

    Raises:
        numpy.linalg.LinAlgError: no convergence.
    """
    n, info = len(matrix), ctypes.c_int()
    values = np.empty(n, matrix.dtype)
    work, iwork = np.empty(1 + 6 * n + 2 * n * n, matrix.dtype), np.empty(3 + 5 * n, np.int32)
    _call("syevd", matrix.dtype, "V", _UPPER, n, matrix, n, values, work, len(work), iwork, len(iwork), info)
    if info.value:
        raise np.linalg.LinAlgError(f"the eigenvalues of a {n} x {n} matrix did not converge")
    del work
    half = n // 2
    matrix[:half], matrix[n - half :] = matrix[n - half :][::-1], matrix[:half][::-1].copy()
    return values[::-1], matrix.T


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
