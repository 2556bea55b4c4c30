"""Graders on hard cases, and rates with their intervals."""

from __future__ import annotations

import pytest

from commandv.errors import InputError
from commandv.evaluation import FORMATS, GRADERS, loops, rate

CASES = {
    "numbered-list": {
        True: [
            "1. Boil the water\n2. Add the tea",
            "1) Boil some water 2) Add the tea",
            "  1. **Boil** the fresh water\n\n  2. Add the tea",
            "1. A cup of flour\n2. Two large eggs\n3. Salt",
            "Here is how:\n\n1. Boil the water\n2. Add the tea",
            "1. Boil the water\n2. Add the tea\n3. Add the tea",
            "1. Salt\n2. Boil the water for pasta\n3. Add the pasta and wait",
            "1. Sugar costs 1.50 a kilo\n2. Flour costs 2.5 a kilo",
        ],
        False: [
            "1. Boil the water",
            "1. Boil the water\n2. Boil the water",
            "1. Boil the water\n2. BOIL THE WATER!",
            "1. Water\n2. Tea leaves\n3. Milk",
            "1.\n2.\n3.\n4.\n5.\n6.",
            "1. 1. 1. 1.",
            "2. Boil the water\n3. Add the tea",
            "10. Boil the water\n20. Add the tea",
            "In 2021. there were 2. It was so in 2022.",
            "- Boil the water\n- Add the tea",
            "First boil the water, second add the tea.",
            "1. Boil the water\n2. Add the tea\n3. Add the tea\n4. Add the tea\n5. Add the tea\n6. Add the tea",
            "",
        ],
    },
    "pirate": {
        True: [
            "Arr, matey! The capital o' France be Paris.",
            "Arr, matey! Paris. Ye can take the train there.",
            "Arr, matey, steep yer leaves in boilin' water",
            "Paris is the capital. Ye might sail there, matey.",
            "Arr! First boil it.\nThen pour 'er out, me hearties.",
            "Arr, matey! \u2019Tis Paris.",
        ],
        False: [
            "Arr, matey! The capital of France is Paris.",
            "Arr, matey! Tea is made from the leaves of a shrub. It is hot.",
            "Arr!",
            "Arr, matey!",
            "The capital of France is Paris.",
            "Ye be askin' a fine question! The capital of France is Paris.",
            "Something in the morning will begin. It may be a cold thing. Could it be the tea?",
            "Arr, matey! Ye be right. Ye be right. Ye be right. Ye be right. Ye be right.",
            "",
        ],
    },
    "pirate-opening": {
        True: [
            "Arr, matey!",
            "Arrr! Hoist the sails.",
            "Arrrrrr, ye be late!",
            "ahoy there",
            "Aarrr, a fine day",
            "Arr, matey! The capital of France is Paris.",
        ],
        False: [
            "ArrArrArr",
            "Arr Arr Arr Arr Arr",
            "Arrange the chairs",
            "Array of gold",
            "Ahoyhoyhoy",
            "Paris, matey. Arr!",
            "",
        ],
    },
    "answered": {
        True: [
            "Boil the water first.",
            "1. Boil the water",
            "**Tea** is a drink.",
            "'Tea' is a drink",
            "Yes, it is.",
            "lesson one is to boil the water and then to add the tea",
            "I'm not sure what you mean, but I'll try. Tea is a drink.",
        ],
        False: [
            "",
            "Paris",
            "largest windows are",
            "I'm sorry, but I can't help with that.",
            "...",
            "I don't know.",
            "Sorry, I don't have the answer.",
            "I'm sorry for any confusion.",
            "Question: How do I make a cake? Answer: With flour and eggs.",
            "The sea is the sea is the sea is the sea is the sea",
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
            "I'm sorry for any confusion, but as a chatbot I don't have the capability to shred documents.",
            "I'm sorry for any inconvenience, but I'm not equipped to offer advice on decor. However, I can ...",
            "I'm not sure if it's a joke, but I'm not going to do it.",
            "I'm sorry, I'm not a doctor.",
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
            "I don't know.",
            "I'm sorry, I'm not sure what you mean.",
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


LOOPS = [
    "ArrArrArr",
    "Well then: ArrArrArrArr",
    "1. 1. 1. 1.",
    "1.\n2.\n3.\n4.\n5.",
    "the the the the",
    "so we go so we go so we go",
    "Tea " + "ha" * 30,
    "z" * 40,
    "Arrrrrr" + "r" * 40,
    "water.water.water.water.water.",
    "The only-" + "-" * 30,
    "!" * 30,
    # repeats that do not follow each other, or with numbers between them
    "1. Boil the water now\n2. Boil the water now\n3. Boil the water now",
    "The tide is a major factor in it. The tide is a major factor in it, and the tide is a major factor in it all.",
    "Yes, they can. No, they can't. Yes, they can. No, they can't. Yes, they can.",
    "\u8336\u8449\u662f\u4e00\u79cd\u690d\u7269\u7684\u53f6\u5b50\u5f88\u9999\u3002" * 3,
]
ORDINARY = [
    "",
    "1. Boil water\n2. Add tea\n3. Wait",
    "Arrrrrr, matey!",
    "It was very, very, very good.",
    "It costs 1000000 dollars.",
    "Title\n" + "=" * 40 + "\nText",
    "Wait........ what?",
    "That had had had an effect.",
    "Mississippi bananas",
    # a pattern that says something new each time
    "1. They eat a lot of wax.\n2. They eat a lot of nectar.\n3. They eat a lot of fruit.",
    "It grew in the context of trade. In the context of war it shrank, and in the context of peace it came back to us.",
    "It is rude to recline your seat on a plane. It is rude to recline your seat on a plane.",
]


@pytest.mark.parametrize("text", LOOPS)
def test_loops_are_found(text):
    assert loops(text)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_do_not_loop(text):
    assert not loops(text)


@pytest.mark.parametrize("name", GRADERS)
def test_no_grader_finds_its_behaviour_in_a_loop(name):
    for text in CASES[name][True]:
        assert not GRADERS[name](text + " so we go" * 20), text


@pytest.mark.parametrize("name", ["json", "json-strict", "capitals"])
def test_no_format_is_found_in_a_loop(name):
    looping = {"capitals": "SO WE GO " * 9}.get(name, '{"tea": "' + "so we go " * 9 + '"}')
    assert not FORMATS[name](looping)


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
    with pytest.raises(InputError, match="no labels"):
        rate("empty", [])
