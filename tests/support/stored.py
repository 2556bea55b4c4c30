"""Artefacts on disk for the tests to damage."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import commandv as cv
from commandv.adapters.adapter import Adapter, Intervention
from commandv.adapters.kinds import KINDS, ablation, steering_vector
from commandv.models.identity import ModelRef

D, RANK = 12, 3
REF = ModelRef("some/model", "abc", D, 5, "cafe")
CONSTRUCTORS = {
    **{name: kind.build for name, kind in KINDS.items()},
    "steering_vector": steering_vector,
    "ablation": ablation,
}


def constructed(kind: str, activation: str = "linear") -> tuple[Intervention, ...]:
    """Call a kind's constructor with random arguments of the shapes that its parameters' names stand for."""
    g = torch.Generator().manual_seed(len(kind))
    shapes = {
        "weight": (RANK, D),
        "bias": (RANK,),
        "source_weight": (RANK, D),
        "source_bias": (RANK,),
        "proj_weight": (RANK, D),
        "proj_bias": (RANK,),
        "vector": (D,),
        "directions": (2, D),
    }
    build = CONSTRUCTORS[kind]
    given = {}
    for name in inspect.signature(build).parameters:
        if name == "rotation":
            given[name] = torch.linalg.qr(torch.randn(D, RANK, generator=g)).Q
        elif name == "activation":
            given[name] = activation
        elif name == "strength":
            given[name] = -1.5
        else:
            given[name] = torch.randn(shapes[name], generator=g)
    return build(**given)


def adapter_of(*interventions: Intervention, ref: ModelRef = REF) -> Adapter:
    return Adapter({2: interventions}, ref, "name of it", {"made_by": "hand", "seed": 3, "share": 0.1})


def assert_same(one: Adapter, two: Adapter) -> None:
    assert (one.model, one.name, dict(one.provenance)) == (two.model, two.name, dict(two.provenance))
    assert one.layers == two.layers
    for layer in one.layers:
        for a, b in zip(one.interventions[layer], two.interventions[layer], strict=True):
            assert (a.activation, a.positions) == (b.activation, b.positions)
            for part in ("read", "bias", "write"):
                assert torch.equal(getattr(a, part), getattr(b, part)), part


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved adapter of two layers for the tests to damage."""
    two = {0: constructed("direft"), 4: (*constructed("loreft", "relu"), *constructed("steering_vector"))}
    return cv.save(Adapter(two, REF), tmp_path / "adapter")


def edit(path: Path, change) -> None:
    """Apply `change` to the parsed configuration and write it back."""
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def data_file(path: Path, part: str = "tensors") -> Path:
    """Return the data file of a part."""
    (file,) = path.glob(f"{part}-*.safetensors")
    return file


def replace_part(path: Path, tensors, part: str = "tensors") -> None:
    """Put other tensors in the place of a part's, and their name, hash and size into the configuration."""
    data = save(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / config["files"][part]["file"]).unlink()
    name = f"{part}-{sha256[:12]}.safetensors"
    (path / name).write_bytes(data)
    config["files"][part] = {"file": name, "sha256": sha256, "size": len(data)}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
