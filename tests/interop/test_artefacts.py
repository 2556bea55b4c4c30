"""Artefacts found in the wild, read as their authors' formulas say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import commandv as cv
import foreign
from commandv.cli.inspection import describe
from commandv.errors import FormatError
from commandv.interop.detect import detect
from foreign import delta, key
from places import SHARED

seed = foreign.seed
ARTEFACTS = SHARED / "artefacts"


def artefact(name: str) -> Path:
    if not (ARTEFACTS / name).exists():
        pytest.skip(f"{ARTEFACTS / name} is not on this machine")
    return ARTEFACTS / name


@pytest.mark.parametrize(
    ("layer", "norm", "total"),
    [(0, 15.174999, 0.949243), (12, 7.422094, -8.163046), (26, 18.959070, 22.714918)],
)
def test_published_adapter_gives_its_golden_figures(layer, norm, total):
    adapter = cv.load_adapter(artefact("commandv_anti_jailbreak_Llama-3.2-3B-Instruct"))
    got = delta(adapter, layer, torch.ones(3072))
    assert float(got.norm()) == pytest.approx(norm, abs=2e-5)
    assert float(got.sum()) == pytest.approx(total, abs=2e-4)


@pytest.mark.parametrize(
    ("name", "model", "d_model", "n_layers"),
    [
        ("commandv_anti_jailbreak_Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", 3072, 28),
        ("commandv_cot_reasoning_Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct", 2048, 36),
    ],
)
def test_published_adapters_act_on_every_other_layer(name, model, d_model, n_layers):
    path = artefact(name)
    adapter = cv.load_adapter(path)
    assert adapter.layers == list(range(0, n_layers, 2))
    assert (adapter.model.id, adapter.d_model) == (model, d_model)
    h = torch.randn(2, d_model)
    for layer in adapter.layers:
        tensors = torch.load(path / f"intkey_{key(layer)}.bin", weights_only=True)
        w1, b, w2 = (tensors[k].float() for k in ("learned_source.weight", "learned_source.bias", "proj_layer.weight"))
        torch.testing.assert_close(delta(adapter, layer, h), (h @ w1.T + b) @ w2)
        assert [str(one.positions) for one in adapter.interventions[layer]] == ["l1"]


def test_easysteer_loreft():
    path = artefact("easysteer_loreft")
    adapter = cv.load_adapter(path)
    assert (adapter.layers, adapter.d_model) == ([8], 1536)
    tensors = torch.load(path / f"intkey_{key(8)}.bin", weights_only=True)
    weight, bias, rotation = (tensors[k].float() for k in ("weight", "bias", "rotate_layer"))
    h = torch.randn(3, 1536)
    expected = (h @ weight.T + bias - h @ rotation) @ rotation.T
    torch.testing.assert_close(delta(adapter, 8, h), expected, rtol=1e-4, atol=1e-4)


def test_easysteer_bias_only():
    path = artefact("easysteer_ssv")
    adapter = cv.load_adapter(path)
    bias = torch.load(path / f"intkey_{key(8)}.bin", weights_only=True)["bias"]
    assert torch.equal(delta(adapter, 8, torch.randn(2, 1536)), bias.expand(2, -1))


@pytest.mark.parametrize(
    ("name", "layer", "layers", "d_model"),
    [
        ("easysteer_vectors/vec_ep20_layer15.pt", 15, [15], 4096),
        ("easysteer_vectors/task_vector_layer-10.npy", 10, [10], 4096),
        ("easysteer_vectors/task_vector_layer-10.pt", 10, [10], 4096),
        ("hidden_directions/qwen3-4b_v_refusal.pt", None, list(range(36)), 2560),
        ("hidden_directions/advocate_bias.pt", None, [17], 3584),
    ],
)
def test_vectors_from_the_wild(name, layer, layers, d_model):
    path = artefact(name)
    adapter = cv.load_adapter(path, layer=layer)
    assert (adapter.layers, adapter.d_model) == (layers, d_model)
    loaded = np.load(path) if path.suffix == ".npy" else torch.load(path, weights_only=True)
    stack = torch.as_tensor(loaded["bias"] if isinstance(loaded, dict) else loaded).float().reshape(-1, d_model)
    for at, expected in zip(layers, stack, strict=True):
        assert torch.equal(delta(adapter, at, torch.zeros(d_model)), expected)


def test_twins_in_two_formats_are_the_same_vector():
    one, two = (
        delta(cv.load_adapter(artefact(f"easysteer_vectors/task_vector_layer-10{s}"), layer=10), 10, torch.zeros(4096))
        for s in (".npy", ".pt")
    )
    assert torch.equal(one, two)


def test_metadata_of_the_dictionary_artefact_names_its_model():
    adapter = cv.load_adapter(artefact("hidden_directions/advocate_bias.pt"))
    assert adapter.model.id == "Qwen/Qwen2.5-7B-Instruct"
    assert adapter.provenance["metadata"]["components"] == ["pref", "refusal"]


def test_everything_readable_in_the_wild_is_described_and_saves_as_ours(tmp_path):
    names = [one.name for one in artefact("").iterdir() if one.is_dir() and detect_or_none(one) == "pyreft"]
    assert len(names) == 4
    for name in names:
        facts = describe(str(ARTEFACTS / name))
        assert facts["what"] == "pyreft"
        assert len(facts["interventions"]) == len(facts["layers"])
        json.dumps(facts)
        again = cv.load_adapter(cv.save(cv.load_adapter(ARTEFACTS / name), tmp_path / name))
        assert again.layers == facts["layers"]


def detect_or_none(path: Path) -> str | None:
    try:
        return detect(path)
    except FormatError:
        return None
