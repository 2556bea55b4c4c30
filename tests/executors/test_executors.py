"""What holds for every executor, tried with the local one, and addresses where no cluster is."""

from __future__ import annotations

import socket

import pytest
import torch

import commandv as cv
import tiny
from commandv.errors import InputError, MismatchError, WorkerError
from commandv.executors.executor import Local, Outcome, Task, require_same_versions, versions
from commandv.executors.ray import Ray
from commandv.profiles.profiling import profile_in
from commandv.profiles.work import Wanted, Work
from profiled import PROMPTS, TEXT, same


def halved(task):
    return task._replace(key=f"half of {task.key}", args=(task.args[0] // 2,)) if task.args[0] > 1 else None


def ran(do, tasks, smaller=None):
    steps = []
    with Local().pool(lambda: "kept") as pool:
        return list(pool.run(do, tasks, steps.append, smaller)), steps


def test_tasks_get_what_the_worker_keeps_and_report_steps():
    def do(kept, report, number):
        report(number)
        return kept, 2 * number

    outcomes, steps = ran(do, [Task("a", (1,)), Task("b", (5,))])
    assert [(one.task.key, one.value, one.error) for one in outcomes] == [
        ("a", ("kept", 2), None),
        ("b", ("kept", 10), None),
    ]
    assert steps == [1, 5]


@pytest.mark.parametrize(
    "error",
    [MemoryError("full"), torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_task_without_memory_is_tried_smaller_and_that_is_said(error, caplog):
    def do(_kept, _report, size):
        if size > 2:
            raise error
        return size

    (outcome,), _ = ran(do, [Task("eight", (8,))], halved)
    assert (outcome.value, outcome.error) == (2, None)
    assert "eight: out of memory" in caplog.text
    assert "trying again as half of eight" in caplog.text


def test_without_anything_smaller_the_lack_of_memory_is_the_outcome_and_other_errors_are_raised():
    def do(_kept, _report, size):
        raise MemoryError("full") if size else ValueError("wrong")

    (first, second), _ = ran(do, [Task("one", (1,)), Task("two", (2,))], halved)
    assert isinstance(first.error, MemoryError)
    assert isinstance(second.error, MemoryError)
    with pytest.raises(ValueError, match="wrong"):
        ran(do, [Task("none", (0,))], halved)


def test_other_versions_are_told_with_the_machine():
    require_same_versions(versions(), "node-1")
    with pytest.raises(MismatchError, match=r"node-1 has torch 1\.0 \(here .*\); install the same versions"):
        require_same_versions(versions() | {"torch": "1.0"}, "node-1")
    with pytest.raises(MismatchError, match="commandv none"):
        require_same_versions({name: one for name, one in versions().items() if name != "commandv"}, "node-1")


def test_an_address_where_nothing_answers():
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'commandv[ray]')")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(WorkerError, match=rf"no Ray cluster at 127\.0\.0\.1:{port}.*ray start"):  # refused
            Ray(f"127.0.0.1:{port}", wait=5).pool(dict).__enter__()
        silent.listen()
        with pytest.raises(WorkerError, match=r"no answer within 2 s"):
            Ray(f"127.0.0.1:{port}", wait=2).pool(dict).__enter__()


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"cpus": 0}, {"gpus": -1}, {"cpus": float("nan")}, {"gpus": float("inf")}]
)
def test_workers_that_cannot_be(options):
    with pytest.raises(InputError, match="expected"):
        Ray(**options)


# -- profiles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(lm):
    return Work(lm, Wanted.of(PROMPTS, TEXT, batch_size=4))


def test_a_part_in_smaller_batches_has_the_same_rows(work):
    whole, pieces = work.run(0, lambda _: None), work.run(0, lambda _: None, 4)
    assert torch.equal(whole["keys"], pieces["keys"])
    torch.testing.assert_close(whole["layer.1"], pieces["layer.1"], rtol=2**-7, atol=1e-3)


class Between:
    """A pool whose outcomes are changed on their way."""

    width = 1

    def __init__(self, pool, change):
        self.pool, self.change = pool, change

    def run(self, do, tasks, report, smaller=None):
        for outcome in self.pool.run(do, tasks, report, smaller):
            yield self.change(outcome) if isinstance(outcome.value[0], bytes) else outcome


def profile_through(change, work, target):
    with Local().pool(lambda: work) as pool:
        return profile_in(
            Between(pool, change), lambda kept: kept, Wanted.of(PROMPTS, TEXT, batch_size=4), cache=target
        )


def test_a_profile_from_workers_is_the_profile(work, lm, tmp_path):
    made = profile_through(lambda outcome: outcome, work, tmp_path / "mine")
    same(made, cv.profile(lm, PROMPTS, text=TEXT, cache=False))
    same(made, cv.profile(lm, PROMPTS, text=TEXT, cache=tmp_path / "mine"))  # found, not made again


def test_a_part_that_is_not_what_was_sent_is_refused_and_nothing_of_it_is_kept(work, tmp_path):
    def spoiled(outcome):
        data, sha256 = outcome.value
        return Outcome(outcome.task, (data[:-1] + bytes([data[-1] ^ 1]), sha256))

    with pytest.raises(WorkerError, match=r"part 1 of .*not what the worker sent"):
        profile_through(spoiled, work, tmp_path / "mine")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_worker_with_another_model_under_the_name_is_refused(work, tmp_path):
    def edited(outcome):
        return outcome

    with Local().pool(lambda: work) as pool:
        wanted = Wanted.of(PROMPTS, TEXT, batch_size=4)
        other = Work(tiny.tiny_lm(seed=5), wanted)
        found = iter([work, *[other] * 99])  # described by one worker, run by another
        with pytest.raises(MismatchError, match="another model under the name"):
            profile_in(Between(pool, edited), lambda _: next(found), wanted, cache=tmp_path / "mine")
