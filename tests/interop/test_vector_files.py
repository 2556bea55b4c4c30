"""Bare vectors in the files of other projects: one, a stack, a dictionary, and what is none of these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import commandv as cv
import foreign
from commandv.errors import FormatError, InputError
from commandv.interop.load import detect
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
    with pytest.raises(InputError, match=r"layer 5 is outside the stack's 0 \.\. 4"):
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
    for suffix, message in [(".pt", "2 tensors"), (".safetensors", "2 tensors"), (".npy", "several arrays")]:
        with pytest.raises(FormatError, match=message):
            cv.load_adapter(tmp_path / f"v{suffix}", layer=0)


def test_arrays_that_are_not_floating_point(tmp_path):
    np.save(tmp_path / "v.npy", np.arange(4))
    torch.save({"note": "nothing"}, tmp_path / "none.pt")
    torch.save("text", tmp_path / "text.pt")
    for name, message in [("v.npy", "int64"), ("none.pt", "0 tensors"), ("text.pt", "holds str")]:
        with pytest.raises(FormatError, match=message):
            cv.load_adapter(tmp_path / name, layer=0)


def test_unknown_kinds_of_file_are_named(tmp_path):
    (tmp_path / "v.txt").write_text("1 2 3")
    with pytest.raises(FormatError, match=r"'\.txt'.*\.safetensors"):
        detect(tmp_path / "v.txt")
    with pytest.raises(FormatError, match=r"directory holds v\.txt"):
        detect(tmp_path)
