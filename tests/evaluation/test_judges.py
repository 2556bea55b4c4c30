"""Judges: phrase lists, the table that names them all, and graders on hand-labelled cases."""

from __future__ import annotations

import functools
import json
import runpy

import pytest

from commandv.errors import InputError
from commandv.evaluation import GRADERS, JUDGES, ByText, Cached, Phrases, load_judge, refusal_phrases
from commandv.prompts.sets import Prompt
from places import ROOT

# Phrase lists


@pytest.mark.parametrize(
    ("name", "answer", "found"),
    [
        ("gcg", "Well, I'm sorry.", True),
        ("gcg", "i'm sorry", False),  # as published: case matters
        ("gcg", "As an apple grower I know", True),  # and so it is
        ("arditi", "well, i CAN'T do it", True),
        ("arditi", "I won't do it", False),
        ("xstest", "  No, it is not.", True),
        ("xstest", "Well, no, it is not.", False),
        ("refusal", "I must decline.", True),
        ("refusal", "I can't wait", False),
    ],
)
def test_phrase_lists_match_as_published(name, answer, found):
    judge = load_judge(name)
    assert judge([Prompt("x")], [answer]) == [float(found)]
    assert (judge.name, judge.unit) == (name, "rate")


def test_phrase_lists_are_whole_and_name_their_sources():
    assert [len(refusal_phrases(name).phrases) for name in ("gcg", "arditi", "xstest")] == [10, 12, 21]
    lists = json.loads((ROOT / "src/commandv/evaluation/data/refusal-phrases.json").read_text("utf-8"))
    assert all("github.com" in entry["source"] for entry in lists.values())
    with pytest.raises(InputError, match="expected one of gcg"):
        refusal_phrases("other")


@pytest.mark.parametrize(("phrases", "match"), [((), "contains"), (("", "a"), "contains"), (("a",), "anywhere")])
def test_phrases_that_would_find_everything_or_nothing_are_refused(phrases, match):
    with pytest.raises(InputError, match=r"expected at least one|expected one of"):
        Phrases("mine", phrases, match)


# The table


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        *((name, name) for name in (*GRADERS, "gcg", "arditi", "xstest")),
        ("classifier:a/b", "classifier:a/b"),
        ("classifier:a/b#REJECTION", "classifier:a/b#REJECTION"),
        ("guard:a/b", "guard:a/b"),
        ("endpoint:http://host:1/v1#small", "endpoint:http://host:1/v1#small"),
    ],
)
def test_every_spec_gives_its_judge(spec, name):
    judge = load_judge(spec)
    assert (judge.name, judge.unit) == (name, "rate")
    assert isinstance(judge, (ByText, Phrases, Cached))
    assert spec.partition(":")[0] in JUDGES


@pytest.mark.parametrize(
    "spec", ["", "other", "refusal:x", "guard", "guard:", "classifier:", "endpoint:http://host", "endpoint:host#m"]
)
def test_other_specs_are_refused(spec):
    with pytest.raises(InputError, match="expected"):
        load_judge(spec)


# Hand-labelled cases


@functools.cache
def benchmark():
    return runpy.run_path(str(ROOT / "benchmarks" / "judges.py"))


def test_the_committed_figures_are_reproduced():
    measured = benchmark()["measure"]()
    assert measured == json.loads((ROOT / "benchmarks/results/judges.json").read_text("utf-8"))
    assert benchmark()["page"](measured) == (ROOT / "docs/benchmarks/judges.md").read_text("utf-8")


def test_the_cases_are_many_and_on_both_halves():
    cases = [json.loads(line) for line in (ROOT / "tests/data/judged.jsonl").read_text("utf-8").splitlines()]
    assert len(cases) >= 170
    for grader in ("refusal", "pirate-opening"):
        for split in ("dev", "test"):
            for label in (0, 1):
                assert sum(c["split"] == split and c["labels"].get(grader) == label for c in cases) >= 8
