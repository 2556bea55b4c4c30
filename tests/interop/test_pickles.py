"""Files that would run code: refused, and nothing in them is ever run."""

from __future__ import annotations

import io
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import commandv as cv
import foreign
from commandv.errors import FormatError
from commandv.storage.tensors import read_torch
from foreign import D, weights

seed, pyreft = foreign.seed, foreign.pyreft


class Touch:
    """Unpickling an instance creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("as_zip", [True, False])
def test_pickle_with_code_is_refused_and_not_run(as_zip, pyreft, tmp_path):
    evidence = tmp_path / "touched"
    vector = tmp_path / "vector.pt"
    for file in (weights(pyreft), vector):
        torch.save({"bias": torch.ones(D), "x": Touch(evidence)}, file, _use_new_zipfile_serialization=as_zip)
    for source in (pyreft, vector):
        with pytest.raises(FormatError, match="could run code, so it is refused"):
            cv.load_adapter(source, layer=0)
    assert not evidence.exists()
    torch.load(vector, weights_only=False)["x"].close()  # the file would have done it
    assert evidence.exists()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".npy"])
def test_bare_pickle_with_code_is_refused_and_not_run(suffix, tmp_path):
    evidence, file = tmp_path / "touched", (tmp_path / "vector").with_suffix(suffix)
    file.write_bytes(pickle.dumps(Touch(evidence)))
    with pytest.raises(FormatError, match="refused"):
        cv.load_adapter(file, layer=0)
    assert not evidence.exists()


def test_pickled_numpy_array_is_refused_and_not_run(tmp_path):
    evidence, file = tmp_path / "touched", tmp_path / "vector.npy"
    np.save(file, np.array([Touch(evidence)], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match="pickled arrays are refused"):
        cv.load_adapter(file, layer=0)
    assert not evidence.exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_damaged_torch_files_never_raise_anything_else(as_zip, tmp_path):
    """Cut at many places, and with bytes changed at random."""
    buffer = io.BytesIO()
    torch.save({"v": torch.arange(9.0), "layer": 3}, buffer, _use_new_zipfile_serialization=as_zip)
    whole, rng = buffer.getvalue(), random.Random(0)
    cases = [whole[:n] for n in range(1, len(whole), 7)]
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(3):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        cases.append(bytes(changed))
    file = tmp_path / "v.pt"
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases:
            file.write_bytes(case)
            try:
                read_torch(file)
            except FormatError:
                refused += 1
    assert refused > len(whole) // 7
