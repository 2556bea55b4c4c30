"""Instructions that a program checks, and multiple choice by letter."""

from __future__ import annotations

import json

import pytest

from commandv.errors import InputError
from commandv.evaluation import load_task
from commandv.evaluation.instructions import INSTRUCTIONS, follows
from commandv.prompts.sets import Prompt

DONE = {
    "lower case": "you boil the water first.",
    "capitals": "BOIL THE WATER FIRST.",
    "no commas": "You boil the water and pour it.",
    "short": "Boil the water, then pour it.",
    "one sentence": "Boil the water and pour it over the leaves.",
    "three items": "Here:\n* boil water\n* add leaves\n* wait",
    "begins": "Listen, you boil the water.",
    "keyword": "Pick some mint in the garden first.",
    "quotes": '"Boil the water first."',
    "title": "<<Tea>>\nBoil the water.",
}
NOT_DONE = {
    "lower case": ["You boil the water.", "", "..."],
    "capitals": ["BOIL THE water.", "1.", ""],
    "no commas": ["First, you boil the water for tea.", "No."],
    "short": ["You boil the water and then you pour it over the leaves.", ""],
    "one sentence": ["Boil it. Pour it.", "Boil the water and", ""],
    "three items": ["* one\n* two", "* a\n* a\n* a", "1. a\n2. b\n3. c", "* a\n* b\n* c\n* d"],
    "begins": ["Boil the water. Listen!", "Listening is good."],
    "keyword": ["The gardener waits for you there.", "garden"],
    "quotes": ['"Boil" the water.', "Boil.", '""'],
    "title": ["Boil <<the>> water.", "<<>> Tea", "<<Tea>>"],
}


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_an_instruction_is_followed_to_the_letter_or_not(kind):
    assert follows(kind, DONE[kind])
    assert [answer for answer in NOT_DONE[kind] if follows(kind, answer)] == []


def test_every_prompt_says_its_instruction_and_every_kind_is_asked():
    task = load_task("instructions")
    for split in (task.dev, task.test):
        assert all(one.text.endswith(INSTRUCTIONS[one.response].text) for one in split)
        assert {one.response for one in split} == set(INSTRUCTIONS)
    prompt = next(one for one in task.test if one.response == "begins")
    assert task.judge([prompt] * 3, ["Listen, do.", "Do.", "Listen " + "to me and wait " * 12]) == [1, 0, 0]


def questions(tmp_path, rows):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_choices_are_asked_by_letter(tmp_path):
    listed = {"prompt": "Which?\n\nChoices:\n(A) tea\n(B) rain", "correct": "(B)", "incorrect": "(A)"}
    plain = [{"question": f"What is {n}?", "choices": ["one", "two", "three"], "answer_index": 2} for n in range(5)]
    task = load_task(f"letters:{questions(tmp_path, [listed, *plain])}")
    assert (len(task.dev), len(task.test)) == (2, 4)
    prompts = {one.text.splitlines()[0]: one for one in (*task.dev, *task.test)}
    assert prompts["Which?"].response == "(B)"
    assert prompts["Which?"].text.count("(A)") == 1
    assert "(C) three" in prompts["What is 3?"].text
    assert prompts["What is 3?"].response == "(C)"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("(B)", 1),
        ("B", 1),
        ("B. rain", 1),
        (" **B**", 1),
        ("A", 0),
        ("Both", 0),
        ("b", 0),
        ("", 0),
        ("The answer B", 0),
    ],
)
def test_the_letter_that_an_answer_begins_with_counts(answer, right, tmp_path):
    rows = [{"prompt": f"{n}?\n(A) tea\n(B) rain", "correct": "(B)", "incorrect": "(A)"} for n in range(3)]
    judge = load_task(f"letters:{questions(tmp_path, rows)}").judge
    assert judge([Prompt("?", "(B)")], [answer]) == [right]


def test_letters_need_a_file():
    with pytest.raises(InputError, match="needs a file of prompts of yours; write letters:FILE"):
        load_task("letters")
