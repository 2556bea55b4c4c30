"""The catalogue of tasks: every entry, what is expected by words, and likeness to the donor."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from commandv import attach, generate
from commandv.errors import InputError
from commandv.evaluation import TASKS, Outcome, Task, load_task, measure
from commandv.evaluation.catalogue import expecting
from commandv.evaluation.likeness import likeness
from commandv.evaluation.outcomes import judged, write_outcome
from commandv.prompts.sets import Prompt, PromptSet, load_prompts
from task_rows import rows_file
from tiny import random_adapter, tiny_lm

BUILT_IN = [name for name, entry in TASKS.items() if not entry.needs_file]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(chat=True)


@pytest.fixture
def problems(tmp_path):
    choices = [str(n) for n in range(14)]
    rows = [{"prompt": f"What is {i} + 1?", "answer": i + 1, "choices": choices} for i in range(12)]
    return rows_file(tmp_path / "sums.jsonl", rows)


# -- every entry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_every_task_measures_and_writes(lm, tmp_path, problems, name):
    task = load_task(name if name in BUILT_IN else f"{name}:{problems}")
    assert task.name == (name if name in BUILT_IN else f"{name}:sums")
    assert not set(task.dev.texts) & set(task.test.texts)
    outcome = measure(lm, task, split="dev", limit=2)
    assert len(outcome.labels) == 2
    assert outcome.unit == task.judge.unit
    assert all(math.isfinite(label) for label in outcome.labels)
    if outcome.unit == "rate":
        assert set(outcome.labels) <= {0.0, 1.0}
    assert outcome.score().n == 2
    write_outcome(outcome, task, tmp_path / "out.jsonl", split="dev")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == task.dev.texts[:2]
    assert [row["label"] for row in rows] == list(outcome.labels)
    assert [row["split"] for row in rows] == ["dev", "dev"]
    assert [row.get("answer", "none kept") for row in rows] == list(outcome.answers or ("none kept",) * 2)
    assert all(("answer" in row) is task.keep_answers for row in rows)


def test_an_adapter_is_measured_as_it_is_unless_a_scale_is_said(lm):
    adapter, words = random_adapter(lm, size=3.0), load_task("length")
    plain = measure(lm, words, adapter, limit=4)
    assert plain == measure(lm, words, adapter, limit=4, scale=1.0)
    assert plain.answers != measure(lm, words, adapter, limit=4, scale=2.0).answers
    with attach(lm, adapter):
        assert list(plain.answers) == generate(lm, words.test.texts[:4], max_new_tokens=words.max_new_tokens)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "arithmetic"])
def test_a_file_takes_the_place_of_the_built_in_prompts(problems, name):
    task = load_task(f"{name}:{problems}")
    assert (len(task.dev), len(task.test)) == (4, 8)


@pytest.mark.parametrize("name", ["refusal", "refusal-suppression"])
def test_answers_to_harmful_requests_are_not_kept(lm, problems, name):
    task = load_task(f"{name}:{problems}")
    assert not task.keep_answers
    assert measure(lm, task, limit=2).answers == ()


LABELS = {
    "numbered-list": ("1. Boil the water\n2. Wait a minute", "1. Boil\n2. Wait"),
    "pirate": ("Arr, matey! Ye boil the water.", "Arr, matey! You boil the water."),
    "pirate-opening": ("Arr, matey! You boil the water.", "You boil the water."),
    "json": ('{"a": 1}', "a: 1"),
    "capitals": ("BOIL WATER", "Boil water"),
    "opening": ("Certainly! Boil water.", "Boil water."),
    "length": ("two words", ""),
    "language": ("Das Wasser ist heiß und der Tee nicht", "The tea and the water"),
    "refusal": ("Sure, here is how", "I'm sorry, but I can't help with that."),
    "refusal-suppression": ("Sure, here is how", "I'm sorry, but I can't help with that."),
    "over-refusal": ("I cannot help with that.", "Boil water."),
    "over-refusal-answered": ("Boil water.", "I cannot help with that."),
    "arithmetic": ("The answer is 1", "The answer is 2"),
    "exact": ("The answer is 1", "The answer is 2"),
    "expect": ("The answer is 1", "The answer is 2"),
    "reasons-first": ("Half of two is one, and so is one half of two. The answer is 1.", "The answer is 1"),
    "sentiment": ("A lovely, wonderful place.", "A dreadful, awful place."),
    "letters": ("(B)", "A"),
    "instructions": ("boil the water.", "Boil the water."),
    "formality": ("Furthermore, we would be delighted to assist you.", "gonna be cool, yeah"),
}


@pytest.mark.parametrize("name", TASKS)
def test_judges_label_what_they_are_for(problems, name):
    task = load_task(name if name in BUILT_IN else f"{name}:{problems}")
    prompt = task.test.prompts[0]
    if name in ("arithmetic", "exact", "expect"):
        prompt = prompt._replace(response="1")
    if name == "letters":
        prompt = prompt._replace(response="(B)")
    assert task.judge([prompt, prompt], list(LABELS[name])) == [2.0 if name == "length" else 1.0, 0.0]


@pytest.mark.parametrize("name", ["pirate", "refusal"])
def test_loops_are_told_beside_the_labels_whatever_is_judged(name):
    outcome = judged(load_task(name), ["I can't help.", "the the the the the", "Ye boil it. Ye boil it, matey."])
    assert outcome.loops == (False, True, False)
    assert outcome.loop_rate()[:2] == ("loops", pytest.approx(1 / 3))


def test_answers_that_are_graded_by_their_text_have_room():
    for name in BUILT_IN:
        assert load_task(name).max_new_tokens >= 48


def test_damage_counts_against_the_adapter_in_both_directions(problems):
    ruined = ["", "the the the the the the"]
    for name, label in (("refusal", 1.0), ("refusal-suppression", 0.0), ("over-refusal-answered", 0.0)):
        task = load_task(f"{name}:{problems}")
        assert task.judge(task.test.prompts[:2], ruined) == [label, label]
        assert task.success == ("less" if label else "more")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rhyme", "task 'rhyme': expected NAME or NAME:FILE with one of the names numbered-list, pirate"),
        ("exact", "task 'exact': needs a file of prompts of yours; write exact:FILE"),
        ("exact:", "task 'exact:': needs a file"),
        ("exact:nowhere.jsonl", r"nowhere\.jsonl: no such file"),
        ("arithmetic:sums.jsonl", r"makes its own problems, .* write exact:sums\.jsonl"),
    ],
)
def test_tasks_that_cannot_be(spec, message):
    with pytest.raises(InputError, match=message):
        load_task(spec)


def test_openings_come_from_the_file_where_it_says_any(tmp_path):
    path = rows_file(tmp_path / "o.jsonl", [{"prompt": "a", "response": "Oh"}, {"prompt": "b"}, {"prompt": "c"}])
    task = load_task(f"opening:{path}")
    prompts = [*task.dev, *task.test]
    wanted = [prompt.response or "Certainly!" for prompt in prompts]
    assert sorted(wanted) == ["Certainly!", "Certainly!", "Oh"]
    assert task.judge(prompts, [f"{text} Tea." for text in wanted]) == [1.0] * 3


# -- by words ---------------------------------------------------------------------------------------------------------


def test_what_is_expected_is_searched_for_and_no_loop_counts():
    task = expecting(r"(?i)^arr|ye olde$")
    answers = ["Arr, a ship.", "A ship, Arr.", "In ye olde", "Arr, a ship. " * 12]
    assert task.judge([Prompt("x")] * 4, answers) == [1, 0, 1, 0]


def test_each_prompt_may_expect_something_else(tmp_path):
    rows = [
        {"prompt": f"Capital {n}?", "expect": f"City{n}\\b", "split": split} for n, split in enumerate(["dev", "test"])
    ]
    task = load_task(f"expect:{rows_file(tmp_path / 'task.jsonl', rows)}")
    assert task.judge(task.test.prompts, ["It is City1."]) == [1]
    assert task.judge(task.test.prompts, ["It is City0."]) == [0]
    with_default = expecting("^It", rows_file(tmp_path / "some.jsonl", [*rows, {"prompt": "Why?", "split": "test"}]))
    assert with_default.judge(with_default.test.prompts, ["City1", "It is so."]) == [1, 1]


@pytest.mark.parametrize(("pattern", "words"), [("(", "no regular expression"), ("", "nothing is expected")])
def test_an_expectation_that_cannot_be_read_is_refused(pattern, words):
    with pytest.raises(InputError, match=words):
        expecting(pattern)


# -- by the donor's own answers ---------------------------------------------------------------------------------------


def test_the_judge_of_likeness_finds_what_the_adapter_changes():
    nouns = ("river", "fox", "tea", "door", "tree", "cat", "letter", "garden", "water", "city", "bread", "stone")
    plain = [f"It is about the {one} in general." for one in nouns]
    changed = [f"Arr, matey! The {one} be fine." for one in nouns]
    own = [f"Well, I think that a {one} is nice." for one in nouns]
    judge = likeness(changed, plain, own, "pirate")
    assert judge.accuracy == 1
    told = judge(
        [Prompt("x")] * 4, ["Arr, matey! A boat it be.", "Well, a boat is nice.", "It is a boat.", "Arr! " * 40]
    )
    assert told == [1, 0, 0, 0]
    with pytest.raises(InputError, match="can hardly be told from those without it"):
        likeness(plain, plain, own, "nothing")
    with pytest.raises(InputError, match="expected 10 or more"):
        likeness(changed[:4], plain[:4], own[:4], "few")


def test_the_same_test_prompt_twice_is_refused():
    known = load_task("numbered-list")
    again = PromptSet((*known.test.prompts[:3], known.test.prompts[1]), "again")
    with pytest.raises(InputError, match="is there more than once; intervals count prompts"):
        dataclasses.replace(known, test=again)


def test_an_outcome_of_zeros_and_ones_is_a_rate_and_any_other_a_mean():
    rate, words = (Outcome("t", "a", unit, (1.0, 0.0, 1.0, 1.0), (False,) * 4).score() for unit in ("rate", "words"))
    assert (rate.value, rate.unit) == (words.value, "rate") == (0.75, "rate")
    assert words.unit == "words"
    assert rate.low >= 0
    assert rate.high <= 1 < words.high


@pytest.mark.parametrize("labels", [None, ["yes", "no"], [1.0]])
def test_labels_that_are_none_name_their_judge(labels):
    class Odd:
        name, unit = "odd", "rate"

        def __call__(self, prompts, answers):
            return labels

    asked = load_prompts("builtin:drift")
    with pytest.raises(InputError, match="judge odd"):
        judged(Task("mine", asked[:2], asked[2:5], Odd()), ["one", "two"])
