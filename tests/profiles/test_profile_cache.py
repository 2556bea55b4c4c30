"""Profiles on disk: found again in the cache, at a path of one's own, and resumed where a run was cut off."""

from __future__ import annotations

import concurrent.futures
import errno
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import commandv as cv
import tiny
from commandv.errors import FormatError, MismatchError, StorageError
from commandv.profiles import work
from commandv.prompts.sets import Prompt, PromptSet
from profiled import PROMPTS, TEXT, same
from stored import data_file


@pytest.fixture(scope="module")
def many():
    """Prompts for more than one part on disk."""
    return PromptSet(tuple(Prompt(f"{text} {n}") for n in range(6) for text in PROMPTS), "many")


def test_the_second_time_comes_from_the_cache(lm, cache, monkeypatch):
    first = cv.profile(lm, PROMPTS, text=TEXT)
    monkeypatch.setattr(work, "read_rows", None)  # running the model would fail
    again = cv.profile(lm, PROMPTS, text=TEXT, batch_size=2, padding="left")
    assert again.path == first.path
    assert again.path.is_relative_to(cache)
    same(first, again)
    same(first, cv.load_profile(first.path))
    assert cv.load_profile(first.path).model == lm.ref
    assert not list(cache.rglob("*.parts"))


def test_what_changes_the_profile_changes_the_place():
    paths = [
        cv.profile(tiny.tiny_lm(), PROMPTS, text=None).path,
        cv.profile(tiny.tiny_lm(seed=1), PROMPTS, text=None).path,
        cv.profile(tiny.tiny_lm(dtype=torch.bfloat16), PROMPTS, text=None).path,
        cv.profile(tiny.tiny_lm(chat=True), PROMPTS, text=None).path,
        cv.profile(tiny.tiny_lm(), PROMPTS[::-1], text=None).path,
        cv.profile(tiny.tiny_lm(), PROMPTS, text=TEXT).path,
        cv.profile(tiny.tiny_lm(), PROMPTS, text=TEXT, rows_per_text=2).path,
        cv.profile(tiny.tiny_lm(), PROMPTS, max_length=24, text=None).path,
    ]
    assert len(set(paths)) == len(paths)


def test_a_path_of_ones_own(lm, tmp_path):
    target = tmp_path / "mine"
    first = cv.profile(lm, PROMPTS, cache=target, text=None)
    assert first.path == target
    for other, options in (
        (tiny.tiny_lm(seed=1), {}),
        (lm, {"prompts": PROMPTS[:3]}),
        (lm, {"text": TEXT}),
        (lm, {"max_length": 24}),
        (tiny.tiny_lm(chat=True), {}),
    ):
        with pytest.raises(MismatchError, match="choose another path or delete it"):
            cv.profile(other, **{"prompts": PROMPTS, "text": None, "cache": target, **options})
    same(cv.load_profile(target), first)


def test_save_and_load(lm, tmp_path):
    one = cv.profile(lm, PROMPTS, text=TEXT, cache=False)
    cv.save_profile(one, tmp_path / "mine")
    again = cv.load_profile(tmp_path / "mine")
    assert np.array_equal(one.keys, again.keys)
    assert (one.model, one.prompts) == (again.model, again.prompts)
    for layer in range(tiny.LAYERS):
        assert torch.equal(one.layer(layer), again.layer(layer))


class Killed(BaseException):
    pass


def _watched(monkeypatch, batches=None):
    """Let `read_rows` run so many batches and then be killed; return the list of batch sizes it sees."""
    real, seen = work.read_rows, []

    def read_rows(lm, batch, at, prefix):
        if len(seen) == batches:
            raise Killed
        seen.append(len(batch.input_ids))
        return real(lm, batch, at, prefix)

    monkeypatch.setattr(work, "read_rows", read_rows)
    return seen


def test_a_killed_run_resumes_at_the_last_complete_part(lm, many, cache, monkeypatch):
    expected = cv.profile(lm, many, text=TEXT, batch_size=2, cache=False)
    _killed(lm, many, text=TEXT)
    assert not list(cache.rglob("config.json"))
    with monkeypatch.context() as patch:
        seen = _watched(patch)
        resumed = cv.profile(lm, many, text=TEXT, batch_size=2)
    assert len(seen) == 20 - work.Work.BATCHES
    same(resumed, expected)
    assert not list(cache.rglob("*.parts"))


