"""Saving and loading lose nothing: what else is there stays, and a write that fails leaves the earlier adapter."""

from __future__ import annotations

import dataclasses
import errno
import functools
import shutil
from pathlib import Path

import pytest
import torch

import commandv as cv
import stored
from commandv.adapters.adapter import Adapter
from commandv.adapters.kinds import steering_vector
from commandv.errors import FormatError, InputError, StorageError
from commandv.models.identity import ModelRef
from limits import file_size_limit
from stored import REF, adapter_of, assert_same, constructed, data_file, edit

saved = stored.saved


def contents(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"},
        {"config.json": '{"format": "commandv-profile", "format_version": 1}', "keys.safetensors": "rows"},
        {"config.json": "not json"},
        {"config.json": "[]"},
    ],
    ids=["notes", "a model", "a profile", "damaged", "a list"],
)
def test_saving_over_something_else_is_refused_and_keeps_it(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(FormatError, match="choose another place"):
        cv.save(adapter_of(*constructed("direft")), tmp_path)
    assert contents(tmp_path) == before


def test_saving_over_an_adapter_with_other_files_beside_it_keeps_them(saved):
    (saved / "README.md").write_text("my notes")
    before = contents(saved)
    with pytest.raises(FormatError, match=r"README\.md"):
        cv.save(adapter_of(*constructed("direft")), saved)
    assert contents(saved) == before


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FormatError, match="choose another place"):
        cv.save(adapter_of(*constructed("direft")), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_into_an_empty_directory_works(tmp_path):
    adapter = adapter_of(*constructed("direft"))
    assert_same(cv.load_adapter(cv.save(adapter, tmp_path)), adapter)


def test_full_disk_leaves_the_earlier_adapter(saved, monkeypatch):
    before = contents(saved)

    def full(path, data):
        with path.open("wb") as file:
            file.write(data[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"No space left.*Free some space"):
        cv.save(adapter_of(*constructed("ablation")), saved)
    assert contents(saved.parent) == {f"adapter/{name}": data for name, data in before.items()}
    with pytest.raises(StorageError, match=r"No space left"):
        cv.save(adapter_of(*constructed("ablation")), saved.parent / "another")
    assert [one.name for one in saved.parent.iterdir()] == ["adapter"]


def test_a_changed_byte_is_noticed(saved):
    file = data_file(saved)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"tensors-\w+\.safetensors: damaged: its content has changed.*copy it again"):
        cv.load_adapter(saved)


@pytest.mark.parametrize("name", ["../adapter/tensors-{0}.safetensors", "other-{0}.safetensors", "tensors.safetensors"])
def test_a_data_file_of_another_name_is_not_opened(name, saved):
    edit(saved, lambda c: c["files"]["tensors"].update(file=name.format(c["files"]["tensors"]["sha256"][:12])))
    with pytest.raises(FormatError, match="is not the name of its data file"):
        cv.load_adapter(saved)


def test_write_error_of_the_operating_system_leaves_the_earlier_adapter(saved):
    """A real failing write, in the middle of the weights."""
    before = contents(saved)
    big = ModelRef(d_model=4096)
    with file_size_limit(8192), pytest.raises(StorageError, match="Free some space"):
        cv.save(Adapter({0: steering_vector(torch.ones(4096))}, big), saved)
    assert contents(saved.parent) == {f"adapter/{name}": data for name, data in before.items()}


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        cv.save(adapter_of(*constructed("direft")), tmp_path / "file" / "adapter")


def test_a_copied_adapter_is_the_same(saved, tmp_path):
    assert_same(cv.load_adapter(shutil.copytree(saved, tmp_path / "copy")), cv.load_adapter(saved))


def test_provenance_that_json_cannot_hold(tmp_path):
    with pytest.raises(FormatError, match="provenance of n is not plain JSON"):
        cv.save(Adapter({0: constructed("direft")}, REF, "n", {"made_by": object()}), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    for unnamed in ({1: 2}, None):
        with pytest.raises(InputError, match=r"provenance is .*, expected Mapping of str, Any"):
            Adapter({0: constructed("direft")}, REF, "n", unnamed)
    adapter = Adapter({0: constructed("direft")}, REF, "n", {"loss": [1.5, float("nan")]})
    assert cv.load_adapter(cv.save(adapter, tmp_path / "a")).provenance == {"loss": [1.5, None]}


@pytest.mark.parametrize("facts", [{"seed": 10**30}, {"deep": functools.reduce(lambda a, _: [a], range(99), 1)}])
def test_what_could_not_be_read_again_is_not_written_and_replaces_nothing(facts, saved):
    earlier = cv.load_adapter(saved)
    with pytest.raises(FormatError, match="nothing is written"):
        cv.save(dataclasses.replace(earlier, provenance=facts), saved)
    assert_same(cv.load_adapter(saved), earlier)


def test_a_configuration_larger_than_is_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("commandv.storage.directories.MOST_CONFIG", 1000)
    with pytest.raises(FormatError, match="at most 1000 are read again"):
        cv.save(Adapter({0: constructed("direft")}, REF, "n", {"log": "x" * 1000}), tmp_path / "a")
    assert not (tmp_path / "a").exists()
