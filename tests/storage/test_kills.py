"""Work killed at any moment: what was there stays whole, and the same command again gives what it would have given."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

import commandv as cv
import killing
import tiny
from commandv.storage.foreign import new_directory


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are sent to forked children")
def test_work_that_is_killed_at_random_moments_is_finished_by_the_next_run(tmp_path):
    """Save, profile, train, study, report and the conversion of a GGUF file, in a process without threads."""
    path = os.pathsep.join(sys.path)
    ran = subprocess.run(
        [sys.executable, killing.__file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    *said, last = ran.stdout.splitlines()
    found = json.loads(last)
    assert (said, found["wrong"]) == ([], [])
    assert found["kills"] >= 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a forked child is ended")
@pytest.mark.parametrize("call", ["replace", "fsync", "unlink"])
def test_a_new_directory_whose_writer_ends_at_any_call_is_made_by_the_next_one(call, tmp_path, monkeypatch):
    """As a kill does, with nothing cleaned up; at the first such call, the second, and so on."""
    real, code, at = getattr(os, call), 9, 0
    while code == 9:
        at, target = at + 1, tmp_path / f"target-{at}"
        child = os.fork()
        if child == 0:
            calls = iter(range(1, at))

            def ending(*given, calls=calls, **named):
                return real(*given, **named) if next(calls, None) else os._exit(9)

            monkeypatch.setattr(os, call, ending)
            made(target)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not (target / "last").exists():
            made(target)
        assert sorted(one.name for one in target.iterdir() if not one.name.startswith(".")) == ["first", "last"]
    assert code == 0
    assert at > 2


def made(target):
    with new_directory(target, "last") as directory:
        for name in ("last", "first"):
            (directory / name).write_text(name)


def test_readers_in_another_process_never_fail_while_an_artefact_is_replaced(tmp_path):
    lm = tiny.tiny_lm()
    adapters = [tiny.random_adapter(lm, (0, 1), rank=2, seed=seed) for seed in (1, 2)]
    profiles = [cv.profile(lm, [f"{word} {n}" for n in range(3)], cache=False, text=None) for word in ("tea", "milk")]
    cv.save(adapters[0], tmp_path / "adapter")
    cv.save_profile(profiles[0], tmp_path / "profile")
    context = multiprocessing.get_context("spawn")
    ready, stop, told = context.Event(), context.Event(), context.Queue()
    reader = context.Process(target=_read, args=[tmp_path, ready, stop, told])
    reader.start()
    try:
        assert ready.wait(60)
        for n in range(60):
            cv.save(adapters[n % 2], tmp_path / "adapter")
            cv.save_profile(profiles[n % 2], tmp_path / "profile")
    finally:
        stop.set()
        n_read, problem = told.get(timeout=60)
        reader.join()
    assert problem == ""
    assert n_read > 10


def _read(folder, ready, stop, told):
    torch.set_num_threads(1)
    n_read = 0
    try:
        while not stop.is_set():
            cv.load_adapter(folder / "adapter")
            cv.load_profile(folder / "profile")
            n_read += 1
            ready.set()
        told.put((n_read, ""))
    except cv.CommandVError as error:
        ready.set()
        told.put((n_read, f"{type(error).__name__}: {error}"))
