"""Rows of activations, centred and scaled on the fly: products with them, block by block, at bounded memory.

Profiles are kept in bfloat16 and may be memory-mapped. Nothing here changes them, and no float copy of a whole
profile layer is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from commandv.errors import InputError

BLOCK_BYTES = 8 << 20  # of one block in the working precision


@dataclass(frozen=True, eq=False)
class Rows:
    """X = (raw - mean) / scale for raw activations [n, d].

    Attributes:
        raw: [n, d] in any floating dtype.
        mean: [d] float64, zeros when not centred.
        scale: [d] float64, ones when not standardised.
    """

    raw: Tensor
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, raw: Tensor, *, centre: bool, standardise: bool) -> Rows:
        """Wrap activations [n, d]; constant columns get scale 1.

        Raises:
            InputError: fewer than 2 rows, or not finite.
        """
        if raw.ndim != 2 or raw.shape[0] < 2:
            raise InputError(f"activations of shape {tuple(raw.shape)}: expected [rows, d_model] with 2 rows or more")
        if not torch.isfinite(torch.stack(torch.aminmax(raw))).all():
            raise InputError("activations hold NaN or infinity; profile the model again")
        d = raw.shape[1]
        mean, scale = np.zeros(d), np.ones(d)
        if centre or standardise:
            step = max(1, BLOCK_BYTES // (8 * raw.shape[0]))
            for a in range(0, d, step):
                variance, centre_values = torch.var_mean(raw[:, a : a + step].double(), dim=0, correction=0)
                mean[a : a + step] = centre_values.numpy()
                scale[a : a + step] = variance.sqrt().numpy()
            # A column that is constant up to rounding carries nothing to scale up.
            scale[~(scale > 1e-12 * np.abs(mean))] = 1.0
            scale = scale if standardise else np.ones(d)
            mean = mean if centre else np.zeros(d)
        return cls(raw, mean, scale)

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.raw.shape[0]

    @property
    def d(self) -> int:
        """Number of columns."""
        return self.raw.shape[1]

    def _columns(self, dtype: type) -> list[slice]:
        step = max(64, BLOCK_BYTES // (np.dtype(dtype).itemsize * self.n))
        return [slice(a, min(a + step, self.d)) for a in range(0, self.d, step)]

    def _rows(self, dtype: type) -> list[slice]:
        step = max(64, BLOCK_BYTES // (np.dtype(dtype).itemsize * self.d))
        return [slice(a, min(a + step, self.n)) for a in range(0, self.n, step)]

    def block(self, rows: slice, columns: slice, dtype: type) -> np.ndarray:
        """Return a centred, scaled block of X in `dtype`."""
        kind = torch.float64 if dtype is np.float64 else torch.float32
        values = self.raw[rows, columns].to(kind, copy=True).numpy()
        mean, scale = self.mean[columns], self.scale[columns]
        if mean.any():
            values -= mean.astype(dtype)
        if (scale != 1).any():
            values *= (1 / scale).astype(dtype)
        return values

    def gram(self, dtype: type) -> np.ndarray:
        """Return X Xᵀ [n, n] (dual) when n <= d, else Xᵀ X [d, d] (primal)."""
        total = None
        if self.n <= self.d:
            for columns in self._columns(dtype):
                block = self.block(slice(None), columns, dtype)
                part = block @ block.T
                total = part if total is None else np.add(total, part, out=total)
        else:
            for rows in self._rows(dtype):
                block = self.block(rows, slice(None), dtype)
                part = block.T @ block
                total = part if total is None else np.add(total, part, out=total)
        assert total is not None
        return total

    def times(self, right: np.ndarray) -> np.ndarray:
        """Return X right [n, k] for `right` [d, k]."""
        dtype = right.dtype.type
        out = np.empty((self.n, right.shape[1]), dtype)
        for rows in self._rows(dtype):
            out[rows] = self.block(rows, slice(None), dtype) @ right
        return out

    def transposed_times(self, right: np.ndarray) -> np.ndarray:
        """Return Xᵀ right [d, k] for `right` [n, k]."""
        dtype = right.dtype.type
        out = np.zeros((self.d, right.shape[1]), dtype)
        for rows in self._rows(dtype):
            out += self.block(rows, slice(None), dtype).T @ right[rows]
        return out
