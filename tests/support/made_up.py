"""Made-up profiles of two models whose relation is known, and adapters for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter, Intervention
from commandv.models.identity import ModelRef
from commandv.profiles.profile import END, Profile
from commandv.transfer.convert.fitters import Pinv, ReducedRank
from commandv.transfer.convert.table import FITTERS
from rows import normal

N, D_DONOR, D_RECIPIENT, LATENT, RANK = 80, 10, 14, 6, 3
DONOR, RECIPIENT = ModelRef("donor", "d1", D_DONOR, 6), ModelRef("recipient", "r1", D_RECIPIENT, 9)
FIT = [pytest.param(cls(), id=name) for name, cls in FITTERS.items()] + [
    pytest.param(Pinv(exact=True), id="pinv-exact"),
    pytest.param(ReducedRank(2), id="reduced-rank-2"),
]


def end_keys(n: int) -> np.ndarray:
    return np.stack([np.arange(n), np.full(n, END)], 1)


def profile_of(layers: dict[int, Tensor], ref: ModelRef, keys: np.ndarray | None = None, prompts: str = "p") -> Profile:
    layers = {layer: rows.float() for layer, rows in layers.items()}
    n, d = next(iter(layers.values())).shape
    return Profile(layers, end_keys(n) if keys is None else keys, replace(ref, d_model=d), prompts)


def both(n: int = N, *, noise: float = 0.05, latent: int = LATENT, keys: np.ndarray | None = None):
    """Two models that see the same few things, each in its own basis, off-centre and with noise of its own."""
    found = []
    for ref, seed in ((DONOR, 100), (RECIPIENT, 200)):
        layers = {}
        for layer in range(ref.n_layers):
            seen = normal(n, latent, seed=1)
            own = 2 * normal(ref.d_model, seed=seed + layer) + noise * normal(n, ref.d_model, seed=seed + 50 + layer)
            layers[layer] = seen @ normal(latent, ref.d_model, seed=seed + 20 + layer) + own
        found.append(profile_of(layers, ref, keys))
    return tuple(found)


def intervention(seed: int = 0, *, activation: str = "linear", d: int = D_DONOR, rank: int = RANK) -> Intervention:
    read, bias, write = normal(rank, d, seed=seed), normal(rank, seed=seed + 1), normal(rank, d, seed=seed + 2)
    return Intervention(read.float(), bias.float(), write.float(), activation)


def adapter_of(*layers: int, activation: str = "linear", ref: ModelRef = DONOR) -> Adapter:
    made = {layer: (intervention(10 * layer, activation=activation, d=ref.d_model),) for layer in layers}
    return Adapter(made, ref, "test")


def same_tensors(a: Adapter, b: Adapter) -> bool:
    return a.layers == b.layers and all(
        torch.equal(mine, other)
        for layer in a.layers
        for one, two in zip(a.interventions[layer], b.interventions[layer], strict=True)
        for mine, other in zip(one.tensors().values(), two.tensors().values(), strict=True)
    )
