"""What is found in a run, and how its figures are written."""

from __future__ import annotations

import pytest

import runs
from commandv.evaluation import rate, verdicts
from commandv.evaluation.catalogue import TASKS, meaning
from commandv.evaluation.report import findings, tables
from commandv.evaluation.results import Arm
from commandv.evaluation.tuning import Setting, Tried
from reported import made, written


def one_table(cells, task="t"):
    run = runs.study(cells=cells, planned=len(cells))
    return findings.groups(run)[0].tables[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no file at /home/a/b/c.json, stop", "no file at …/c.json, stop"),
        ("'/tmp/x/y.bin' C:\\Users\\me\\z.bin", "'…/y.bin' …/z.bin"),
        ("meta-llama/Llama-3.2-3B and a / b, 3/4", "meta-llama/Llama-3.2-3B and a / b, 3/4"),
        ("exact:/srv/data/x.jsonl https://example.org/a/b", "exact:…/x.jsonl https://example.org/a/b"),
        ("exact:~/data/gsm8k.jsonl file:///srv/a/b", "exact:…/gsm8k.jsonl …/b"),
    ],
)
def test_portable(text, expected):
    assert tables.portable(text) == expected


def verdict(rates, **changes):
    return one_table([made(rates, **changes)]).verdict.word


BASE = {"unmodified": 0.05, "pasted": 0.95, "random": 0.05, "direct": 1.0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, verdicts.CROSSES),
        ({"pasted": 0.5}, verdicts.PARTLY),
        ({"pasted": 0.05}, verdicts.DOES_NOT),
        ({"random": 0.95}, verdicts.DOES_NOT),
        ({"unmodified": 0.9, "pasted": 0.1, "random": 0.5}, verdicts.DOES_NOT),  # the other way
        ({"direct": 0.05}, verdicts.NOT_EXAMINABLE),
        ({"direct": None}, verdicts.CROSSES),
        ({"random": None}, verdicts.NOT_ESTABLISHED),
        ({"unmodified": None}, verdicts.NOT_MEASURED),
        ({"pasted": None}, verdicts.NOT_MEASURED),
    ],
)
def test_verdict_rules(change, expected):
    rates = {name: value for name, value in (BASE | change).items() if value is not None}
    assert verdict(rates) == expected


def test_verdict_where_less_is_the_aim_and_labels_count_words():
    rates = {"unmodified": 1.0, "pasted": 0.5, "random": 1.0, "direct": 0.4}
    assert verdict(rates, unit="words", success="less") == verdicts.CROSSES
    assert verdict(rates, unit="words", success="more") == verdicts.NOT_EXAMINABLE


def test_unknown_aim_is_said(tmp_path):
    page, _ = written(runs.study(cells=[made(BASE, settings={})], planned=1), tmp_path)
    assert "does not say whether more or less is the aim" in "".join(page.text)


def test_labels_without_judgment_do_not_count():
    cell = made(BASE)
    pasted = cell.arms[1]
    labels = [None, *pasted.labels["t"][1:]]
    arms = [arm.model_copy(update={"labels": {"t": labels}}) if arm.method == "pasted" else arm for arm in cell.arms]
    arms.append(Arm(method="mute", labels={"t": [None] * runs.N_TEST}))
    table = one_table([cell.model_copy(update={"arms": arms})])
    assert table.score("pasted") == rate("pasted", [bool(label) for label in labels[1:]])._replace(name="pasted")
    mute = next(row for row in table.rows if row.arm == "mute")
    assert mute.found is None
    assert "Answers without a judgment: pasted 1, mute 60." in table.notes


def test_arm_missing_in_some_seeds():
    cells = [made(BASE, seed=seed) for seed in range(3)]
    cells[2] = cells[2].model_copy(update={"arms": [arm for arm in cells[2].arms if arm.method != "direct"]})
    table = one_table(cells)
    assert table.score("direct").n == runs.N_TEST  # prompts; the third seed has none of it
    assert table.score("pasted").n == runs.N_TEST
    assert table.verdict.word == verdicts.CROSSES
    assert "Measured with some seeds only: direct." in table.notes


def test_settings_that_were_tried_are_averaged_over_seeds():
    used, other = Setting("last_third", 1.0), Setting("last_third", 0.6)  # the arms have the first
    curves = [[Tried(one, value, value / 10) for one in (used, other)] for value in (0.2, 0.6)]
    cells = [made(BASE, curve={"pasted": curve}, seed=seed) for seed, curve in enumerate(curves)]
    (group,) = findings.groups(runs.study(cells=cells, planned=2))
    assert tables.tried(group).rows == [
        ["pasted", "last_third", "1", "0.40", "0.040", "2 of 2"],
        ["pasted", "last_third", "0.6", "0.40", "0.040", "0 of 2"],
    ]


def test_every_task_says_in_words_what_its_rate_is():
    assert {name for name, entry in TASKS.items() if not entry.means} == {"length"}
    assert meaning("over-refusal:mine", "rate") == "share of answers: refused"
    assert meaning("juggling", "rate") == "share of answers"
    assert meaning("length", "words") == "words"


def test_numbers():
    told = [(0.126, "0.13"), (-0.001, "0.00"), (1234.5, "1234"), (3.03e9, "3.0e+09"), (float("inf"), "∞")]
    assert [tables.number(value) for value, _ in told] == [text for _, text in told]


def test_layer_ranges():
    assert tables.layer_ranges([1, 2, 4, 6, 7, 8]) == "1, 2, 4, 6 to 8"
    assert tables.layer_ranges([]) == "–"
