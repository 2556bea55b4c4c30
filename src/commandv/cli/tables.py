"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from commandv.evaluation.scores import Score
from commandv.evaluation.statistics import Comparison


def fidelity_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the fidelity of each layer pair as a table."""
    title = "Converters on unseen prompts (R²: 1 perfect, 0 the mean; its: the adapter's)"
    table = Table(title=title, title_justify="left")
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


def score_table(title: str, rows: Sequence[tuple[str, Score, Score | None]]) -> Table:
    """Return rates with intervals beside their drift; the second score of a row may be missing."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for header in ("rate", "95 % interval", "n", "benign drift, nats/token"):
        table.add_column(header, justify="right")
    for name, behaviour, cost in rows:
        drifted = "0 (reference)" if cost is None else f"{cost.value:.3f} [{cost.low:.3f}, {cost.high:.3f}]"
        interval = f"{behaviour.low:.2f} to {behaviour.high:.2f}"
        table.add_row(name, f"{behaviour.value:.2f}", interval, str(behaviour.n), drifted)
    return table


def comparison_table(
    title: str, rows: Sequence[Comparison], price: Mapping[str, Score], loops: Mapping[str, Score]
) -> Table:
    """Return arms with their figures, the share of answers that loop, what tells them from the first, their drift."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    headers = (
        rows[0].score.unit,
        "95 % interval",
        "n",
        "loops",
        "difference",
        "p (Holm)",
        "recovered",
        "drift, nats/token",
    )
    for header in headers:
        table.add_column(header, justify="right")
    for row in rows:
        score, cost = row.score, price.get(row.method)
        table.add_row(
            row.method,
            f"{score.value:.2f}",
            f"{score.low:.2f} to {score.high:.2f}",
            str(score.n),
            f"{loops[row.method].value:.2f}",
            _with_interval(row.difference),
            "" if row.adjusted is None else f"{row.adjusted:.3f}" if row.adjusted >= 0.001 else "< .001",
            _with_interval(row.recovered),
            _with_interval(cost),
        )
    return table


def _with_interval(score: Score | None) -> str:
    return "" if score is None else f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"
