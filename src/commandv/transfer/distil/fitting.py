"""One fit of the words' methods: a wanted shift as a low-rank read of the state."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from commandv.adapters.adapter import Intervention
from commandv.positions import Positions
from commandv.transfer.convert.fitters import Ridge
from commandv.transfer.convert.kept import Kept
from commandv.transfer.convert.linear import Solved
from commandv.transfer.convert.rows import Rows


def fit_shift(
    x: Tensor, y: Tensor, groups: np.ndarray, *, unit: Tensor, rank: int, positions: Positions, kept: Kept | None = None
) -> Intervention:
    """Fit the shift y from the state x: Delta(x) = (x - x̄) A_k + ȳ, a native intervention of rank k + 1.

    A is a ridge solution, its strength chosen with the rows of one prompt left out together; A_k = A U⁻¹ V Vᵀ U keeps
    the k leading directions V of the fitted values in `unit` U of each dimension.

    Args:
        x: [n, d_model].
        y: [n, d_model].
        groups: prompt number of each row, int64 [n].
        unit: what counts as a large shift of each dimension, [d_model].
        rank: k.
        positions: where the intervention will act.
        kept: where what was made of `x` alone is kept.
    """
    solver, rows, targets, _ = Ridge().solve(x, y, groups=groups, kept=kept)
    found = Solved(solver, rows, targets.unscaled())
    wide = unit.double().numpy()
    fitted = torch.from_numpy(rows.times(solver.right(_scaled(found.y, wide))).astype(np.float32))
    v = torch.linalg.eigh(fitted.T @ fitted)[1].flip(1)[:, : min(rank, len(x) - 1)].double()
    down, up = v / unit[:, None].double(), (v * unit[:, None].double()).T
    read, bias = found.pull(down.T)
    mean = torch.from_numpy(found.y.mean)
    constant = torch.zeros(1, x.shape[1], dtype=torch.float64)
    return Intervention(
        torch.cat([read, constant]).float(),
        torch.cat([bias - down.T @ mean, torch.ones(1, dtype=torch.float64)]).float(),
        torch.cat([up, mean[None]]).float(),
        positions=positions,
    )


def _scaled(rows: Rows, unit: np.ndarray) -> np.ndarray:
    return rows.dense(np.float32) / unit.astype(np.float32)


def spread(x: Tensor) -> Tensor:
    """Return the standard deviation of each dimension [d_model], none of them next to nothing."""
    found = x.float().std(0)
    return found.clamp(min=1e-3 * float(found.mean()) + 1e-12)
