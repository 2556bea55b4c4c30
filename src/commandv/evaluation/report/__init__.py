"""The report of a study: one HTML file that loads nothing, and the same facts as Markdown."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from commandv.errors import FormatError
from commandv.evaluation.report import curves, figures, wording
from commandv.evaluation.report.findings import ALPHA, WHOLE, Group, Table, groups
from commandv.evaluation.report.wording import Grid
from commandv.evaluation.results import Run
from commandv.files import require_file, write_text

__all__ = ["require_report_place", "write_report"]

_MARKS = {"report.html": b'<p class="kind">Command-V study', "report.md": b"\nCommand-V study "}  # what tells a report

_SPECIAL = re.compile(r"([\\`*_|~$]|(?<=\])[(\[:])")  # a bracket alone is harmless; what follows it makes a link


def write_report(run: Run, out: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.md`.

    Neither holds more than the run does: the HTML file has its style and figures inside and loads nothing. Absolute
    paths in settings and errors are cut down to their last part.

    Args:
        run: complete or not; see `load_run`.
        out: directory for both.

    Returns:
        The paths of the HTML file and of its Markdown twin.

    Raises:
        InputError: matplotlib is not installed.
        FormatError: `report.html` or `report.md` is there and no report of ours.
        StorageError: the directory cannot be written.
    """
    figures.require_matplotlib()
    require_report_place(out)
    facts = _facts(run)
    page, twin = out / "report.html", out / "report.md"
    write_text(page, _html().get_template("report.html.j2").render(facts))
    text = _markdown().get_template("report.md.j2").render(facts)
    write_text(twin, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return page, twin


def require_report_place(out: Path) -> None:
    """Raise `FormatError` when writing a report to `out` would destroy anything but a report."""
    for name, mark in _MARKS.items():
        file = out / name
        require_file(file)
        if file.exists() and file.stat().st_size and mark not in file.read_bytes():
            raise FormatError(f"{file}: is there and no report of a study, so it is not replaced; choose another place")


def _facts(run: Run) -> dict[str, Any]:
    found = groups(run)
    pairs = list(dict.fromkeys(group.pair for group in found))
    return {
        "run": run,
        "question": run.question or f"Study {run.name}",
        "answer": wording.answer(run, found),
        "warnings": wording.warnings(run, found),
        "verdicts": wording.verdict_grid(found) if found else None,
        "groups": [_group_facts(group, f"g{i}") for i, group in enumerate(found)],
        "fits": [
            facts
            for i, pair in enumerate(pairs)
            if (facts := _fit_facts(pair, [group for group in found if group.pair == pair], f"p{i}"))
        ],
        "failures": wording.failures(found),
        "failed": wording.failed_grid(run),
        "again": _again(run),
        "meanings": wording.MEANINGS,
        "alpha": ALPHA,
        "whole": WHOLE,
    }


def _group_facts(group: Group, name: str) -> dict[str, Any]:
    tables = []
    for i, table in enumerate(group.tables):
        # The curve is of the behaviour's own task; further tasks are measured at the setting that it picked.
        points = curves.tried(group.cells, table.success) if i == 0 else []
        label = f"Effect against price, {group.behaviour}, {group.pair}, {table.task}: {_figure_words(table)}"
        tables.append(
            {
                "grid": wording.method_grid(group, table),
                "notes": wording.table_notes(table),
                "curve": wording.curve_grid(group, table, points) if points else None,
                "words": wording.curve_words(points),
                "figure": Markup(figures.effect_against_price(table, points, label, f"{name}-{i}")),
            }
        )
    return {
        "name": name,
        "behaviour": group.behaviour,
        "pair": group.pair,
        "verdict": group.verdict,
        "tables": tables,
        "samples": [(cell.seed, sample) for cell in group.cells for sample in cell.samples],
    }


def _figure_words(table: Table) -> str:
    """Say in words what the figure of effect against price shows."""
    told = []
    for row in table.rows:
        if row.found:
            price = f" at {wording.number(row.price['kl'].value, 3)} nats per token" if "kl" in row.price else ""
            told.append(f"{row.method} {wording.number(row.found.score.value)}{price}")
    return "; ".join(told)


def _fit_facts(pair: str, own: Sequence[Group], name: str) -> dict[str, Any] | None:
    found = curves.fits(own)
    if not found:
        return None
    sides = []
    for quality, side in ((curves.READ, "reading (recipient → donor)"), (curves.WRITE, "writing (donor → recipient)")):
        if not any(math.isfinite(one.values[quality]) for one in found):
            continue  # of vectors only the cosine is told
        words = wording.fit_words(found, quality)
        methods = [one.method for one in found]
        mapped = "pasted" if "pasted" in methods else methods[0]
        pairs = curves.by_pair(found, quality, mapped)
        by_layer = curves.by_layer(found, quality)
        floored = any(value < figures.FLOOR for layers in by_layer.values() for value in layers.values())
        lines = figures.quality_by_layer(by_layer, f"Held-out R² of {side}, {pair}: {words}", f"{name}-{quality}")
        heat = figures.heat_map(pairs, f"R² by layer pair, {side}, {pair}, {mapped}", f"{name}-{quality}-map")
        sides.append(
            {
                "side": side,
                "words": words,
                "floored": floored,
                "method": mapped,
                "lines": Markup(lines),
                "heat": Markup(heat),
            }
        )
    return {"pair": pair, "sides": sides, "grid": wording.fit_grid(pair, found), "floor": figures.FLOOR}


def _again(run: Run) -> dict[str, Any]:
    """Return what is needed to run the study again."""
    name = shlex.quote(run.name)
    study = yaml.safe_dump(run.study, sort_keys=False, allow_unicode=True, width=100) if run.study else ""
    hashes = [[wording.portable(name), value] for name, value in run.hashes.items()]
    cells = [
        [cell.behaviour, f"{cell.donor} → {cell.recipient}", f"{cell.seed}", cell.state, f"{cell.seconds:.0f}",
         str(cell.settings.get("content", wording.NONE))]
        for cell in run.cells
    ]  # fmt: skip
    return {
        "study": wording.portable(study),
        "commands": f"commandv study {shlex.quote(run.name + '.yaml')} -o {name}\ncommandv report {name}",
        "versions": Grid("Versions", ["what", "version"], [[name, value] for name, value in run.versions.items()]),
        "hashes": Grid("Hashes of prompt sets and models", ["what", "hash"], hashes),
        "cells": Grid("Cells", ["behaviour", "pair", "seed", "state", "seconds", "hash of settings"], cells),
    }


def _loader() -> jinja2.BaseLoader:
    folder = resources.files("commandv.evaluation.report") / "templates"
    return jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8"))


def _html() -> jinja2.Environment:
    return jinja2.Environment(
        loader=_loader(), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _markdown() -> jinja2.Environment:
    """Return an environment in which every value is escaped for Markdown unless it says that it is Markdown."""
    made = jinja2.Environment(
        loader=_loader(), autoescape=False, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else _escape(str(value)),
    )  # fmt: skip
    made.filters |= {"table": _table, "fenced": _fenced}
    return made


def _escape(text: str) -> str:
    """Escape a text so that Markdown shows it as it is, on one line, in a table's cell as well as anywhere else."""
    text = _SPECIAL.sub(r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return "<br>".join(line.strip() for line in text.strip().splitlines())


def _table(grid: Grid) -> Markup:
    lines = [grid.header, ["---"] * len(grid.header), *grid.rows]
    body = "\n".join(
        "| " + " | ".join(cell if i == 1 else _escape(cell) for cell in line) + " |" for i, line in enumerate(lines)
    )
    return Markup(f"*{_escape(grid.caption)}*\n\n{body}")


def _fenced(text: str, language: str = "") -> Markup:
    """Return a text as a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")
