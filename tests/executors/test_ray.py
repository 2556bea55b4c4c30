"""Workers of a local Ray: what they keep, what happens when one is lost, and that results are those of this process."""

from __future__ import annotations

import functools
import json
import os
import sys

import pytest
import yaml

import commandv as cv
import tiny
from commandv.errors import FormatError, MismatchError, WorkerError
from commandv.evaluation.study import load_study, run_study
from commandv.executors import ray as room
from commandv.executors.executor import Task, versions
from commandv.executors.ray import Ray
from profiled import PROMPTS

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'commandv[ray]')")


@pytest.fixture(scope="module")
def executor():
    """Two workers of one thread."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this file
    ray.init(
        address="local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False,
        logging_level="error",
    )  # fmt: skip
    yield Ray(workers=2)
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(executor):
    with executor.pool(functools.partial(list)) as pool:
        yield pool


def ran(pool, do, args, smaller=None):
    steps = []
    tasks = [Task(f"task {n}", one, frozenset(map(str, one[:1]))) for n, one in enumerate(args)]
    return list(pool.run(do, tasks, steps.append, smaller)), sum(steps)


def noted(kept, report, name, number):
    """Remember a name; return what this worker was asked before."""
    report(number)
    before = list(kept)
    kept.append(name)
    return os.getpid(), before


def test_workers_keep_what_they_made_and_like_tasks_go_together(pool):
    outcomes, steps = ran(pool, noted, [(name, 1) for name in "abababab"])
    assert len(outcomes) == steps == 8
    assert all(one.error is None for one in outcomes)
    pids = {one.value[0] for one in outcomes}
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids
    again, _ = ran(pool, noted, [("a", 1)])
    assert again[0].value[0] in pids
    assert "a" in again[0].value[1]


def dying(_kept, _report, marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        os._exit(1)
    return "done"


def test_a_lost_worker_s_task_is_run_again(pool, tmp_path, caplog):
    outcomes, _ = ran(pool, dying, [(str(tmp_path / "a"),), (str(tmp_path / "b"),)])
    assert [one.value for one in outcomes] == ["done", "done"]
    assert "is lost" in caplog.text


def always_dying(_kept, _report, _name):
    os._exit(1)


def test_a_task_that_takes_every_worker_with_it_is_given_up(pool, monkeypatch):
    monkeypatch.setattr(room, "TRIES", 2)
    (outcome,), _ = ran(pool, always_dying, [("x",)])
    assert isinstance(outcome.error, WorkerError)
    assert "2 workers were lost with it" in str(outcome.error)


def failing(_kept, _report, kind):
    raise {"ours": FormatError("a damaged file"), "foreign": ValueError("wrong"), "memory": MemoryError("full")}[kind]


def test_errors_come_back_as_what_they_are(pool):
    with pytest.raises(FormatError, match="a damaged file"):
        ran(pool, failing, [("ours",)])
    with pytest.raises(WorkerError, match=r"task 0, on .*wrong"):
        ran(pool, failing, [("foreign",)])
    (outcome,), _ = ran(pool, failing, [("memory",)])
    assert isinstance(outcome.error, MemoryError)


def test_workers_with_other_versions_are_refused(executor, monkeypatch):
    monkeypatch.setattr("commandv.executors.executor.versions", lambda: versions() | {"torch": "0.1"})
    with executor.pool(list) as other, pytest.raises(MismatchError, match=r"has torch .* \(here 0\.1\)"):
        ran(other, noted, [("a", 1)])


def test_more_than_any_node_has(executor):
    with pytest.raises(WorkerError, match="no node of the Ray cluster has 64 CPUs"):
        Ray(cpus=64).pool(list).__enter__()


# -- profiles and studies ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        lm = tiny.tiny_lm(seed=seed)
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
        cv.save(tiny.random_adapter(cv.load_model(str(folder / name)), layers=(1, 2)), folder / f"{name}-adapter")
    rows = [{"prompt": f"Why is {n} a number?"} for n in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = [{"prompt": f"What is {n} and 0?", "split": "dev" if n < 4 else "test"} for n in range(8)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return folder


def test_a_profile_in_parts_is_found_again_by_this_process(executor, folder, cache):
    load = functools.partial(cv.load_model, str(folder / "one"))
    made = cv.profile_on(executor, load, PROMPTS, batch_size=2, text=None)
    again = cv.profile(load(), PROMPTS, batch_size=2, text=None)
    assert again.path == made.path
    assert len(made) == len(PROMPTS)


def test_a_study_on_workers_finds_what_this_process_finds(executor, folder, tmp_path, cache):
    content = {
        "name": "tiny",
        "prompts": str(folder / "prompts.jsonl"),
        "text": None,
        "models": {name: {"id": str(folder / name)} for name in ("one", "two")},
        "pairs": [["one", "two"], ["two", "one"]],
        "behaviours": {
            "pirate": {
                "task": f"pirate:{folder / 'questions.jsonl'}",
                "adapters": {name: str(folder / f"{name}-adapter") for name in ("one", "two")},
            }
        },
        "layers": ["last_half"],
        "scales": [1.0],
        "n_dev": 2,
        "n_test": 4,
        "n_drift": 2,
        "leave_out": ["context", "vocabulary", "donor-answers", "text-bridge", "few-shot"],
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    study = load_study(tmp_path / "s.yaml")
    there = run_study(study, tmp_path / "there", executor=executor)
    here = run_study(study, tmp_path / "here")
    assert there.plan == here.plan
    assert [cell.error for cell in there.cells] == ["", ""]

    def found(run):
        return [[(arm.method, arm.labels, arm.words, arm.price) for arm in cell.arms] for cell in run.cells]

    assert found(there) == found(here)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "there" / "cells").iterdir()}
    run_study(study, tmp_path / "there")  # goes on with what workers did: nothing is left
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "there" / "cells").iterdir()}
