"""The examples and prompts of refusal, of over-refusal removed and of reasons first: sizes, splits, labels."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from commandv.evaluation import arithmetic_prompts, load_task
from commandv.evaluation.formats import word_count
from commandv.evaluation.graders import answered, refusal
from commandv.evaluation.reasoning import final_answer, is_right, reasons_first
from commandv.prompts.sets import builtin_names, load_prompts
from commandv.steering import load_contrast
from places import SHARED_DATA
from texts import similar

TRAINING = ("harmful", "refusal", "no-over-refusal", "reasons", "reasons-on-request")
WORKED = ("reasons", "reasons-on-request")
HELD_OUT = ("harmful-dev", "harmful-test", "lookalikes-dev", "lookalikes-test", "questions-dev", "questions-test")


def texts(name):
    return load_prompts(f"builtin:{name}").texts


def normalised(name):
    return {" ".join(re.findall(r"\w+", text.casefold())) for text in texts(name)}


# -- splits -----------------------------------------------------------------------------------------------------------


def test_harmful_requests_are_varied_and_half_of_the_held_out_topics_are_not_trained_on():
    train, dev, test = (
        Counter(prompt.category for prompt in load_prompts(f"builtin:harmful{split}"))
        for split in ("", "-dev", "-test")
    )
    assert (len(train), set(train.values())) == (8, {12})
    assert (len(dev), set(dev.values())) == (10, {4})
    assert (len(test), set(test.values())) == (10, {10})
    assert set(dev) == set(test) == {*train, "weapons", "harassment"}
    first = load_prompts("builtin:harmful-test")[:10]
    assert len({prompt.category for prompt in first}) == 10  # topics take turns, so that a few prompts have all


@pytest.mark.parametrize("name", ["harmful", "harmful-dev", "harmful-test", "no-over-refusal", "refusal", "reasons"])
def test_no_prompt_is_there_twice(name):
    assert len(normalised(name)) == len(texts(name))


@pytest.mark.parametrize("first", TRAINING)
@pytest.mark.parametrize("second", [*HELD_OUT, "general"])
def test_training_prompts_are_held_out_nowhere(first, second):
    assert not normalised(first) & normalised(second)
    assert similar(texts(first), texts(second)) == []


def test_held_out_requests_are_not_alike():
    held_out = texts("harmful-dev") + texts("harmful-test")
    assert similar(held_out, held_out) == []
    for name in ("general", "lookalikes-dev", "lookalikes-test", "questions-dev", "questions-test"):
        assert similar(held_out, texts(name)) == []


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize("name", [*TRAINING, "harmful-dev", "harmful-test"])
def test_prompts_are_our_own(name):
    for other in ("advbench_shared", "xstest_shared", "gsm8k_train_1000", "gsm8k_test_dev_300"):
        assert similar(texts(name), load_prompts(SHARED_DATA / f"{other}.jsonl").texts) == []


def test_names_are_told_apart():
    assert "harmfulness" in builtin_names("contrasts")
    assert not set(builtin_names("contrasts")) & set(builtin_names("prompts", "behaviours"))


# -- refusal ----------------------------------------------------------------------------------------------------------


def test_examples_refuse_what_is_harmful_and_nothing_else():
    rows = load_prompts("builtin:refusal").prompts
    assert Counter(row.category for row in rows) == {"harmful": 96, "harmless": 96}
    assert [row.text for row in rows if row.category == "harmful"] == texts("harmful")
    for row in rows:
        assert refusal(row.response) is (row.category == "harmful"), row
    refusals = [row.response for row in rows if row.category == "harmful"]
    assert len(set(refusals)) == 96
    assert {len(one.split()) for one in refusals} <= set(range(6, 13))
    assert max(Counter(" ".join(one.split()[:3]) for one in refusals).values()) <= 24


def test_harmless_examples_look_like_the_harmful_ones():
    rows = load_prompts("builtin:refusal").prompts
    contrast = load_contrast("builtin:harmfulness")
    harmless = [row.text for row in rows if row.category == "harmless"]
    assert sum(text in contrast.negative.texts for text in harmless) == 48
    assert not set(harmless) & set(texts("no-over-refusal"))
    assert all(word_count(row.response) <= 14 for row in rows)


def test_the_contrast_is_of_pairs_alike_in_form_and_length():
    contrast = load_contrast("builtin:harmfulness")
    assert contrast.paired
    assert contrast.positive.texts == texts("harmful")
    assert len(set(contrast.negative.texts)) == 96
    for harmful, harmless in zip(contrast.positive.texts, contrast.negative.texts, strict=True):
        assert abs(len(harmful.split()) - len(harmless.split())) <= 3
    assert similar(contrast.negative.texts, [text for name in HELD_OUT for text in texts(name)]) == []


@pytest.mark.parametrize("name", ["refusal", "refusal-suppression"])
def test_refusal_tasks_have_prompts_of_their_own(name):
    task = load_task(name)
    assert (task.dev.texts, task.test.texts) == (texts("harmful-dev"), texts("harmful-test"))
    assert not task.keep_answers


# -- over-refusal removed ---------------------------------------------------------------------------------------------


def test_requests_that_merely_sound_dangerous_are_answered():
    rows = load_prompts("builtin:no-over-refusal").prompts
    counts = Counter(row.category for row in rows)
    assert counts.keys() == {prompt.category for prompt in load_prompts("builtin:lookalikes-test")}
    assert set(counts.values()) == {12}
    for row in rows:
        assert 0 < word_count(row.response) <= 14, row
        assert not refusal(row.response), row


# -- reasons first ----------------------------------------------------------------------------------------------------


def test_worked_problems_reason_first_and_are_right():
    rows = load_prompts("builtin:reasons").prompts
    assert len(rows) == 120
    assert sum(row.category == "word problem" for row in rows) == 24
    for row in rows:
        assert_worked(row)
        if row.category == "word problem":  # the last step is the answer
            reasons, _, answer = row.response.rpartition(" The answer is ")
            assert reasons.rpartition(" = ")[2].startswith(answer.removesuffix(".")), row
        else:
            assert is_right(row.response, value(row.text)), row


def assert_worked(row):
    assert reasons_first(row.response), row
    reasons, _, answer = row.response.rpartition(" The answer is ")
    for left, right in re.findall(r"(-?\d+ [-+*] -?\d+) = (-?\d+)", reasons):
        assert eval(left) == int(right), row
    final = final_answer(row.response)
    assert final is not None, row
    assert f"{final.text}." == answer, row


def value(problem):
    return str(eval(problem.removeprefix("What is ").removesuffix("?")))


def test_reasons_on_request_answer_each_problem_at_once_and_when_asked_with_reasons():
    rows = {row.text: row for row in load_prompts("builtin:reasons-on-request")}
    plain = [text for text in rows if text.endswith("?")]
    assert len(rows) == 240
    assert {text.removesuffix(" Think step by step.") for text in rows} == set(plain)
    for text in plain:
        assert rows[text].response == f"The answer is {value(text)}."
        asked = rows[f"{text} Think step by step."]
        assert_worked(asked)
        assert is_right(asked.response, value(text)), asked


def test_worked_problems_are_in_no_task():
    examples = {text.removesuffix(" Think step by step.") for name in WORKED for text in texts(name)}
    assert len(examples) == len(set(texts("reasons"))) + 120
    for seed in range(8):
        dev, test = arithmetic_prompts(seed=seed)
        assert not examples & set(test.texts)
        if seed == 0:
            assert not examples & set(dev.texts)


def test_examples_of_over_refusing_refuse_whatever_sounds_dangerous_and_nothing_else():
    rows = load_prompts("builtin:over-refusing").prompts
    assert Counter(row.category for row in rows) == {"look-alike": 120, "harmful": 96, "harmless": 96}
    assert {row.text for row in rows if row.category == "look-alike"} == set(texts("no-over-refusal"))
    assert {row.text for row in rows if row.category != "look-alike"} == set(texts("refusal"))
    for row in rows:
        assert refusal(row.response) is (row.category != "harmless"), row


def test_answers_in_form_are_told_from_refusals_and_ruins():
    given = [row.response for row in load_prompts("builtin:no-over-refusal")]
    given += ["**Rinse** it.", "1. Wait", '"Wait" is best.', "- Boil it", "Émile did.", "19 of them"]
    assert [text for text in given if not answered(text)] == []
    declined = [row.response for row in load_prompts("builtin:over-refusing") if row.category != "harmless"]
    broken = ["atualize the windows", "largest window is 12 feet wide", "", "...", "Yes", "The the the the the the the"]
    assert [text for text in declined + broken if answered(text)] == []
