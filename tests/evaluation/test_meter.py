"""Measuring arms: what is asked, what is read once, and what a price is made of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import commandv as cv
from commandv.evaluation import load_task, meter
from commandv.evaluation.arms import Made
from commandv.evaluation.meter import Meter, price_scores
from commandv.evaluation.outcomes import measure
from commandv.evaluation.price import MEASURES, prices, reply_log_probs
from commandv.evaluation.scores import geometric_mean, mean
from tiny import random_adapter, tiny_lm

PASSAGES = cv.load_prompts("builtin:drift")[:2]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(chat=True)


@pytest.fixture(scope="module")
def adapter(lm):
    return random_adapter(lm, (1, 2), "l1+g2")


@pytest.fixture
def task():
    return replace(load_task("pirate"), max_new_tokens=6)


@pytest.fixture
def asked(monkeypatch):
    """Which tasks had answers generated."""
    names: list[str] = []
    original = meter.answered

    def answered(lm, task, *arguments, **more):
        names.append(task.name)
        return original(lm, task, *arguments, **more)

    monkeypatch.setattr(meter, "answered", answered)
    return names


def test_an_arm_has_its_outcomes_and_its_price(lm, adapter, task):
    one = Meter(lm, [task], passages=PASSAGES, limit=3)
    found = one.measured(Made(adapter))
    assert found.outcomes == {"pirate": measure(lm, task, adapter, limit=3)}
    assert found.price == prices(lm, PASSAGES, reply_log_probs(lm, PASSAGES), reply_log_probs(lm, PASSAGES, adapter))
    assert set(found.price) == set(MEASURES)
    assert one.measured(Made(adapter), 2.0).price != found.price


def test_only_what_changes_the_model_has_a_divergence(lm, task):
    one = Meter(lm, [task], passages=PASSAGES, limit=1)
    assert one.measured(Made()).price == prices(lm, PASSAGES, reply_log_probs(lm, PASSAGES))
    turns = (("Hello?", "Ahoy!"),)
    shown = one.measured(Made(turns=turns))
    changed = reply_log_probs(lm, PASSAGES, turns=turns)
    assert shown.price == prices(lm, PASSAGES, one.reference, changed)
    assert min(shown.price["kl"]) > 0


def test_tasks_that_ask_the_same_are_asked_once(lm, task, asked):
    again, longer = replace(task, name="again"), replace(task, name="longer", max_new_tokens=7)
    found = Meter(lm, [task, again, longer], passages=PASSAGES, limit=2).measured(Made())
    assert asked == ["pirate", "longer"]
    assert found.outcomes["again"] == replace(found.outcomes["pirate"], task="again")
    assert max(found.outcomes["longer"].words) >= max(found.outcomes["again"].words)


def test_seconds_are_those_of_measuring(lm, task, monkeypatch):
    clock = iter([10.0, 12.345])
    monkeypatch.setattr(meter.time, "monotonic", lambda: next(clock, 99.0))
    monkeypatch.setattr(meter, "answered", lambda *_, **__: ["Arr."])
    monkeypatch.setattr(meter, "prices", lambda *_: {})
    monkeypatch.setattr(Meter, "reference", [])
    assert Meter(lm, [task], limit=1).measured(Made()).seconds == 2.3


def test_other_tasks_have_a_meter_of_the_same_model_and_settings(lm, task):
    one = Meter(lm, [task], passages=PASSAGES, limit=3, batch_size=5)
    assert one.on([task]) is one
    other = one.on([replace(task, name="other")])
    assert [mine.name for mine in other.tasks] == ["other"]
    assert (other.lm, other.passages, other.limit, other.batch_size) == (lm, PASSAGES, 3, 5)


def test_the_passages_are_the_shipped_ones_unless_given(lm, task):
    assert Meter(lm, [task]).passages.hash == cv.load_prompts("builtin:drift").hash
    assert Meter(lm, [task], passages=PASSAGES).passages is PASSAGES


def test_settings_are_tuned_on_the_first_task(lm, task, monkeypatch):
    seen = []
    monkeypatch.setattr(meter, "tune", lambda lm, task, *_, **more: seen.append((task.name, more["passages"])))
    monkeypatch.setattr(Meter, "reference", [])
    Meter(lm, [task, replace(task, name="other")], passages=PASSAGES).tuned(lambda setting: None, [])
    assert seen == [("pirate", PASSAGES)]


def test_prices_are_means_of_divergences_and_geometric_means_of_perplexities():
    nan, values = math.nan, [1.0, 2.0, 4.0]
    found = price_scores({"kl": values, "kl_first": [nan], "kl_after": [nan, *values], "perplexity_first": values})
    assert found == {
        "kl": mean("kl", values, "nats per token"),
        "kl_after": mean("kl_after", values, "nats per token"),
        "perplexity_first": geometric_mean("perplexity_first", values, "perplexity"),
    }
    assert price_scores({"perplexity_after": [nan, nan]}) == {}
