"""Rows of activations, centred and scaled on the fly: products with them, block by block, at bounded memory.

Profiles are kept in bfloat16 and may be memory-mapped. Nothing here changes them, and no float copy of a whole
profile layer is ever made.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from commandv.errors import InputError
from commandv.transfer.convert import blas

BLOCK_BYTES = 4 << 20  # of one block in the working precision
_TORCH: dict[type, torch.dtype] = {np.float32: torch.float32, np.float64: torch.float64}


def own_pages(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return zeros on memory pages of their own, which go back to the system as soon as the array is dropped.

    malloc keeps freed blocks of up to 32 MB for the thread that freed them: with a few workers that doubles the peak.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size, access=mmap.ACCESS_COPY), dtype).reshape(shape)


@dataclass(frozen=True, eq=False)
class Rows:
    """X = (raw - mean) / scale for raw activations [n, d]."""

    raw: Tensor  # [n, d] in any floating dtype
    mean: np.ndarray  # [d] float64, zeros when not centred
    scale: np.ndarray  # [d] float64, ones when not standardised

    @classmethod
    def of(cls, raw: Tensor, *, centre: bool, standardise: bool) -> Rows:
        """Wrap activations [n, d]; constant columns get scale 1."""
        if raw.ndim != 2 or raw.shape[0] < 2:
            raise InputError(f"activations of shape {tuple(raw.shape)}: expected [rows, d_model] with 2 rows or more")
        if not torch.isfinite(torch.stack(torch.aminmax(raw))).all():
            raise InputError("activations hold NaN or infinity; profile the model again")
        plain = cls(raw, np.zeros(raw.shape[1]), np.ones(raw.shape[1]))
        if not centre and not standardise:
            return plain
        mean, scale = plain._column_moments()
        return cls(raw, mean if centre else plain.mean, scale if standardise else plain.scale)

    def _column_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns' means and standard deviations, merged over blocks by Chan's rule."""
        mean, squares, n = np.zeros(self.d), np.zeros(self.d), 0
        for _, block in self._row_blocks(np.float64):
            m = len(block)
            own = np.ones(m) @ block / m
            block -= own
            squares += np.einsum("ij,ij->j", block, block) + (own - mean) ** 2 * (n * m / (n + m))
            mean += (own - mean) * (m / (n + m))
            n += m
        scale = np.sqrt(squares / n)
        # A column that is constant up to rounding carries nothing to scale up.
        scale[~(scale > 1e-12 * np.abs(mean))] = 1.0
        return mean, scale

    def at(self, index: np.ndarray) -> Rows:
        """Return the rows at `index`, centred and scaled like all of them."""
        return Rows(self.raw[torch.from_numpy(index)], self.mean, self.scale)

    def unscaled(self) -> Rows:
        """Return the same rows without the scale."""
        return Rows(self.raw, self.mean, np.ones(self.d))

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """The columns' means and scales."""
        return self.mean, self.scale

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.raw.shape[0]

    @property
    def d(self) -> int:
        """Number of columns."""
        return self.raw.shape[1]

    @property
    def dual(self) -> bool:
        """True when X Xᵀ is the smaller Gram matrix, or no larger."""
        return self.n <= self.d

    def dense(self, dtype: type) -> np.ndarray:
        """Return X whole, in `dtype`."""
        return self._filled(torch.empty(self.raw.shape, dtype=_TORCH[dtype]), slice(None), slice(None))

    def _filled(self, out: Tensor, rows: slice, columns: slice) -> np.ndarray:
        """Fill `out` with a centred, scaled block of X."""
        values = out.copy_(self.raw[rows, columns]).numpy()
        mean, scale = self.mean[columns], self.scale[columns]
        if mean.any():
            values -= mean.astype(values.dtype)
        if (scale != 1).any():
            values *= (1 / scale).astype(values.dtype)
        return values

    def _row_blocks(self, dtype: type, size: int = BLOCK_BYTES) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield X by blocks of rows; the next block takes the memory of the last."""
        step = min(self.n, max(64, size // (np.dtype(dtype).itemsize * self.d)))
        buffer = torch.from_numpy(own_pages((step * self.d,), dtype))
        for a in range(0, self.n, step):
            rows = slice(a, min(a + step, self.n))
            width = rows.stop - a
            yield rows, self._filled(buffer[: width * self.d].view(width, self.d), rows, slice(None))

    def _column_blocks(self, dtype: type, size: int = BLOCK_BYTES) -> Iterator[np.ndarray]:
        """Yield X by blocks of columns; the next block takes the memory of the last."""
        step = min(self.d, max(64, size // (np.dtype(dtype).itemsize * self.n)))
        buffer = torch.from_numpy(own_pages((step * self.n,), dtype))
        for a in range(0, self.d, step):
            columns = slice(a, min(a + step, self.d))
            width = columns.stop - a
            yield self._filled(buffer[: self.n * width].view(self.n, width), slice(None), columns)

    def gram(self, dtype: type) -> np.ndarray:
        """Return the upper triangle of X Xᵀ [n, n] (dual) when n <= d, else of Xᵀ X [d, d] (primal)."""
        k = min(self.n, self.d)
        total = own_pages((k, k), dtype)
        size = max(BLOCK_BYTES, total.nbytes // 4)  # each block passes over the whole of the total
        if self.dual:
            for block in self._column_blocks(dtype, size):
                blas.add_gram(total, block, dual=True)
        else:
            for _, block in self._row_blocks(dtype, size):
                blas.add_gram(total, block, dual=False)
        return total

    def gram_times(self, right: np.ndarray) -> np.ndarray:
        """Return X Xᵀ right (dual) or Xᵀ X right (primal) from products with X itself."""
        out = np.zeros_like(right)
        if self.dual:
            for block in self._column_blocks(right.dtype.type):
                out += block @ (block.T @ right)
        else:
            for _, block in self._row_blocks(right.dtype.type):
                out += block.T @ (block @ right)
        return out

    def times(self, right: np.ndarray) -> np.ndarray:
        """Return X right [n, k] for `right` [d, k]."""
        out = np.empty((self.n, right.shape[1]), right.dtype)
        for rows, block in self._row_blocks(right.dtype.type):
            out[rows] = block @ right
        return out

    def transposed_times(self, right: np.ndarray) -> np.ndarray:
        """Return Xᵀ right [d, k] for `right` [n, k]."""
        out = np.zeros((self.d, right.shape[1]), right.dtype)
        for rows, block in self._row_blocks(right.dtype.type):
            out += block.T @ right[rows]
        return out