def test_a_part_cut_short_is_made_again(lm, many, cache):
    _killed(lm, many)
    (part,) = cache.rglob("part-*.safetensors")
    part.write_bytes(part.read_bytes()[:-100])
    same(cv.profile(lm, many, batch_size=2, text=None), cv.profile(lm, many, cache=False, text=None))


def test_parts_of_another_model_are_not_reused(many, tmp_path):
    target = tmp_path / "mine"
    _killed(tiny.tiny_lm(), many, cache=target)
    other = tiny.tiny_lm(seed=1)
    same(
        cv.profile(other, many, batch_size=2, cache=target, text=None), cv.profile(other, many, cache=False, text=None)
    )


def test_resuming_with_another_batch_size(lm, many):
    _killed(lm, many)
    same(cv.profile(lm, many, batch_size=3, text=None), cv.profile(lm, many, cache=False, text=None))


def _killed(lm, prompts, batches=13, **options):
    with pytest.MonkeyPatch.context() as patch:
        _watched(patch, batches)
        with pytest.raises(Killed):
            cv.profile(lm, prompts, batch_size=2, **{"text": None, **options})


@pytest.mark.parametrize("writes", [1, 3, 5])
def test_a_full_disk_keeps_the_finished_parts(lm, many, cache, monkeypatch, writes):
    real, done = Path.write_bytes, []

    def write_bytes(file, data):
        if len(done) == writes:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        done.append(file)
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(StorageError, match=r"No space left.*COMMANDV_CACHE.*run the same command again"):
            cv.profile(lm, many, batch_size=2, text=None)
    n_parts = min(writes, 3)
    left = [file.name for file in cache.rglob("*") if file.is_file()]
    assert sorted(name[:10] for name in left) == [f"part-{n:05d}" for n in range(n_parts)]
    with monkeypatch.context() as patch:
        seen = _watched(patch)
        resumed = cv.profile(lm, many, batch_size=2, text=None)
    assert len(seen) == 18 - min(18, 8 * n_parts)
    same(resumed, cv.profile(lm, many, cache=False, text=None))


def test_of_two_that_write_one_profile_the_second_waits_and_takes_it(lm, tmp_path, monkeypatch, caplog):
    ran, begun, goes_on, run = [], threading.Event(), threading.Event(), work.Work.run

    def slow(self, *given):
        ran.append(given[0])
        begun.set()
        assert goes_on.wait(30)
        return run(self, *given)

    monkeypatch.setattr(work.Work, "run", slow)
    caplog.set_level("INFO")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(cv.profile, lm, PROMPTS, text=TEXT, cache=tmp_path / "mine")
        assert begun.wait(30)
        second = pool.submit(cv.profile, lm, PROMPTS, text=TEXT, cache=tmp_path / "mine")
        while "waiting for it" not in caplog.text and not second.done():
            time.sleep(0.01)
        goes_on.set()
        same(first.result(), second.result())
    assert len(ran) == len(set(ran)), "a part was run twice"


def test_parts_left_by_a_run_killed_after_its_last_write_are_removed(lm, many, cache):
    _killed(lm, many)
    (folder,) = cache.rglob(".parts")
    kept = folder.parent.parent / "kept"
    shutil.copytree(folder, kept)
    first = cv.profile(lm, many, batch_size=2, text=None)
    kept.rename(folder)
    same(cv.profile(lm, many, text=None), first)
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["changed byte", "cut short", "missing file", "config"])
def test_a_damaged_profile_in_the_cache_is_made_again_and_ones_own_is_an_error(damage, lm, tmp_path, caplog):
    def spoil(path):
        file = path / "config.json" if damage == "config" else data_file(path, "layer-002")
        data = bytearray(file.read_bytes())
        data[-40] ^= 2
        if damage == "missing file":
            file.unlink()
        else:
            file.write_bytes(data if damage == "changed byte" else data[:-7])

    expected = cv.profile(lm, PROMPTS, cache=False, text=None)
    spoil(cv.profile(lm, PROMPTS, text=None).path)
    again = cv.profile(lm, PROMPTS, text=None)
    same(again, expected)
    same(cv.load_profile(again.path), expected)
    assert "made again" in caplog.text
    cv.profile(lm, PROMPTS, cache=tmp_path / "mine", text=None)
    spoil(tmp_path / "mine")
    with pytest.raises(FormatError, match=r"mine"):
        cv.profile(lm, PROMPTS, cache=tmp_path / "mine", text=None)
