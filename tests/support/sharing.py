"""Something of each kind to share, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import command_line
import commandv as cv
import foreign
import local_hub
import tiny

hub, run, seed = local_hub.hub, command_line.run, foreign.seed


@pytest.fixture
def adapter(lm):
    provenance = {"made_by": "train", "settings": {"seed": 0}}
    return replace(tiny.random_adapter(lm, layers=(1, 3)), name="lists", provenance=provenance)


@pytest.fixture
def profile(lm):
    return cv.profile(lm, ["How are you?", "What is tea?", "Name a river."], text=None)


def upload(hub, name: str, folder: Path, kind: str = "model", **how) -> local_hub.Repo:
    repo = hub.repo(name, kind, **how)
    repo.commit({one.name: one.read_bytes() for one in folder.iterdir()})
    return repo


def same(one: cv.Adapter, other: cv.Adapter) -> bool:
    h = torch.randn(3, one.d_model)
    return one.layers == other.layers and all(
        torch.equal(foreign.delta(one, layer, h), foreign.delta(other, layer, h)) for layer in one.layers
    )


def head(repo: local_hub.Repo) -> dict:
    return yaml.safe_load(repo.files()["README.md"].decode().split("---\n")[1])
