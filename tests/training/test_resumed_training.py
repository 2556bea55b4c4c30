"""Training that is cut off at any time: it resumes to the same adapter, and refuses other checkpoints."""

from __future__ import annotations

import contextlib

import pytest
import torch
from safetensors.torch import save_file

import commandv as cv
from commandv.errors import FormatError, StorageError
from commandv.training import loop
from commandv.training.train import TRAINABLE, TrainSettings, train
from limits import file_size_limit
from toy import QUICK, assert_identical, examples


@pytest.mark.parametrize("kind", ["direft", "noreft"])
def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(kind, lm, tmp_path, monkeypatch):
    chosen = TRAINABLE[kind](rank=3, positions="l2")
    settings = TrainSettings(epochs=4, batch_size=5, held_out=0.2, learning_rate=1e-2)
    whole = train(lm, examples(20), chosen, settings)
    file = tmp_path / "deep" / "checkpoint"
    original, steps = torch.optim.Adam.step, []

    def cut(self):
        steps.append(1)
        if len(steps) in (6, 14):  # in the second epoch of 4 steps, and in the third after resuming at step 7
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(torch.optim.Adam, "step", cut)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(lm, examples(20), chosen, settings, checkpoint=file)
    resumed = train(lm, examples(20), chosen, settings, checkpoint=file)
    assert len(steps) == 6 + 8 + 8  # the epochs 1-2, 2-3 and 3-4
    assert_identical(resumed, whole)
    assert [one.name for one in file.parent.iterdir()] == ["checkpoint"]
    assert_identical(train(lm, examples(20), chosen, settings, checkpoint=file), whole)
    assert len(steps) == 22  # a finished training is not trained again


@pytest.fixture
def checkpoint(lm, tmp_path):
    """A checkpoint of a short training of `lm`."""
    file = tmp_path / "checkpoint"
    train(lm, examples(12), cv.DiReFT(rank=2), QUICK, checkpoint=file)
    return file


OTHERS = {
    "seed": (12, cv.DiReFT(rank=2), TrainSettings(epochs=2, batch_size=8, held_out=0.25, learning_rate=2e-2, seed=1)),
    "examples": (13, cv.DiReFT(rank=2), QUICK),
    "rank": (12, cv.DiReFT(rank=3), QUICK),
    "kind": (12, cv.NodiReFT(rank=2), QUICK),
    "positions": (12, cv.DiReFT(rank=2, positions="l2"), QUICK),
    "layers": (12, cv.DiReFT(rank=2, layers=[0]), QUICK),
}


@pytest.mark.parametrize("what", OTHERS)
def test_checkpoint_of_another_training_is_refused(what, lm, checkpoint):
    n, kind, settings = OTHERS[what]
    before = checkpoint.read_bytes()
    with pytest.raises(FormatError, match="another training"):
        train(lm, examples(n), kind, settings, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before


def test_checkpoint_of_another_model_is_refused(tiny_lm, checkpoint):
    with pytest.raises(FormatError, match="another training"):
        train(tiny_lm(seed=1), examples(12), cv.DiReFT(rank=2), QUICK, checkpoint=checkpoint)


@pytest.mark.parametrize("data", ["truncated", "empty", "text", "foreign", "directory"])
def test_damaged_checkpoint_is_refused(data, lm, checkpoint):
    whole = checkpoint.read_bytes()
    if data == "foreign":
        save_file({"weights": torch.ones(3)}, checkpoint)
    elif data == "directory":
        checkpoint.unlink()
        checkpoint.mkdir()
    else:
        checkpoint.write_bytes({"truncated": whole[:-10], "empty": b"", "text": b"hello, world, this is text"}[data])
    with pytest.raises(FormatError, match=r"not a checkpoint|a directory, expected a file"):
        train(lm, examples(12), cv.DiReFT(rank=2), QUICK, checkpoint=checkpoint)


def test_full_disk_keeps_the_last_checkpoint(lm, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint"
    settings = TrainSettings(epochs=2, batch_size=16, held_out=0)
    whole = train(lm, examples(12), cv.DiReFT(rank=2), settings)
    original, written = loop.write_bytes, []

    def full_at_the_second(file, data):
        written.append(file)
        with file_size_limit(2048) if len(written) == 2 else contextlib.nullcontext():
            original(file, data)

    monkeypatch.setattr(loop, "write_bytes", full_at_the_second)
    with pytest.raises(StorageError, match="Free some space"):
        train(lm, examples(12), cv.DiReFT(rank=2), settings, checkpoint=file)
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint"]
    assert len(written) == 2
    assert_identical(train(lm, examples(12), cv.DiReFT(rank=2), settings, checkpoint=file), whole)
