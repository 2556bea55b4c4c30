from __future__ import annotations

import html.parser
import re
import sys

import numpy as np
import pytest

import runs
from commandv.errors import FormatError, InputError
from commandv.evaluation import rate, verdicts
from commandv.evaluation.catalogue import TASKS, meaning
from commandv.evaluation.report import findings, tables, write_report
from commandv.evaluation.results import Arm, Cell, Sample, load_run, save_cell, save_head
from commandv.evaluation.statistics import compare
from commandv.evaluation.tuning import Setting, Tried

NASTY = "<script>alert(1)</script> | `code` *bold* [x](javascript:y) & </table>\nsecond line"
VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use"}


class Page(html.parser.HTMLParser):
    """Collects what the tests look at; complains of tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.text = [], [], [], [], []
        self.tables, self.rows = {}, []
        self.source = text
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if "caption" in self.open and data.strip():
            self.caption = data
        elif {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data


def written(run, tmp_path):
    page, twin = write_report(run, tmp_path)
    return Page(page.read_text("utf-8")), twin.read_text("utf-8")


def one_table(cells, task="t"):
    run = runs.study(cells=cells, planned=len(cells))
    return findings.groups(run)[0].tables[0]


def made(rates, *, seed=0, unit="rate", success="more", **changes):
    arms = runs.arms(rates, "t", np.random.default_rng(seed), unit=unit)
    content = {"arms": arms, "settings": {"success": {"t": success}}}
    return Cell(donor="a", recipient="b", behaviour="t", seed=seed, **(content | changes))


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


def test_every_task_says_in_words_what_its_rate_is():
    assert {name for name, entry in TASKS.items() if not entry.means} == {"length"}
    assert meaning("over-refusal:mine", "rate") == "share of answers: refused"
    assert meaning("juggling", "rate") == "share of answers"
    assert meaning("length", "words") == "words"


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


def test_numbers():
    told = [(0.126, "0.13"), (-0.001, "0.00"), (1234.5, "1234"), (3.03e9, "3.0e+09"), (float("inf"), "∞")]
    assert [tables.number(value) for value, _ in told] == [text for _, text in told]


def test_layer_ranges():
    assert tables.layer_ranges([1, 2, 4, 6, 7, 8]) == "1, 2, 4, 6 to 8"
    assert tables.layer_ranges([]) == "–"


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
