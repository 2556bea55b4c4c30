"""Kept judgments: nothing is asked twice, and what was judged survives failures."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sqlite3
import time

import pytest

import judging
from commandv.errors import FormatError, JudgeError
from commandv.evaluation import Cached, Judgment
from commandv.prompts.sets import Prompt
from judging import asked, endpoint, fair

serve = judging.serve


def test_a_kept_judgment_is_not_asked_for_again(serve):
    server = serve(lambda content, _: "hm" if "odd" in content else fair(content))
    answers = ["no", "yes", "odd", "no"]
    prompts = [Prompt("the same")] * 4
    first = Cached(endpoint(server))(prompts, answers)
    assert len(server.bodies) == 3  # equal answers are asked about once
    again = Cached(endpoint(server, concurrency=1, retries=0))(prompts, answers)
    assert len(server.bodies) == 3
    assert again[:2] == first[:2] == [1.0, 0.0]
    assert math.isnan(again[2])
    assert math.isnan(first[2])
    Cached(endpoint(server, instruction="Something else?"))(prompts, answers)
    assert len(server.bodies) == 6


def test_the_judged_text_is_not_stored(serve, cache):
    server = serve(lambda content, _: "wickedness itself" if "evil" in content else fair(content))
    Cached(endpoint(server))([Prompt("deed")] * 2, ["no wickedness", "evil"])
    stored = b"".join(file.read_bytes() for file in cache.rglob("*") if file.is_file())
    assert b"refused" in stored
    assert not any(word in stored for word in (b"wickedness", b"evil", b"deed"))


def test_a_run_goes_on_after_a_failure(serve):
    broken = True

    def reply(content, number):
        return 500 if broken and number >= 3 else fair(content)

    server = serve(reply)
    judge = Cached(endpoint(server, concurrency=1, retries=1))
    answers = ["no", "yes", "no 2", "yes 2", "no 3", "yes 3"]
    with pytest.raises(JudgeError, match=r"HTTP 500 after 2 tries\. 3 of 6 answers are judged and kept") as caught:
        judge(asked(answers), answers)
    assert caught.value.judged == 3
    broken = False
    before = len(server.bodies)
    assert judge(asked(answers), answers) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert len(server.bodies) - before == 3


def test_without_a_cache_the_error_says_so(serve):
    server = serve(lambda content, number: fair(content) if number < 1 else 500)
    with pytest.raises(JudgeError, match=r"1 of 3 answers were judged; Cached"):
        endpoint(server, concurrency=1, retries=0)(asked("abc"), list("abc"))


class Steady:
    """Judges one answer at a time; calls `then` after each one that is kept."""

    name, unit, settings = "steady", "rate", {"kind": "steady"}

    def __init__(self, then=lambda place: None):
        self.then, self.asked = then, 0

    def judgments(self, prompts, answers):
        for place in range(len(answers)):
            self.asked += 1
            yield [Judgment(place, 1.0, "yes")]
            self.then(place)


def in_processes(*targets):
    processes = [multiprocessing.get_context("fork").Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


def test_a_killed_run_keeps_what_was_judged():
    answers = [str(i) for i in range(10)]

    def kill(place):
        if place == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_processes(lambda: Cached(Steady(kill))(asked(answers), answers)) == [-signal.SIGKILL]
    judge = Steady()
    assert Cached(judge)(asked(answers), answers) == [1.0] * 10
    assert judge.asked == 4


def test_two_processes_may_share_a_file():
    answers = [str(i) for i in range(100)]

    def run():
        assert Cached(Steady(lambda _: time.sleep(0.001)))(asked(answers), answers) == [1.0] * 100

    assert in_processes(run, run) == [0, 0]
    judge = Steady()
    assert Cached(judge)(asked(answers), answers) == [1.0] * 100
    assert judge.asked == 0


def test_a_file_with_other_columns_is_an_error_that_names_them():
    judge = Cached(Steady())
    judge.file.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(judge.file)) as database:
        database.execute("CREATE TABLE judgments (key TEXT PRIMARY KEY, verdict TEXT)")
    with pytest.raises(FormatError, match="verdict"):
        judge(asked(["yes"]), ["yes"])
    assert judge.file.exists()


def test_a_damaged_file_is_an_error_that_names_it(serve):
    judge = Cached(endpoint(serve(fair)))
    judge.file.parent.mkdir(parents=True)
    judge.file.write_bytes(b"not a database, but long enough to look like one" * 40)
    with pytest.raises(FormatError, match="not a file of judgments"):
        judge(asked("a"), ["a"])
