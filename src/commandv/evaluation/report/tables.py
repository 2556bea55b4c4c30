"""Findings as tables of text, from which the page and its Markdown twin are both written, so that they agree."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from commandv.adapters.outline import MOST_LAYERS
from commandv.errors import FormatError
from commandv.evaluation.arms import DIRECT, FEW_SHOT, PASTED, RANDOM, UNMODIFIED
from commandv.evaluation.catalogue import meaning
from commandv.evaluation.report.findings import Group, Row, Table
from commandv.evaluation.results import Cell, Run
from commandv.evaluation.scores import Score
from commandv.evaluation.verdicts import DONOR
from commandv.evaluation.versions import VERSIONS

NONE = "–"
SHORT = (UNMODIFIED, PASTED, RANDOM, FEW_SHOT, DIRECT, DONOR)  # arms of the first table
MEASURES = {
    "kl": "KL, nats/token",
    "kl_first": "KL at the first token",
    "kl_after": "KL after it",
    "perplexity_first": "perplexity at the first token",
    "perplexity_after": "perplexity after it",
    "loops": "loops",
    "words": "words",
}
_PATH = re.compile(r"(?<![\w./~>])(?:[A-Za-z]:[\\/]|/(?!/)|~/)(?:[^\s\\/'\":,;|()<>]+[\\/])+([^\s\\/'\":,;|()<>]*)")
_FILE_URL = re.compile(r"file://\S*/(\S+)")


class Grid(NamedTuple):
    """A table of text; the first column heads its rows."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def portable(text: str) -> str:
    """Return a text with absolute paths cut down to their last part: where a file lay on one machine helps nobody."""
    text = _FILE_URL.sub(lambda found: f"…/{found[1]}", text)
    return _PATH.sub(lambda found: f"…/{found[1]}", text)


def number(value: float, digits: int = 2) -> str:
    """Format a figure; infinity and unknown as such."""
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    text = f"{value:.{digits if abs(value) < 1000 else 0}f}"
    return text.removeprefix("-") if not float(text) else text


def figure(score: Score | None, digits: int = 2) -> str:
    """Format a figure with its 95 % interval."""
    if score is None:
        return NONE
    return f"{number(score.value, digits)} [{number(score.low, digits)}, {number(score.high, digits)}]"


def p_value(p: float | None) -> str:
    """Format a p-value."""
    return NONE if p is None else "< .001" if p < 0.001 else f"{p:.3f}"


def layer_ranges(layers: Sequence[int]) -> str:
    """Write layers as ranges: 20, 22 to 25."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{one[0]} to {one[-1]}" if len(one) > 2 else ", ".join(map(str, one)) for one in runs) or NONE


def summary(groups: Sequence[Group]) -> tuple[Grid, Table | None]:
    """Return what a reader should see first, as a table and as what its figure shows.

    Of one behaviour and pair its arms; of several what the paste did in each, beside the figures it is judged by.
    """
    told = [(group, group.tables[0]) for group in groups if group.tables]
    if len(groups) == 1 and told:
        ((group, table),) = told
        rows = [row for row in table.rows if row.arm in SHORT]
        lines = [[row.arm, figure(row.found.score if row.found else None), _price(row, "kl")] for row in rows]
        caption = f"{group.behaviour}, {group.pair}; {_aim(table)}; 95 % intervals"
        return Grid(caption, ["arm", meaning(table.task, table.unit), f"price: {MEASURES['kl']}"], lines), table
    lines, rows = [], []
    for group, table in told:
        by_arm = {row.arm: row for row in table.rows}
        pasted, name = by_arm.get(PASTED), f"{group.behaviour}, {group.pair}"
        lines.append([
            name, group.verdict.word, figure(table.score(PASTED)),
            number(pasted.price["kl"].value) if pasted and "kl" in pasted.price else NONE,
            *(figure(table.score(arm)) for arm in (UNMODIFIED, RANDOM, DIRECT)),
            _aim(table),
        ])  # fmt: skip
        if pasted and table.unit == "rate":
            rows.append(pasted._replace(arm=name))
    header = ["", "verdict", PASTED, "price (KL)", UNMODIFIED, RANDOM, DIRECT, "what is counted"]
    shown = replace(told[0][1], rows=rows, unit="rate") if rows else None
    return Grid("Verdicts on test prompts; 95 % intervals", header, lines), shown


def effect_and_price(group: Group, table: Table) -> Grid:
    """Return what every arm does and what it costs, a row each."""
    measures = [name for name in MEASURES if name != "kl" and any(name in row.price for row in table.rows)]
    header = [
        "arm",
        "share of answers" if table.unit == "rate" else table.unit,
        *(MEASURES.get(name, name) for name in measures),
    ]
    rows = [
        [row.arm, figure(row.found.score if row.found else None), *(_price(row, name) for name in measures)]
        for row in table.rows
    ]
    return Grid(f"{group.behaviour}, {group.pair}: {table.task}; {_aim(table)}", header, rows)


def comparisons(group: Group, table: Table) -> Grid:
    """Return how every arm compares with the unmodified recipient, and at which setting it acted."""
    header = ["arm", "n", "by seed", "difference from unmodified", "adjusted p", "recovered", "scale", "layers"]
    rows = []
    for row in table.rows:
        found = row.found
        rows.append(
            [
                row.arm,
                str(found.score.n) if found else "0",
                ", ".join(map(number, row.by_seed)) or NONE,
                figure(found.difference) if found else NONE,
                p_value(found.adjusted) if found else NONE,
                figure(found.recovered) if found else NONE,
                NONE if row.arm == UNMODIFIED else ", ".join(f"{one:g}" for one in row.scales),
                layer_ranges(row.layers),
            ]
        )
    return Grid(f"{group.behaviour}, {group.pair}: {table.task}, compared", header, rows)


def tried(group: Group) -> Grid:
    """Return the settings that were tried on the development split, averaged over seeds."""
    points: dict[tuple[str, str, float], list[tuple[float, float, bool]]] = {}
    for cell in group.cells:
        settings = {arm.method: arm.setting for arm in cell.arms}
        for method, many in cell.curve.items():
            for one in many:
                at, rows_used = one.setting, f", {one.setting.rows} rows" if one.setting.rows else ""
                key = (method, at.layers + rows_used, at.scale)
                points.setdefault(key, []).append((one.value, one.kl, settings.get(method) == at))
    rows = [
        [method, layers, f"{scale:g}", number(_mean([one[0] for one in found])),
         number(_mean([one[1] for one in found]), 3), f"{sum(one[2] for one in found)} of {len(found)}"]
        for (method, layers, scale), found in points.items()
    ]  # fmt: skip
    caption = f"{group.behaviour}, {group.pair}: settings tried on development prompts"
    return Grid(caption, ["arm", "layers", "scale", "effect", MEASURES["kl"], "chosen"], rows)


def fits(group: Group) -> Grid:
    """Return the converters' quality on prompts that they were not fitted on, averaged over seeds."""
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for cell in group.cells:
        for method, rows in cell.fidelity.items():
            for row in rows:
                if not all(0 <= row.get(side, -1) <= MOST_LAYERS for side in ("donor", "recipient")):
                    raise FormatError(
                        f"a cell of {group.behaviour}: its fidelity of {method} lacks the layers of a pair; remove the "
                        "cell's file, the study makes it again"
                    )
                found.setdefault((method, int(row["donor"]), int(row["recipient"])), []).append(row)
    names = [name for name in dict.fromkeys(name for rows in found.values() for row in rows for name in row)
             if name not in ("donor", "recipient", "n")]  # fmt: skip
    lines = [
        [
            method,
            f"{donor} → {recipient}",
            *(number(_mean([row.get(name, math.nan) for row in rows])) for name in names),
        ]
        for (method, donor, recipient), rows in found.items()
    ]
    caption = f"{group.behaviour}, {group.pair}: converters on held-out prompts, by layer pair"
    return Grid(caption, ["arm", "layers", *(name.replace("_", " ") for name in names)], lines)


