"""Every figure in README and docs is what the committed labels give; a changed label shows."""

from __future__ import annotations

import functools
import json
import shutil

import pytest

from commandv.evaluation.report import markdown
from commandv.evaluation.results import load_run
from experiments.tables import figures, sentences
from experiments.tables.cells import Sentence, at
from experiments.tables.pages import RUNS


@functools.cache
def whole():
    return figures.whole()


def test_every_figure_is_what_the_committed_labels_give():
    assert figures.differing(figures.made(whole())) == []


def test_a_changed_label_shows_in_the_report_and_in_the_readme(tmp_path, monkeypatch):
    shutil.copytree(RUNS / "packaged", tmp_path / "packaged")
    for file in (tmp_path / "packaged" / "cells").iterdir():
        cell = json.loads(file.read_text("utf-8"))
        del cell["checksum"]  # measured, not edited
        pasted = next(arm for arm in cell["arms"] if arm["method"] == "pasted")["labels"]
        task = next(iter(pasted))
        pasted[task] = pasted[task].replace("0", "1", 1)
        file.write_text(json.dumps(cell), "utf-8")
    report = "docs/studies/packaged/report.md"
    changed = {**whole(), report: markdown(load_run(tmp_path / "packaged"))}
    sentences.packaged_groups.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(sentences, "RUNS", tmp_path)
        found = figures.differing(figures.made(changed))
    sentences.packaged_groups.cache_clear()
    assert [line.split(":")[0] for line in found] == [report, "README.md", "docs/methods/carrying-adapters.md"]


TABLE = """# One

| arm | rate |
|---|---|
| **ours** | 0.25 [-0.01, 1.00] |
| ours | 7 |

## Two

| arm | rate |
|---|---|
| ours | 0.50 |
"""


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (("One", "ours", "rate"), [".25", "-.01", "1.00"]),
        (("Two", "ours", "rate"), [".50"]),
        (("", "ours", "rate"), [".25", "-.01", "1.00"]),
    ],
)
def test_figures_come_out_of_tables(where, expected):
    assert at({"page": TABLE}, "page", *where) == expected


def test_a_sentence_gets_its_figures_and_keeps_its_line_breaks():
    sentence = Sentence("page", "into Gemma {} [{}, {}] of", [".25", "-.01", "1.00"])
    text, spans = figures.placed("It goes into\nGemma .9 [.80,\n1.0] of it, .3 there.", sentence, [])
    assert text == "It goes into\nGemma .25 [-.01,\n1.00] of it, .3 there."
    assert [text[start:end] for start, end in spans] == sentence.figures


@pytest.mark.parametrize("page", ["It is .25.", "a .1 b a .2 b"])
def test_a_sentence_that_is_not_there_once_is_told(page):
    problems: list[str] = []
    assert figures.placed(page, Sentence("page", "a {} b", [".3"]), problems) == (page, [])
    assert "'a {} b'; reword it" in problems[0]


def test_a_figure_that_nothing_makes_is_told_and_code_and_papers_are_not():
    text = "We found .71 (arXiv 2506.19140, section 3.1), with `scale=0.5` and\n```\n0.25\n```\nof 12 prompts .33."
    told = list(figures.strays("page", text, [Sentence("page", "prompts {}.", [".33"])]))
    assert told == ["page:1: nothing makes the figure .71; say where it comes from in experiments/tables/sentences.py"]
