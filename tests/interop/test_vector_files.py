"""Bare vectors in the files of other projects: one, a stack, a dictionary, and what is none of these."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import commandv as cv
import foreign
import tiny
from commandv.errors import FormatError, InputError, MismatchError
from commandv.interop.detect import detect
from foreign import LFS_POINTER, D, delta

seed = foreign.seed


def write_vector(path: Path, value: Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, value.numpy())
    elif path.suffix == ".safetensors":
        save_file({"v": value}, path)
    else:
        torch.save(value, path)
    return path


SUFFIXES = [".pt", ".bin", ".npy", ".safetensors"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_vector_needs_a_layer(suffix, tmp_path):
    value = torch.randn(D)
    path = write_vector(tmp_path / f"happy{suffix}", value)
    adapter = cv.load_adapter(path, layer=7)
    assert (adapter.layers, adapter.name, adapter.d_model) == ([7], "happy", D)
    assert [one.positions.everywhere for one in adapter.interventions[7]] == [True]
    assert torch.equal(delta(adapter, 7, torch.randn(3, D)), value.expand(3, D))
    with pytest.raises(InputError, match="layer="):
        cv.load_adapter(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_stack_acts_on_its_own_layers(suffix, tmp_path):
    stack = torch.randn(5, D)
    stack[2] = 0
    path = write_vector(tmp_path / f"stack{suffix}", stack)
    adapter = cv.load_adapter(path)
    assert adapter.layers == [0, 1, 3, 4]
    assert adapter.model.n_layers == 5
    for layer in adapter.layers:
        assert torch.equal(delta(adapter, layer, torch.zeros(D)), stack[layer])
    one = cv.load_adapter(path, layer=3)
    assert one.layers == [3]
    assert torch.equal(delta(one, 3, torch.zeros(D)), stack[3])
    with pytest.raises(InputError, match=r"no vector at layer 5; the layers are 0 \.\. 4"):
        cv.load_adapter(path, layer=5)


def test_dictionary_tells_layer_and_model(tmp_path):
    path = tmp_path / "d.pt"
    torch.save({"vector": torch.ones(D), "layer": 4, "base_model": "some/model", "note": "n"}, path)
    adapter = cv.load_adapter(path)
    assert (adapter.layers, adapter.model.id) == ([4], "some/model")
    assert adapter.provenance["metadata"] == {"layer": 4, "base_model": "some/model", "note": "n"}
    assert cv.load_adapter(path, layer=1).layers == [1]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 3, 4), r"\(2, 3, 4\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.zeros(0), r"\(0,\)"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinity"),
        (torch.tensor([1.0, float("inf")]), "NaN or infinity"),
    ],
)
def test_not_a_vector(suffix, value, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        cv.load_adapter(write_vector(tmp_path / f"v{suffix}", value), layer=0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_vector_files_that_are_not_whole(suffix, tmp_path):
    path = write_vector(tmp_path / f"v{suffix}", torch.randn(D))
    whole = path.read_bytes()
    for data, message in [
        (LFS_POINTER, "git lfs pull"),
        (b"", "empty"),
        (whole[:40], "truncated|not a plain|refused"),
        (whole[:-5], "truncated|not a plain"),
        (b"<html>404</html>", "truncated|not a plain|refused"),
    ]:
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            cv.load_adapter(path, layer=0)
    path.unlink()
    with pytest.raises(FormatError, match="no such file"):
        cv.load_adapter(path, layer=0)


def test_more_than_one_tensor(tmp_path):
    torch.save({"a": torch.ones(D), "b": torch.ones(D)}, tmp_path / "v.pt")
    save_file({"a": torch.ones(D), "b": torch.ones(D)}, tmp_path / "v.safetensors")
    with (tmp_path / "v.npy").open("wb") as file:
        np.savez(file, a=np.ones(D), b=np.ones(D))
    for suffix, message in [(".pt", "'a' among several"), (".safetensors", "'a' among"), (".npy", "'a' among")]:
        with pytest.raises(FormatError, match=message):
            cv.load_adapter(tmp_path / f"v{suffix}", layer=0)


def test_arrays_that_are_not_floating_point(tmp_path):
    np.save(tmp_path / "v.npy", np.arange(4))
    torch.save({"note": "nothing"}, tmp_path / "none.pt")
    torch.save("text", tmp_path / "text.pt")
    for name, message in [("v.npy", "int64"), ("none.pt", "no tensors"), ("text.pt", "holds str")]:
        with pytest.raises(FormatError, match=message):
            cv.load_adapter(tmp_path / name, layer=0)


def test_unknown_kinds_of_file_are_named(tmp_path):
    (tmp_path / "v.txt").write_text("1 2 3")
    with pytest.raises(FormatError, match=r"'\.txt'.*\.safetensors"):
        detect(tmp_path / "v.txt")
    with pytest.raises(FormatError, match=r"directory holds v\.txt"):
        detect(tmp_path)


# -- layouts ----------------------------------------------------------------------------------------------------------


def saved(path: Path, value) -> Path:
    torch.save(value, path)
    return path


V, W = torch.linspace(1, 2, D), torch.linspace(-3, 3, D)


def acts(adapter, expected: dict[int, Tensor]) -> None:
    assert adapter.layers == sorted(expected)
    for layer, vector in expected.items():
        torch.testing.assert_close(delta(adapter, layer, torch.zeros(D)), vector)


LAYOUTS = {
    "by number": {1: V, 3: W},
    "by number as text": {"1": V, "3": W},
    "by name": {"layer_1": V, "layer_3": W},
    "by module": {"model.layers.1": V, "model.layers.3": W},
    "by an older module": {"transformer.h.1": V[None], "transformer.h.3": W[None]},
    "by hook": {"blocks.1.hook_resid_post": V, "blocks.4.hook_resid_pre": W},
    "under a name": {"directions": {1: V, 3: W}, "note": "n"},
    "lm-eval's": {
        "layers.1": {"steering_vector": V / 2, "steering_coefficient": 2.0, "action": "add", "bias": None},
        "layers.3": {"steering_vector": W[None], "steering_coefficient": 1.0, "action": "add"},
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_vectors_by_layer(name, tmp_path):
    path = saved(tmp_path / "v.pt", LAYOUTS[name])
    acts(cv.load_adapter(path), {1: V, 3: W})
    acts(cv.load_adapter(path, layer=3), {3: W})
    with pytest.raises(InputError, match="no vector at layer 2; the layers are 1, 3"):
        cv.load_adapter(path, layer=2)


def test_vectors_by_layer_in_other_files(tmp_path):
    save_file({"layer_1": V, "layer_3": W}, tmp_path / "v.safetensors")
    np.savez_compressed(tmp_path / "v.npz", layer_1=V.numpy(), layer_3=W.numpy().astype(">f8"))
    directions = {"1": V.tolist(), "3": W.tolist()}
    (tmp_path / "v.svec").write_text(json.dumps({"model_type": "llama", "directions": directions}))
    for suffix in (".safetensors", ".npz", ".svec"):
        acts(cv.load_adapter(tmp_path / f"v{suffix}"), {1: V, 3: W})


def test_stacks_with_axes_of_one(tmp_path):
    stack = torch.stack([V, W])
    for value in (stack[:, None], stack[None], [V, W], [V[None], W[None]], {"vectors": stack}):
        acts(cv.load_adapter(saved(tmp_path / "v.pt", value)), {0: V, 1: W})
    for value in (V[None], V[None, None], [V]):
        acts(cv.load_adapter(saved(tmp_path / "v.pt", value), layer=2), {2: V})


@pytest.mark.parametrize(
    "facts",
    [{"layer": 2}, {"layer": "2"}, {"layer": torch.tensor(2)}, {"layer": "layer_2"}, {"layer_idx": 2},
     {"hook_name": "blocks.2.hook_resid_post"}, {"hook_point": "blocks.3.hook_resid_pre"},
     {"hook_point": "model.layers.2"}],
)  # fmt: skip
def test_a_vector_whose_layer_the_file_says(facts, tmp_path):
    acts(cv.load_adapter(saved(tmp_path / "v.pt", {"vector": V, **facts})), {2: V})


def test_metadata_of_safetensors_is_read(tmp_path):
    save_file({"v": V}, tmp_path / "v.safetensors", metadata={"layer": "2", "base_model": "some/model"})
    adapter = cv.load_adapter(tmp_path / "v.safetensors")
    acts(adapter, {2: V})
    assert adapter.model.id == "some/model"


def test_a_stack_that_begins_with_the_embeddings(tmp_path):
    lm = tiny.tiny_lm()
    rows = torch.randn(lm.n_layers + 1, lm.d_model)
    path = saved(tmp_path / "v.pt", rows)
    with pytest.raises(MismatchError, match="convention='hidden-states'"):
        cv.attach(lm, cv.load_adapter(path))
    adapter = cv.load_adapter(path, convention="hidden-states")
    assert adapter.provenance["convention"] == "hidden-states"
    with cv.attach(lm, adapter):
        pass
    for layer in range(lm.n_layers):
        assert torch.equal(delta(adapter, layer, torch.zeros(lm.d_model)), rows[layer + 1])
    one = cv.load_adapter(path, layer=3, convention="hidden-states")
    assert torch.equal(delta(one, 3, torch.zeros(lm.d_model)), rows[4])


REFUSED = {
    "complex": (torch.ones(D, dtype=torch.complex64), "complex64"),
    "whole numbers": (torch.ones(2, D, dtype=torch.int64), "int64"),
    "beyond float32": (torch.full((D,), 1e300, dtype=torch.float64), "beyond"),
    "what overflows": (torch.full((D,), 1e30), "beyond"),
    "nothing": (torch.zeros(2, D), "zero"),
    "a factor": ({"vector": V, "layer": 1, "coefficient": 4.0}, "coefficient = '4.0', and not whether"),
    "a projection": ({"vector": V, "layer": 1, "action": "project"}, "action = 'project'"),
    "lm-eval's clamp": ({"layers.1": {"steering_vector": V, "action": "clamp"}}, "clamp"),
    "a layer that is none": ({"vector": V, "layer": "last"}, "'last'"),
    "a layer beyond all models": ({"vector": V, "layer": 10**12}, "is no layer"),
    "several names": ({"happy": V, "sad": W}, "'happy' among several tensors names no layer"),
    "one layer twice": ({12: V, "12": W}, "12 and 12 are one layer"),
    "one layer by two names": (
        {"blocks.5.hook_resid_post": V, "blocks.6.hook_resid_pre": W},
        r"blocks.5.hook_resid_post and blocks.6.hook_resid_pre are one layer",
    ),
    "layers of a stack": ({"vectors": [V, W], "layers": [3, 7]}, r"layers = \[3, 7\] beside a stack"),
    "two widths": ({1: V, 2: torch.ones(D + 1)}, "widths"),
    "a list of many shapes": ([V, torch.ones(2, D)], "different shapes"),
    "a list of texts": (["a"], "list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_cut_down_or_guessed_is_refused(name, tmp_path):
    value, message = REFUSED[name]
    with pytest.raises((FormatError, InputError), match=message):
        cv.load_adapter(
            saved(tmp_path / "v.pt", value), layer=0 if isinstance(value, Tensor) and value.ndim == 1 else None
        )


def test_conventions_of_other_files_are_named(tmp_path):
    with pytest.raises(InputError, match="expected 'blocks' or 'hidden-states'"):
        cv.load_adapter(saved(tmp_path / "v.pt", V), layer=0, convention="llama.cpp")
