"""The notebook: what is committed was executed and says what the text says, and it runs again."""

from __future__ import annotations

import re
from typing import NamedTuple

import nbclient
import nbformat
import pytest

import real
from places import ROOT

FILE = ROOT / "docs" / "notebooks" / "steering-across-models.ipynb"
ARMS = ["unmodified", "carried", "native", "shuffled pairs", "random"]
CONTROLS = ("unmodified", "shuffled pairs", "random")
# What makes a run of it short: the strength that was chosen, and a third of the test prompts.
SMALLER = {"SHARES = (0.05, 0.1, 0.15, 0.2)": "SHARES = (0.05,)", "N_DEV, N_TEST = 24, 48": "N_DEV, N_TEST = 2, 16"}


class Row(NamedTuple):
    value: float
    low: float
    high: float
    n: int


def printed(notebook: nbformat.NotebookNode, tag: str) -> str:
    """What the cell with a tag has printed."""
    (cell,) = [one for one in notebook.cells if tag in one.metadata.get("tags", ())]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def table(notebook: nbformat.NotebookNode) -> dict[str, Row]:
    row = re.compile(r"^(\w[\w ]*?) +(?:\d\.\d+)? +(\d\.\d+) \[(\d\.\d+), (\d\.\d+)\] +(\d+)", re.M)
    return {name: Row(*map(float, figures), int(n)) for name, *figures, n in row.findall(printed(notebook, "result"))}


def check(notebook: nbformat.NotebookNode, n: int) -> dict[str, Row]:
    """Expect a whole run on n test prompts, and return its table."""
    rows = table(notebook)
    assert list(rows) == ARMS
    assert {row.n for row in rows.values()} == {n}
    for row in rows.values():
        assert 0 <= row.low <= row.value <= row.high <= 1
    figures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(figures) == 1
    assert printed(notebook, "texts").count("  carried ") == 4
    return rows


def test_the_committed_outputs_are_of_one_whole_run():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    rows = check(notebook, 48)
    assert all(rows["carried"].low > rows[control].high for control in CONTROLS)


@pytest.mark.real
def test_it_runs_again_on_fewer_prompts():
    real.require(real.GEMMA, real.SMOL)
    notebook = nbformat.read(FILE, as_version=4)
    for text, shorter in SMALLER.items():
        (cell,) = [one for one in notebook.cells if text in one.source]
        cell.source = cell.source.replace(text, shorter)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(FILE.parent)}}).execute()
    rows = check(notebook, 16)
    assert all(rows["carried"].value > rows[control].value for control in CONTROLS)
