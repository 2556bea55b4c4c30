"""Files of other projects, written independently of ours."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from commandv.adapters.adapter import Adapter

D, RANK = 16, 3
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 12345\n"


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Rotation(nn.Module):
    """pyreft's LowRankRotateLayer: a weight [d, r] made orthonormal by torch's parametrisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(D, RANK)))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight


def trained_rotation() -> nn.Module:
    """A parametrised rotation after some optimiser steps, so that it is not its initial value any more."""
    module = nn.utils.parametrizations.orthogonal(Rotation())
    initial = module.weight.detach().clone()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (module.weight * torch.randn(D, RANK)).sum().backward()
        optimizer.step()
    assert (module.weight - initial).abs().max() > 0.1
    return module


class Reft(nn.Module):
    """One ReFT intervention with the forward and the state dict that pyreft gives it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("NoReFT", "NodiReFT"):
            self.proj_layer = nn.Linear(D, RANK)
        else:
            self.rotate_layer = trained_rotation()
        if kind in ("ConsReFT", "LobiReFT"):
            self.learned_source = nn.Parameter(torch.rand(RANK))
        else:
            self.learned_source = nn.Linear(D, RANK)

    def forward(self, h: Tensor) -> Tensor:
        rotation = None if self.kind in ("NoReFT", "NodiReFT") else self.rotate_layer.weight
        if self.kind == "LoReFT":
            return h + (self.learned_source(h) - h @ rotation) @ rotation.T
        if self.kind == "NoReFT":
            return h + (self.learned_source(h) - self.proj_layer(h)) @ self.proj_layer.weight
        if self.kind == "ConsReFT":
            return h + (self.learned_source - h @ rotation) @ rotation.T
        if self.kind == "LobiReFT":
            return h + self.learned_source @ rotation.T
        if self.kind == "DiReFT":
            return h + self.learned_source(h) @ rotation.T
        return h + self.learned_source(h) @ self.proj_layer.weight

    def saved(self) -> OrderedDict[str, Tensor]:
        if self.kind == "LoReFT":
            return OrderedDict(
                weight=self.learned_source.weight.data,
                bias=self.learned_source.bias.data,
                rotate_layer=self.rotate_layer.weight.data,
            )
        dims = {"embed_dim": torch.tensor(D), "interchange_dim": torch.tensor(D)}
        return OrderedDict({**dims, **self.state_dict()})


def key(layer: int, number: int = 0) -> str:
    return f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{number}"


def write_pyreft(path: Path, modules: dict[str, Reft], *, order: list[str] | None = None, **metadata) -> Path:
    """Write a directory as pyreft does; `order` is that of `sorted_keys`, the modules' that of the representations."""
    path.mkdir()
    for name, module in modules.items():
        torch.save(module.saved(), path / f"intkey_{name}.bin")
    layers = [int(name.split("_")[1]) for name in modules]
    classes = [f"<class 'pyreft.interventions.{m.kind.title()}Intervention'>" for m in modules.values()]
    config = {
        "intervention_constant_sources": [True] * len(modules),
        "intervention_dimensions": [None if m.kind == "LoReFT" else D for m in modules.values()],
        "intervention_types": classes,
        "mode": "parallel",
        "representations": [[layer, "block_output", "pos", 1, RANK, *[None] * 9] for layer in layers],
        "sorted_keys": order or list(modules),
        "transformers_version": "4.45.1",
    }
    (path / "config.json").write_text(json.dumps(config))
    if metadata:
        (path / "training_metadata.json").write_text(json.dumps(metadata))
    return path


@pytest.fixture
def pyreft(tmp_path) -> Path:
    return write_pyreft(tmp_path / "a", {key(0): Reft("DiReFT"), key(2): Reft("DiReFT")}, positions="l1")


def weights(path: Path) -> Path:
    return path / f"intkey_{key(2)}.bin"


def delta(adapter: Adapter, layer: int, h: Tensor) -> Tensor:
    return sum(one.delta(h) for one in adapter.interventions[layer])