def failed(run: Run) -> Grid:
    """Return the cells that failed with their errors."""
    rows = [[*_place(cell), portable(cell.error) or "no message"] for cell in run.cells if cell.state == "failed"]
    return Grid("Cells that failed", ["behaviour", "pair", "seed", "error"], rows)


def provenance(run: Run) -> list[Grid]:
    """Return what is needed to run the study again, beside the study itself."""
    cells = [[*_place(cell), cell.state, f"{cell.seconds:.0f}", str(cell.settings.get("content", NONE))]
             for cell in run.cells]  # fmt: skip
    return [
        Grid("Versions", ["what", "version"], [[name, value] for name, value in run.versions.items()]),
        Grid("Hashes of prompt sets and models", ["what", "hash"], [[portable(a), b] for a, b in run.hashes.items()]),
        Grid("Cells", ["behaviour", "pair", "seed", "state", "seconds", "hash of settings"], cells),
    ]


def warnings(run: Run) -> list[str]:
    """Return what must be said before any figure."""
    found = []
    done = sum(cell.state == "done" for cell in run.cells)
    if done < run.planned:
        left = max(run.planned - len(run.cells), 0)
        counts = f"{done} of {run.planned} cells are finished, {len(run.cells) - done} failed, {left} have not run"
        found.append(f"Partial: {counts}. Figures cover the finished cells only.")
    if older := older_code(run):
        found.append(f"Measured by older versions of the code ({older}): the present ones may find something else.")
    if run.ignored:
        told = "; ".join(f"{name} ({reason})" for name, reason in list(run.ignored.items())[:5])
        found.append(f"Files not counted, because they are none of this study's ({len(run.ignored)}): {told}.")
    if run.left_out:
        found.append(f"Controls left out by explicit wish: {', '.join(run.left_out)}. What they would have ruled out "
                     "is not ruled out.")  # fmt: skip
    if any(cell.settings.get("rehearsed") is not None for cell in run.cells):
        found.append("Rehearsal: the models have random weights; this run proves plumbing, its figures mean nothing.")
    return found


def older_code(run: Run) -> str:
    """Return which parts of the code that measured a run have changed since, empty for none."""
    known = [cell.settings.get("versions") or {} for cell in run.cells if cell.state == "done"]
    behind = {part: min(int(one.get(part, 0)) for one in known) for part in VERSIONS} if known else {}
    return ", ".join(f"{part} {n or 'unknown'} < {VERSIONS[part]}" for part, n in behind.items() if n < VERSIONS[part])


def _aim(table: Table) -> str:
    return f"{table.success} is the aim ({meaning(table.task, table.unit)})"


def _price(row: Row, measure: str) -> str:
    if row.arm == UNMODIFIED and measure not in row.price and measure.startswith("kl"):
        return "0 (reference)"
    return figure(row.price.get(measure), 1 if measure.startswith("perplexity") else 3)


def _place(cell: Cell) -> list[str]:
    return [cell.behaviour, f"{cell.donor} → {cell.recipient}", str(cell.seed)]


def _mean(values: Sequence[float]) -> float:
    given = [value for value in values if math.isfinite(value)]
    return float(np.mean(given)) if given else math.nan
