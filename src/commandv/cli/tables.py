"""Tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from commandv.evaluation.scores import Score
from commandv.evaluation.statistics import Comparison


def _table(title: str) -> Table:
    """Return an empty table, so close that ten columns fit a terminal of 80."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)


def fidelity_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the fidelity of each layer pair as a table."""
    title = "Converters on unseen prompts (R²: 1 perfect, 0 the mean; its: the adapter's)"
    table = _table(title)
    columns = {
        "layers": "layers",
        "n": "n",
        "read_r2": "read R²",
        "write_r2": "write R²",
        "read_cosine": "read cos",
        "write_cosine": "write cos",
        "cycle_error": "cycle error",
        "adapter_read_r2": "its reads R²",
        "adapter_write_r2": "its writes R²",
    }
    for header in columns.values():
        table.add_column(header, justify="right", no_wrap=header == "layers")
    for row in rows:
        cells = [f"{row['donor']} -> {row['recipient']}", str(row["n"])]
        table.add_row(*cells, *(f"{row[name]:.2f}" for name in list(columns)[2:]))
    return table


def arms_table(
    title: str,
    rows: Sequence[Comparison],
    *,
    price: Mapping[str, Mapping[str, Score]],
    loops: Mapping[str, Score],
    words: Mapping[str, float],
) -> Table:
    """Return arms with effect and price together.

    Args:
        title: of the table.
        rows: from `compare`.
        price: arm -> measure -> what it costs on benign text.
        loops: arm -> share of answers that loop.
        words: arm -> mean length of its answers.
    """
    unit, n = rows[0].score.unit, "/".join(dict.fromkeys(str(row.score.n) for row in rows))
    table = _table(f"{title}; n = {n}, 95 % intervals, p by Holm, KL in nats per token")
    table.add_column("", min_width=9)
    for header in (unit, "difference", "recovered", "loops", "words", "KL 1st", "KL after"):
        table.add_column(header, justify="right", no_wrap=header in (unit, "difference", "recovered"))
    for row in rows:
        cost = price.get(row.method, {})
        p = "" if row.adjusted is None else f"\np = {row.adjusted:.3f}" if row.adjusted >= 0.001 else "\np < .001"
        table.add_row(
            row.method,
            _with_interval(row.score),
            _with_interval(row.difference) + p,
            _with_interval(row.recovered),
            f"{loops[row.method].value:.2f}",
            f"{words[row.method]:.0f}",
            *(_short(cost[name].value) if name in cost else "" for name in ("kl_first", "kl_after")),
        )
    return table


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _with_interval(score: Score | None) -> str:
    """Return a figure and its interval without zeros before the point, which take the room of a column."""
    told = "" if score is None else f"{score.value:.2f}\n[{score.low:.2f}, {score.high:.2f}]"
    return re.sub(r"(?<!\d)0(?=\.)", "", told)


def certificate_table(certificate: Mapping[str, Any]) -> Table:
    """Return what a certificate says of every arm."""
    arms, task = certificate["arms"], certificate["task"]
    table = _table(f"{task['name']}: {task['success']} is the aim; n = {task['n_test']}, 95 % intervals")
    table.add_column("", no_wrap=True)
    for header in (task["unit"], "loops", "KL 1st", "KL after", "tokens"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm, facts in arms.items():
        score, price = facts["score"], facts["price"]
        name = f"{arm} ({certificate['by']})" if arm == certificate["arm"] else arm
        table.add_row(
            name,
            f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]",
            f"{facts['loops']['value']:.2f}",
            *(f"{price[one]['value']:.2f}" if one in price else "" for one in ("kl_first", "kl_after")),
            f"{facts['tokens_per_request']:.0f}",
        )
    return table


def tried_table(title: str, tried: Sequence[Any], chosen: Any) -> Table:
    """Return the settings that were tried, `Tried`, the chosen one marked."""
    table = _table(title)
    for header in ("layers", "scale", "effect", "KL", "loops", ""):
        table.add_column(header, justify="left" if header in ("layers", "") else "right")
    for one in tried:
        loops = "" if one.loops is None else f"{one.loops:.2f}"
        mark = "chosen" if one is chosen else ""
        table.add_row(one.setting.layers, f"{one.setting.scale:g}", f"{one.value:.2f}", f"{one.kl:.2f}", loops, mark)
    return table


def rehearsal_table(pair: str, stages: Sequence[Any]) -> Table:
    """Return what each stage of a rehearsal took, and comes to at full depth and between models of 70B."""
    table = _table(f"{pair}: as measured, at full depth, and between two models of 70B")
    table.add_column("", no_wrap=True)
    for header in ("s", "MB", "full: s", "MB", "70B: s", "MB"):
        table.add_column(header, justify="right", no_wrap=True)
    for one in stages:
        figures = (one.seconds, one.bytes, one.full_seconds, one.full_bytes, one.large_seconds, one.large_bytes)
        told = ("" if value is None else _figure(value / (1e6 if i % 2 else 1)) for i, value in enumerate(figures))
        table.add_row(one.stage, *told)
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"
