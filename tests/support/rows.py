"""Rows drawn from stated relations, and how far two results are apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

D_X, D_Y, N = 8, 10, 1500
SHAPES = {"N<d": (12, 20, 17), "N=d": (16, 16, 16), "N>d": (60, 14, 18)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, d_x: int, d_y: int, *, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows with means far from zero, y linear in x up to noise; float32, as profiles come."""
    x = normal(n, d_x, seed=seed) * (0.5 + normal(d_x, seed=seed + 1).abs()) + 2 * normal(d_x, seed=seed + 2)
    y = x @ normal(d_x, d_y, seed=seed + 3) / d_x**0.5 + noise * normal(n, d_y, seed=seed + 4) + 3
    return x.float(), y.float()


def planted(*, curved: bool, noise: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows y of x, off-centre and of unequal scales: x A, and if curved a wave of another direction."""
    x = normal(N, D_X, seed=seed)
    y = x @ normal(D_X, D_Y, seed=seed + 1) / D_X**0.5 + noise * normal(N, D_Y, seed=seed + 2)
    if curved:
        y = y + torch.tanh(2 * x @ normal(D_X, D_Y, seed=seed + 3)) * x[:, :1]
    x = x * torch.logspace(-1, 2, D_X) + 30
    return x.float(), (y * torch.logspace(1, -1, D_Y) - 7).float()


def rank_of_condition(n: int, d: int, condition: float, seed: int = 0) -> Tensor:
    """Rows of full rank with singular values from 1 down to 1 / condition, float64."""
    k = min(n, d)
    u, v = (torch.linalg.qr(normal(size, k, seed=seed + i)).Q for i, size in enumerate((n, d)))
    return (u * torch.logspace(0, -np.log10(condition), k, dtype=torch.float64)) @ v.T


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())
