"""None"""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

import runs
from commandv.errors import FormatError, InputError
from commandv.evaluation.report import findings, tables, write_report
from commandv.evaluation.results import Cell, Sample, load_run, save_cell, save_head
from commandv.evaluation.statistics import compare
from reported import made, written

NASTY = "<script>alert(1)</script> | `code` *bold* [x](javascript:y) & </table>\nsecond line"


def markdown_tables(text):
    """Return tables as lists of rows; a `|` counts unless it is escaped."""
    tables, current = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            current.append(re.split(r"(?<!\\)\|", line)[1:-1])
        elif current:
            tables.append(current)
            current = []
    return tables


RUNS = {
    "complete": lambda: runs.study(),
    "partial": lambda: runs.study(behaviours=("json",), planned=40),
    "one seed": lambda: runs.study(behaviours=("json",), seeds=(0,)),
    "left out": lambda: runs.study(behaviours=("json",), seeds=(0,), left_out=["shuffled", "random"]),
    "empty": lambda: runs.study(cells=[], planned=4),
    "all failed": lambda: runs.study(
        cells=[Cell(donor="a", recipient="b", behaviour="t", seed=0, state="failed", error=NASTY)], planned=1
    ),
    "nasty": lambda: runs.study(
        cells=[made(runs.CROSSING, samples=[Sample(prompt=NASTY, before=NASTY, after="```")])],
        question=NASTY, planned=1, study={"name": NASTY}, hashes={NASTY: "1"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Every run's page and twin, written once."""
    return {name: written(make(), tmp_path_factory.mktemp("report")) for name, make in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_page_loads_nothing_and_is_well_formed(reports, name):
    page, _ = reports[name]
    links = [value for key, value in page.attributes if key in ("src", "href", "srcset", "data", "action")]
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not any(value and re.search(r"https?:", value) for _, value in page.attributes)
    assert page.tags.count("h1") == 1
    assert page.tags.count("caption") == page.tags.count("table")


@pytest.mark.parametrize("name", RUNS)
def test_style_loads_nothing(reports, name):
    text = reports[name][0].source
    assert not re.search(r"@import|url\((?!#)|https?://", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "#0101" not in text
    assert "#0102" not in text  # colours that stand for the style sheet's


@pytest.mark.parametrize("name", RUNS)
def test_markdown_tables_are_well_formed(reports, name):
    _, text = reports[name]
    for table in markdown_tables(text):
        assert set(table[1]) == {" --- "}
        assert len({len(row) for row in table}) == 1
    assert "<script" not in re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", RUNS)
def test_both_tell_the_same_tables(reports, name):
    page, text = reports[name]
    told = {
        tuple(tuple(re.sub(r"\\(.)", r"\1", cell).strip() for cell in row) for i, row in enumerate(table) if i != 1)
        for table in markdown_tables(text)
    }
    for rows in page.tables.values():
        clean = tuple(tuple(cell.strip() for cell in row) for row in rows)
        if not any(mark in cell for row in clean for cell in row for mark in "<&\n"):
            assert clean in told


def test_figures_are_those_computed(reports):
    page, _ = reports["complete"]
    run = runs.study()
    cells = [cell for cell in run.cells if (cell.donor, cell.behaviour) == (runs.PAIRS[0][0], "numbered-list")]
    labels = {
        arm.method: [next(a for a in cell.arms if a.method == arm.method).labels["numbered-list"] for cell in cells]
        for arm in cells[0].arms if arm.method != "donor"
    }  # fmt: skip
    caption = f"numbered-list, {runs.PAIRS[0][0]} → {runs.PAIRS[0][1]}: numbered-list"
    _, *effects = page.tables[f"{caption}; more is the aim (share of answers: numbered lists)"]
    header, *rows = page.tables[f"{caption}, compared"]
    assert (
        [row[0] for row in rows]
        == [row[0] for row in effects]
        == [one for one in findings.ORDER if one in runs.CROSSING]
    )
    for found in compare(labels, "rate", "more"):
        assert next(row for row in effects if row[0] == found.method)[1] == tables.figure(found.score)
        row = dict(zip(header, next(row for row in rows if row[0] == found.method), strict=True))
        assert row["n"] == str(found.score.n)
        assert row["difference from unmodified"] == tables.figure(found.difference)
        assert row["adjusted p"] == tables.p_value(found.adjusted)
        assert row["recovered"] == tables.figure(found.recovered)
    kl = np.mean([next(arm for arm in cell.arms if arm.method == "pasted").price["kl_after"] for cell in cells])
    assert effects[1][3].startswith(f"{kl:.3f} [")


def test_escaped_texts(reports, tmp_path):
    page, text = reports["nasty"]
    assert "<script>alert(1)</script>" in "".join(page.text)
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; \| \`code\` \*bold\* [x]\(javascript:y)" in text
    assert "\nsecond line" not in text.split("```")[0]


def test_partial_and_failed(reports):
    page, text = reports["partial"]
    for told in ("".join(page.text), text):
        assert "2 of 40 cells are finished, 0 failed, 38 have not run" in told
    page, text = reports["all failed"]
    assert "0 of 1 cells are finished, 1 failed, 0 have not run" in "".join(page.text)
    assert "There is no answer yet" in text
    assert "alert(1)" in page.tables["Cells that failed"][1][3]
    assert "Partial: " not in "".join(reports["complete"][0].text)


def test_left_out_controls_are_told_at_the_top(reports):
    page, text = reports["left out"]
    for told in ("".join(page.text), text):
        assert told.index("Controls left out by explicit wish: shuffled, random") < told.index("share of answers")


def test_one_seed_is_said(reports):
    assert "One seed: nothing is said" in "".join(reports["one seed"][0].text)
    assert "One seed: nothing is said" not in "".join(reports["complete"][0].text)


def test_no_machine_paths(reports):
    for page, text in reports.values():
        assert "/home/someone" not in "".join(page.text) + text


def test_verdict_is_one_sentence(reports, tmp_path):
    one = runs.study(behaviours=("pirate",), seeds=(0,))
    assert (
        "**pirate does not cross gemma-3-270m → smollm2-135m-instruct: share of answers: in a pirate's speech 0.00 ["
        in (written(one, tmp_path)[1])
    )
    told = "Of 3 behaviours and pairs: 1 crosses partly; 1 crosses; 1 does not cross."
    assert all(told in text for text in ("".join(reports["complete"][0].text), reports["complete"][1]))


def test_what_a_reader_sees_first(reports):
    """A verdict, a table of what the paste did where, then a list of contents that leads to every part."""
    page, text = reports["complete"]
    _, *rows = page.tables["Verdicts on test prompts; 95 % intervals"]
    run = runs.study()
    told = [(row[0].strip(), row[1], row[2]) for row in rows]
    assert told == [
        (f"{group.behaviour}, {group.pair}", group.verdict.word, tables.figure(group.tables[0].score("pasted")))
        for group in findings.groups(run)
    ]
    assert "more is the aim (share of answers: in a pirate's speech)" in [row[-1] for row in rows]
    assert text.index("Verdicts on") < text.index("## ")
    _, *arms = reports["one seed"][0].tables[
        "json, gemma-3-270m → smollm2-135m-instruct; more is the aim (share of answers: valid JSON); 95 % intervals"
    ]
    assert [row[0] for row in arms] == [one for one in tables.SHORT if one in runs.CROSSING]


def test_run_again(reports):
    page, text = reports["complete"]
    assert "commandv study families.yaml -o families\ncommandv report families" in text
    assert page.tables["Versions"][1:] == [["python", "3.11.9"], ["commandv", "0.1.0"], ["torch", "2.13.0"]]
    assert page.tables["Hashes of prompt sets and models"][1:] == [["builtin:general", "a1b2c3d4e5f60718"]]


def test_from_a_folder(tmp_path):
    run = runs.study(cells=[runs.cell(*runs.PAIRS[0], "json", 0)], planned=1)
    save_head(run, tmp_path)
    (cell,) = run.cells
    save_cell(cell, tmp_path / "cells" / f"{cell.donor}-{cell.recipient}-{cell.behaviour}-{cell.seed}.json")
    again = write_report(load_run(tmp_path), tmp_path / "a")
    first = write_report(run, tmp_path / "b")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in first]  # the same for ever


def test_files_among_the_cells_that_are_none_of_the_study_are_told(tmp_path):
    run = runs.study(cells=[runs.cell(*runs.PAIRS[0], "json", 0)], planned=1)
    save_head(run, tmp_path)
    (cell,) = run.cells
    name = f"{cell.donor}-{cell.recipient}-{cell.behaviour}-{cell.seed}.json"
    for place in (name, "backup copy.json"):
        save_cell(cell, tmp_path / "cells" / place)
    save_cell(
        cell.model_copy(update={"seed": 5, "settings": {**cell.settings, "n": 1}}), tmp_path / "cells" / "old.json"
    )
    read = load_run(tmp_path)
    assert read.cells == [cell]
    text = write_report(read, tmp_path / "a")[1].read_text()
    warning = next(line for line in text.splitlines() if "Files not counted" in line)
    assert "backup copy.json" in warning
    assert "old.json" in warning


def test_a_file_that_is_no_report_is_not_replaced(tmp_path):
    run = runs.study(cells=[runs.cell(*runs.PAIRS[0], "json", 0)], planned=1)
    write_report(run, tmp_path)
    write_report(run, tmp_path)
    (tmp_path / "report.md").write_text("# my notes")
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(FormatError, match=r"report\.md.*choose another place"):
        write_report(run, tmp_path)
    assert (tmp_path / "report.md").read_text() == "# my notes"
    assert (tmp_path / "report.html").read_bytes() == before


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)
    with pytest.raises(InputError, match=r"commandv\[report\]"):
        write_report(runs.study(cells=[]), tmp_path)


def test_names_that_a_plotting_library_would_take_for_formulas(tmp_path):
    run = runs.study(behaviours=("numbered-list",), seeds=(0,))
    names = {"pasted": "$x^{", "random": r"$\notacommand{x}$"}
    cells = [
        cell.model_copy(
            update={"arms": [arm.model_copy(update={"method": names.get(arm.method, arm.method)}) for arm in cell.arms]}
        )
        for cell in run.cells
    ]
    page, _ = write_report(run.model_copy(update={"cells": cells}), tmp_path)
    assert "$x^{" in page.read_text("utf-8")


def test_results_that_no_report_can_be_made_of_are_refused(tmp_path):
    run = runs.study(behaviours=("numbered-list",), seeds=(0,))
    with pytest.raises(FormatError, match="half of a surrogate pair"):
        write_report(run.model_copy(update={"question": "why \ud800?"}), tmp_path)
    cell = run.cells[0].model_copy(update={"fidelity": {"pasted": [{"donor": 1.0}]}})
    with pytest.raises(FormatError, match="lacks the layers of a pair"):
        write_report(run.model_copy(update={"cells": [cell]}), tmp_path)
