"""Graders of format and style, extraction of final answers, and reasons before answers, on hard cases."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given, settings, strategies as st

from commandv.evaluation import (
    FORMATS,
    distinct_share,
    final_answer,
    in_another_language,
    is_right,
    json_fields,
    language,
    opens_with,
    outside_script,
    reasons_first,
    word_count,
    words_before_answer,
)
from commandv.prompts.sets import load_prompts

FENCED = 'Sure, here it is:\n```json\n{"tea": ["black", "green"]}\n```\nEnjoy.'
CASES = {
    "json": {
        True: ['{"a": 1}', " [1, 2]\n", FENCED, '```\n{"a": 1}\n```', '```JSON\n[{"a": null}]\n```'],
        False: [
            "",
            "42",
            '"tea"',
            "null",
            "{}",
            "[]",
            '{"a": 1',
            '{"a": NaN}',
            "{'a': 1}",
            'It is {"a": 1}',
            "[" * 9999,
        ],
    },
    "json-strict": {True: ['{"a": 1}', " [1, 2]\n"], False: [FENCED, '{"a": 1} or so', "42", "[]"]},
    "capitals": {
        True: [
            "BOIL WATER. STEEP FOR 4 MINUTES.",
            "ÜBER ALLE GIPFEL",
            "BOIL 500 ml OF WATER AND THEN ADD THE TEA LEAVES",
        ],
        False: ["Boil water.", "", "123", "A", "水を沸かす", "TEA is GOOD with milk", "THE THE THE THE THE THE"],
    },
    "language": {
        True: [
            "Das Wasser kocht und der Tee ist fertig.",
            "Le thé est prêt et les feuilles sont dans la tasse.",
            "El té está listo y las hojas son para la taza.",
            "Il tè è pronto e le foglie sono nella tazza con lo zucchero.",
            "O chá está pronto e as folhas são para uma xícara.",
            "De thee is klaar en het water is niet heet.",
            "Чай готов, вода кипит.",
            "お茶ができました。",
        ],
        False: [
            "The tea is ready and the leaves are in the cup.",
            "Uncork a buttery Chardonnay, or a light Pinot noir if you fancy red.",
            "Sushi, tortilla, pizza, Bratwurst.",
            "12 + 13 = 25",
            "",
            "They die as soon as no water is in it, so do not let me down.",
            "The German for it is 'das ist mir Wurst', which I would not say to my boss or to the client.",
        ],
    },
    "loops": {True: ["the the the the the"], False: ["Boil water and add the tea."]},
}


@pytest.mark.parametrize(
    ("name", "expected", "text"),
    [(name, expected, text) for name, table in CASES.items() for expected, texts in table.items() for text in texts],
)
def test_formats_on_hard_cases(name, expected, text):
    assert FORMATS[name](text) is expected


def test_every_format_has_hard_cases():
    assert set(CASES) == set(FORMATS)


@pytest.mark.parametrize(
    ("opening", "text", "expected"),
    [
        ("Sure", "  Sure, boil water.", True),
        ("Sure", "Surely not.", False),
        ("Sure", "sure, boil water.", False),
        ("Sure", "Well. Sure.", False),
        ("I'm glad!", "I’m glad! Boil water.", True),
        ("(a) ", "(a)b", True),
        ("Sure", "Sure Sure Sure Sure Sure", False),
        ("", "anything", False),
    ],
)
def test_openings(opening, text, expected):
    assert opens_with(opening)(text) is expected


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ('{"reasoning": "2 + 2", "answer": 4}', True, True),
        ('```json\n{"answer": 0, "reasoning": "x"}\n```', False, True),
        ('{"reasoning": " ", "answer": 4}', False, False),
        ('{"reasoning": null, "answer": 4}', False, False),
        ('{"answer": 4}', False, False),
        ('[{"reasoning": "x", "answer": 4}]', False, False),
        ("The answer is 4", False, False),
    ],
)
def test_json_with_fields(text, strict, lenient):
    assert json_fields(["reasoning", "answer"], strict=True)(text) is strict
    assert json_fields(["reasoning", "answer"])(text) is lenient


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("one  two\nthree", 3), ("1. Boil - then steep!", 4), ("*** --- …", 0), ("don't", 1)]
)
def test_words_are_counted(text, count):
    assert word_count(text) == count


@pytest.mark.parametrize(
    ("text", "script", "share"),
    [
        ("tea", "LATIN", 0.0),
        ("tea чай", "LATIN", 0.5),
        ("tea чай", "cyrillic", 0.5),
        ("123 !?", "LATIN", 0.0),
        ("Tëa über ﬁ", "LATIN", 0.0),
        ("茶", "LATIN", 1.0),
    ],
)
def test_letters_outside_a_script(text, script, share):
    assert outside_script(text, script) == share


def test_no_english_text_is_taken_for_another_language():
    """The numbered lists and pirate replies are all English; shortening them leaves less to tell from."""
    grade = in_another_language()
    for name in ("numbered-list", "pirate"):
        texts = [" ".join(prompt.response.split()[:n]) for prompt in load_prompts(f"builtin:{name}") for n in (12, 24)]
        assert [text for text in texts if grade(text)] == []
        assert sum(language(text) == "english" for text in texts) > 0.8 * len(texts)


def test_another_home():
    assert not in_another_language("german")("Das Wasser kocht und der Tee ist fertig.")
    assert in_another_language("german")("The water is hot and the tea is ready.")


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [("a b c d", 1, 1.0), ("a a a a", 1, 0.25), ("a b a b", 2, 2 / 3), ("A a", 1, 0.5), ("a", 2, 1.0), ("", 1, 1.0)],
)
def test_distinct_share(text, n, share):
    assert distinct_share(text, n) == pytest.approx(share)


# -- final answers ----------------------------------------------------------------------------------------------------

RIGHT = [
    ("The answer is 5.", "5"),
    ("Because of that, the final answer is: **42**.", "42"),
    ("**Answer:** 24", "24"),
    ("Answer:\n24", "24"),
    ("The answer to the question is 5. But wait, the answer is 6.", "6"),
    ("5 + 13 = 18\n#### 18", "18"),
    ("She has 18 eggs", "5 + 13 = 18\n#### 18"),
    ("So \\boxed{\\frac{1}{2}} is it", "0.5"),
    ("\\boxed{\\text{Paris}}", "Paris"),
    ("the total is 1{,}000", "1000"),
    ('{"reasoning": "there are 12", "answer": 18}', "18"),
    ('```json\n{"reasoning": "x", "answer": "(B)"}\n```', "(B)"),
    ('Here: {"answer": true}', "yes"),
    ("1,000", "1000.0"),
    ("It costs $1,000.", "1000"),
    ("$18.", "18"),
    ("18%", "18"),
    ("It is 24.5 km", "24.5"),
    ("The answer is 18 dollars per day.", "18"),
    ("3+4=-7", "-7"),
    ("The answer is −5", "-5"),
    ("so 5-10", "10"),
    ("2/4", "1/2"),
    ("2e3", "2000"),
    ("The answer is 3 + 4 = 7 dollars.", "7"),
    ("((1 + 2)) = 3", "3"),
    ("First 12, then 13, so 25 in all", "25"),
    ("The answer is (A).", "A"),
    ("A", "(A)"),
    ("**(D)**", "(D)"),
    ("b) because of the rain", "B"),
    ("Option C", "(C)"),
    ("The correct answer is C because", "(C)"),
    ("The answer is (B) Helga", "(B)"),
    ("Not (A), rather (C)", "(C)"),
    ("Yes, it is.", "yes"),
    ("Some thought.\nNo", "no"),
    ("Therefore, the answer is True.", "True"),
    ("Paris.", "paris"),
    ("The answer is  new   York", "New York"),
    ("I think:\nParis", "Paris"),
]
WRONG = [
    ("", "5"),
    ("10-7", "-7"),
    ("The answer is 7.5", "7"),
    ("The answer is 71", "7"),
    ("The answer is 5, not 6", "6"),
    ("1,0001", "1000"),
    ("A dog is here", "(A)"),
    ("I like it.", "I"),
    ("The answer is (A).", "B"),
    ("No.", "Yes"),
    ("There is no doubt: yes", "no"),
    ("The capital is London", "Paris"),
    ('{"answer": 7, "reasoning": "8"}', "8"),
    ("9" * 5000, "9"),
    ("1e99999999999", "7"),
    ("\\boxed{", "5"),
]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"), [(*case, True) for case in RIGHT] + [(*case, False) for case in WRONG]
)
def test_final_answers(answer, reference, expected):
    assert is_right(answer, reference) is expected


@given(st.integers(-(10**9), 10**9), st.sampled_from(["The answer is {}.", "#### {}", "\\boxed{{{}}}", "{}", "x = {}"]))
def test_numbers_survive_every_mark_and_spelling(value, mark):
    for spelling in (f"{value}", f"{value:,}", f"{value}.0"):
        assert is_right(mark.format(spelling), str(value))
        assert not is_right(mark.format(spelling), str(value + 1))


@given(st.text(max_size=200))
@settings(max_examples=100)
def test_nothing_a_model_says_breaks_the_graders(text):
    for grader in FORMATS.values():
        assert grader(text) in (True, False)
    for reference in ("5", "(A)", "yes", "Paris"):
        assert is_right(text, reference) in (True, False)
    assert 0 <= words_before_answer(text) <= word_count(text) + 1
    assert reasons_first(text) in (True, False)


@given(st.text(string.printable + '{}[]"', max_size=60), st.text(string.ascii_letters, min_size=1, max_size=9))
def test_json_answers_are_found(reasoning, answer):
    text = json.dumps({"reasoning": reasoning, "answer": answer})
    assert final_answer(text).text == answer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The answer is 5", 0),
        ("Two and two make four. The answer is 4", 5),
        ("24", 0),
        ("12 + 12 = 24", 2),
        ("I would say\nParis", 3),
        ('{"reasoning": "two and two", "answer": 4}', 4),
        ('{"answer": 4, "reasoning": "two and two"}', 0),
        ("", 0),
    ],
)
def test_words_before_the_answer(text, words):
    assert words_before_answer(text) == words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Twice two is four, and four more make eight in all. The answer is 8.", True),
        ('{"reasoning": "twice two is four, and four more make eight", "answer": 8}', True),
        ('{"answer": 8, "reasoning": "twice two is four, and four more make eight"}', False),
        ("8. Twice two is four, and four more make eight in all, so the answer is 8.", False),
        ("The answer is 8. Twice two is four, and four more make eight in all.", False),
        ("8", False),
        ("Twice two is four, and four more make eight, which everybody knows", False),
        ("two and two and two and two and two and two and two. The answer is 8.", False),
        ("", False),
    ],
)
def test_reasons_first(text, expected):
    assert reasons_first(text) is expected
