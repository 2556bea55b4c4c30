"""Settings tried on development prompts."""

from __future__ import annotations

import dataclasses

import pytest

import tiny
from commandv.errors import InputError
from commandv.evaluation import ByText, Task
from commandv.evaluation.tuning import Setting, Tried, choose, grid, tune
from commandv.prompts.sets import Prompt, PromptSet

PROMPTS = PromptSet(tuple(Prompt(f"What is {n}?") for n in range(12)), "sums")
PASSAGES = PromptSet(tuple(Prompt(f"Say {n}", "The river runs\nand the fox sleeps.") for n in range(3)), "passages")


@pytest.fixture
def loud(lm):
    """A task whose judge counts the answer's characters, and an adapter that changes answers."""
    judge = ByText("length", len, "characters")  # type: ignore[arg-type]
    task = Task("length", PROMPTS[:6], PROMPTS[6:12], judge, max_new_tokens=4)
    return lm, task, tiny.random_adapter(lm, layers=(1, 2), size=3.0)


def test_tuning_never_reads_the_test_split(loud, monkeypatch):
    lm, task, adapter = loud
    monkeypatch.setattr(Task, "prompts", lambda self, split: self.dev if split == "dev" else pytest.fail("test split"))
    tune(lm, task, lambda setting: adapter, grid(["all_layers"], [1.0]), passages=PASSAGES)


def test_tuning_takes_the_best_within_the_budget(loud):
    lm, task, adapter = loud
    free = tune(lm, task, lambda setting: adapter, grid(["all_layers"], (0.25, 1.0, 2.0)), passages=PASSAGES)
    assert [one.setting.scale for one in free.tried] == [0.25, 1.0, 2.0]
    assert free.chosen.value == max(one.value for one in free.tried)
    assert [one.kl for one in free.tried] == sorted(one.kl for one in free.tried)
    budget = (free.tried[0].kl + free.tried[1].kl) / 2
    tight = tune(
        lm, task, lambda setting: adapter, grid(["all_layers"], (0.25, 1.0, 2.0)), budget=budget, passages=PASSAGES
    )
    assert tight.chosen.setting.scale == 0.25
    assert tight.within_budget
    broke = tune(lm, task, lambda setting: adapter, grid(["all_layers"], (1.0, 2.0)), budget=1e-9, passages=PASSAGES)
    assert broke.chosen.setting.scale == 1.0
    assert not broke.within_budget


def test_less_is_success_where_the_task_says_so(loud):
    lm, task, adapter = loud
    fewer = dataclasses.replace(task, success="less")
    found = tune(lm, fewer, lambda setting: adapter, grid(["all_layers"], (0.25, 1.0, 2.0)), passages=PASSAGES)
    assert found.chosen.value == min(one.value for one in found.tried)


def test_a_setting_is_made_as_it_says(loud):
    lm, task, adapter = loud
    asked = []
    found = tune(
        lm, task, lambda setting: asked.append(setting) or adapter, grid(["a", "b"], [1.0, 0.5], ["end"]),
        passages=PASSAGES, limit=2,
    )  # fmt: skip
    assert [one.setting for one in found.tried] == [
        Setting(layers, scale, "end") for layers in "ab" for scale in (0.5, 1.0)
    ]
    assert set(asked) == {one.setting for one in found.tried}


def test_of_equal_effects_the_cheaper_wins(lm):
    silent = Task("same", PROMPTS[:2], PROMPTS[2:4], ByText("same", lambda text: True), max_new_tokens=2)
    adapter = tiny.random_adapter(lm, layers=(1, 2), size=3.0)
    found = tune(lm, silent, lambda setting: adapter, grid(["x"], [1.0, 0.25, 2.0]), passages=PASSAGES)
    assert found.chosen.setting.scale == 0.25


def test_a_budget_of_looping_answers_leaves_aside_what_loops_more():
    def one(scale: float, value: float, loops: float, kl: float = 0.1) -> Tried:
        return Tried(Setting("x", scale), value, kl, loops=loops)

    tried = [one(0.5, 0.4, 0.0), one(0.75, 0.6, 0.1), one(1.0, 0.9, 0.5)]
    assert choose(tried, "more").chosen is tried[2]
    assert choose(tried, "more", most_loops=0.1).chosen is tried[1]
    assert choose(tried, "less", most_loops=0.1).chosen is tried[0]
    dear = [one(0.5, 0.4, 0.3, kl=0.2), one(1.0, 0.9, 0.5, kl=0.1)]
    found = choose(dear, "more", most_loops=0.1)
    assert found.chosen is dear[1]  # the cheapest, since none is within the budget
    assert not found.within_budget


def test_nothing_to_try_is_refused(lm):
    with pytest.raises(InputError, match="no settings"):
        tune(lm, Task("x", PROMPTS[:2], PROMPTS[2:4], ByText("x", bool)), lambda setting: None, [])
