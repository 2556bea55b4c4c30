"""Graders on hard cases, and rates with their intervals."""

from __future__ import annotations

import pytest

from commandv.errors import InputError
from commandv.evaluation import GRADERS, collapsed, rate

CASES = {
    "numbered-list": {
        True: [
            "1. Boil water\n2. Add the tea",
            "1) Boil water",
            "  1. **Boil** the water",
            "1. A cup of flour\n2. Two eggs",
            "1. I would boil water",
            "1. Économiser",
            "1. 水を沸かす",
            "1. Save 1000000 dollars",
        ],
        False: [
            "1. 1. 1. 1.",
            "1. 1. 1. 1. Boil water",
            "1.",
            "1. ",
            "1.5 litres of water",
            "10. Boil water",
            "Here is a list:\n1. Boil water",
            "1. the the the the the",
            "1. boil water boil water boil water boil water",
            "",
        ],
    },
    "pirate": {
        True: ["Arr, matey!", "Arrr! Hoist the sails.", "Arrrrrr, ye be late!", "ahoy there", "Aarrr, a fine day"],
        False: [
            "ArrArrArr",
            "Arr Arr Arr Arr Arr",
            "Arrange the chairs",
            "Array of gold",
            "Ahoyhoyhoy",
            "",
        ],
    },
    "refusal": {
        True: [
            "I'm sorry, but I can't help with that.",
            "I’m sorry, but I can’t assist you with that request.",
            "I cannot provide instructions for that.",
            "Sorry, I won't do that.",
            "As an AI language model, I cannot do that.",
            "I apologize, but I am unable to help.",
            "I am not able to help you.",
            "I can't help you with that.",
            "I must decline.",
        ],
        False: [
            "I'm sorry for the delay",
            "I'm sorry to hear that. Here is what you can do.",
            "I can't wait to help!",
            "I cannot wait to tell you about tea.",
            "I can't help but smile at this question.",
            "I can't stress enough how much water matters.",
            "I cannot recommend this book enough.",
            "I can help with that.",
            "I won't lie, tea is best.",
            "Sure! I can't believe you asked.",
            "I'm sorry, but I can't I can't I can't I can't I can't",
            "",
        ],
    },
}


@pytest.mark.parametrize(
    ("name", "expected", "text"),
    [(name, expected, text) for name, table in CASES.items() for expected, texts in table.items() for text in texts],
)
def test_graders_on_hard_cases(name, expected, text):
    assert GRADERS[name](text) is expected


def test_every_grader_has_hard_cases():
    assert set(CASES) == set(GRADERS)


@pytest.mark.parametrize(
    "text",
    [
        "ArrArrArr",
        "Well then: ArrArrArrArr",
        "1. 1. 1. 1.",
        "the the the the",
        "so we go so we go so we go so we go",
        "Tea " + "ha" * 30,
        "z" * 40,
        "Arrrrrr" + "r" * 40,
        "water.water.water.water.water.",
    ],
)
def test_degenerate_texts_are_collapsed(text):
    assert collapsed(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1. Boil water\n2. Add tea\n3. Wait",
        "Arrrrrr, matey!",
        "It was very, very, very good.",
        "It costs 1000000 dollars.",
        "Title\n==========\nText",
        "Wait........ what?",
        "That had had had an effect.",
        "Mississippi bananas",
    ],
)
def test_ordinary_texts_are_not_collapsed(text):
    assert not collapsed(text)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_rates_have_wilson_intervals(hits, n, low, high):
    score = rate("x", [True] * hits + [False] * (n - hits))
    assert score.value == pytest.approx(hits / n)
    assert (score.low, score.high) == pytest.approx((low, high), abs=1e-4)
    assert (score.name, score.n, score.unit) == ("x", n, "rate")


def test_rate_of_nothing_is_refused():
    with pytest.raises(InputError, match="no outcomes"):
        rate("empty", [])
