"""The report of a study: one HTML page that loads nothing, and the same facts as Markdown."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from commandv.errors import FormatError
from commandv.evaluation.arms import PASTED, UNMODIFIED
from commandv.evaluation.catalogue import meaning
from commandv.evaluation.report import tables
from commandv.evaluation.report.figure import effect_against_price, require_matplotlib
from commandv.evaluation.report.findings import Group, Table, groups
from commandv.evaluation.report.tables import Grid
from commandv.evaluation.results import Run
from commandv.evaluation.verdicts import ALPHA, PLURAL, WHOLE
from commandv.storage.files import require_file, write_text

__all__ = ["markdown", "require_report_place", "write_report"]

_MARKS = {"report.html": b'<p class="kind">Command-V study', "report.md": b"\nCommand-V study "}  # what tells a report
_SPECIAL = re.compile(r"([\\`*_|~$]|(?<=\])[(\[:])")  # a bracket alone is harmless; what follows it makes a link


def write_report(run: Run, out: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` of a run, complete or not, into a directory; return their paths.

    Neither holds more than the run does: the HTML file has its style and figures inside and loads nothing. Absolute
    paths in settings and errors are cut down to their last part.

    Raises:
        InputError: matplotlib is not installed.
        FormatError: `report.html` or `report.md` is there and no report of ours.
        StorageError: the directory cannot be written.
    """
    require_matplotlib()
    require_report_place(out)
    facts = _facts(run)
    page, twin = out / "report.html", out / "report.md"
    write_text(page, _environment(html=True).get_template("report.html.j2").render(facts))
    write_text(twin, _rendered(facts))
    return page, twin


def markdown(run: Run) -> str:
    """Return the Markdown report of a run, which has no figures and needs no matplotlib."""
    return _rendered(_facts(run))


def _rendered(facts: dict[str, Any]) -> str:
    text = _environment(html=False).get_template("report.md.j2").render(facts)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def require_report_place(out: Path) -> None:
    """Raise `FormatError` when writing a report to `out` would destroy anything but a report."""
    for name, mark in _MARKS.items():
        file = out / name
        require_file(file)
        if file.exists() and file.stat().st_size and mark not in file.read_bytes():
            raise FormatError(f"{file}: is there and no report of a study, so it is not replaced; choose another place")


def _facts(run: Run) -> dict[str, Any]:
    found = groups(run)
    summary, shown = tables.summary(found)
    study = yaml.safe_dump(run.study, sort_keys=False, allow_unicode=True, width=100) if run.study else ""
    return {
        "run": run,
        "question": run.question or f"Study {run.name}",
        "verdict": _verdict(found),
        "warnings": tables.warnings(run),
        "summary": summary,
        "shown": shown,
        "groups": [_group_facts(group, f"g{i}") for i, group in enumerate(found)],
        "failed": tables.failed(run),
        "commands": f"commandv study {shlex.quote(run.name + '.yaml')} -o {shlex.quote(run.name)}\n"
        f"commandv report {shlex.quote(run.name)}",
        "study": tables.portable(study) or "not recorded",
        "provenance": tables.provenance(run),
        "alpha": ALPHA,
        "whole": WHOLE,
    }


def _verdict(found: Sequence[Group]) -> str:
    """Return the verdict in one sentence, made of the figures."""
    if not any(group.tables for group in found):
        return "There is no answer yet: no cell of this study has results."
    if len(found) == 1:
        (group,) = found
        table = group.tables[0]
        before, after = (tables.figure(table.score(arm)) for arm in (UNMODIFIED, PASTED))
        told = f"{meaning(table.task, table.unit)} {before} unmodified, {after} pasted"
        return f"{group.behaviour} {group.verdict.word} {group.pair}: {told}; {group.verdict.why}."
    counts = Counter(group.verdict.word for group in found)
    told = "; ".join(f"{n} {word if n == 1 else PLURAL[word]}" for word, n in counts.items())
    return f"Of {len(found)} behaviours and pairs: {told}."


def _group_facts(group: Group, name: str) -> dict[str, Any]:
    made = []
    for i, table in enumerate(group.tables):
        grid = tables.effect_and_price(group, table)
        made.append(
            {
                "of": table,
                "name": f"{name}-{i}",
                "grid": grid,
                "notes": table.notes,
                "compared": tables.comparisons(group, table),
            }
        )
    details = [grid for grid in (tables.tried(group), tables.fits(group)) if grid.rows]
    samples = [(cell.seed, sample) for cell in group.cells for sample in cell.samples]
    return {"name": name, "group": group, "tables": made, "details": details, "samples": samples}


def _drawn(table: Table | None, grid: Grid, name: str) -> Markup:
    """Return the figure of a table, with its words for those who cannot see it; empty where there is none."""
    label = f"Effect against price: {grid.caption}. " + "; ".join(": ".join(row[:2]) for row in grid.rows)
    return Markup(effect_against_price(table, label, name) if table else "")


def _environment(*, html: bool) -> jinja2.Environment:
    folder = resources.files("commandv.evaluation.report") / "templates"
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")), autoescape=html,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.globals["drawn"] = _drawn
    if not html:
        made.finalize = lambda value: value if isinstance(value, Markup) else _escape(str(value))
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
