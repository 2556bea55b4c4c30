"""Result files of studies: how they are kept and read, and what is wrong in them."""

from __future__ import annotations

import json

import pytest

from commandv.errors import FormatError
from commandv.evaluation.results import Arm, Cell, Run, Sample, load_cell, load_run, save_cell, save_head


def test_results_that_are_not_finite_are_read_again(tmp_path):
    arm = Arm(method="pasted", price={"kl": [float("inf"), float("nan")]})
    save_cell(Cell(donor="a", recipient="b", behaviour="c", seed=0, arms=[arm]), tmp_path / "cells" / "a-b-c-0.json")
    save_head(Run(name="x", planned=1), tmp_path)
    values = load_run(tmp_path).cells[0].arms[0].price["kl"]
    assert values[0] == float("inf")
    assert values[1] != values[1]


def test_labels_are_kept_as_characters_and_lists_on_lines(tmp_path):
    made = Arm(
        method="pasted",
        labels={"a": [1, 0, None], "b": [3.25, None]},
        units={"b": "words"},
        price={"kl": [0.123456789]},
    )
    file = tmp_path / "cells" / "c.json"
    save_cell(Cell(donor="a", recipient="b", behaviour="c", seed=0, arms=[made]), file)
    lines = [line.strip() for line in file.read_text().splitlines()]
    assert '"a": "10-",' in lines
    assert '"b": [3.25, null]' in lines
    assert '"kl": [0.12346]' in lines
    (again,) = load_cell(file).arms
    assert again.labels == made.labels


def edited(file, change):
    """Change a file of results as with an editor, here and there and in its layout."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda cell: cell["arms"][0]["labels"].update(a="111"),
        lambda cell: cell["arms"][0]["price"].update(kl=[0.1]),
        lambda cell: cell["arms"].pop(0),
        lambda cell: cell["samples"].clear(),
        lambda cell: cell.update(seconds=1.0),
    ],
)
def test_labels_and_figures_that_were_edited_are_noticed(change, tmp_path):
    arm = Arm(method="pasted", labels={"a": [1, 0, None]}, price={"kl": [3.0]})
    sample = Sample(prompt="a", before="b", after="c")
    file = tmp_path / "c.json"
    save_cell(Cell(donor="a", recipient="b", behaviour="c", seed=0, arms=[arm], samples=[sample], seconds=2.0), file)
    edited(file, lambda cell: None)
    assert load_cell(file).arms[0].labels["a"] == [1, 0, None]
    edited(file, change)
    with pytest.raises(FormatError, match=r"changed since it was written.*it is made again"):
        load_cell(file)


def test_a_run_whose_record_was_edited_is_no_evidence(tmp_path):
    save_head(Run(name="x", planned=2, left_out=["random"]), tmp_path)
    edited(tmp_path / "run.json", lambda head: head.update(left_out=[]))
    with pytest.raises(FormatError, match=r"run\.json.*changed since it was written"):
        load_run(tmp_path)


def test_what_was_written_before_there_were_checksums_is_read(tmp_path):
    file = tmp_path / "c.json"
    save_cell(Cell(donor="a", recipient="b", behaviour="c", seed=0, arms=[Arm(method="pasted")]), file)
    edited(file, lambda cell: cell.pop("checksum"))
    assert load_cell(file).arms[0].method == "pasted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"a": "10"}}, "different numbers of labels"),
        ({"labels": {"a": "1x1"}}, "labels with 'x'"),
        ({"loops": {"a": "11"}}, "3 labels and 2 others"),
        ({"method": "unmodified"}, "more than once"),
    ],
)
def test_labels_that_are_short_doubled_or_strange(change, message, tmp_path):
    content = {"donor": "a", "recipient": "b", "behaviour": "c", "seed": 0}
    one = {"method": "pasted", "labels": {"a": "101"}}
    file = tmp_path / "c.json"
    file.write_text(json.dumps({**content, "arms": [{**one, "method": "unmodified"}, {**one, **change}]}))
    with pytest.raises(FormatError, match=message):
        load_cell(file)


@pytest.mark.parametrize("settings", [{"success": ["more"]}, {"versions": {"encoding": "3"}}, {"versions": 3}])
def test_settings_that_a_report_could_not_read(settings, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"donor": "a", "recipient": "b", "behaviour": "c", "seed": 0, "settings": settings}))
    with pytest.raises(FormatError, match=f"settings: .*{next(iter(settings))}: expected names"):
        load_cell(file)
