"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
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


def arms_table(
    title: str,
    rows: Sequence[Comparison],
    *,
    price: Mapping[str, Mapping[str, Score]],
    loops: Mapping[str, Score],
    words: Mapping[str, float],
    tokens: Mapping[str, float] | None = None,
) -> Table:
    """Return arms with effect and price together.

    Args:
        title: of the table.
        rows: from `compare`.
        price: arm -> measure -> what it costs on benign text.
        loops: arm -> share of answers that loop.
        words: arm -> mean length of its answers.
        tokens: arm -> tokens that it adds to every request; without it there is no such column.
    """
    unit, n = rows[0].score.unit, "/".join(dict.fromkeys(str(row.score.n) for row in rows))
    table = Table(
        title=f"{title}; n = {n}, 95 % intervals, p by Holm, KL in nats per token",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    headers = [unit, "difference", "p", "recovered", "loops", "words", "KL 1st", "KL after"]
    for header in [*headers, *(["tokens"] if tokens is not None else [])]:
        table.add_column(header, justify="right", no_wrap=header in (unit, "difference", "recovered"))
    for row in rows:
        cost = price.get(row.method, {})
        cells = [
            _with_interval(row.score),
            _with_interval(row.difference),
            "" if row.adjusted is None else f"{row.adjusted:.3f}" if row.adjusted >= 0.001 else "< .001",
            _with_interval(row.recovered),
            f"{loops[row.method].value:.2f}",
            f"{words[row.method]:.0f}",
            *(f"{cost[name].value:.2f}" if name in cost else "" for name in ("kl_first", "kl_after")),
        ]
        if tokens is not None:
            cells.append(f"{tokens.get(row.method, 0):.0f}")
        table.add_row(row.method, *cells)
    return table


def _with_interval(score: Score | None) -> str:
    return "" if score is None else f"{score.value:.2f}\n[{score.low:.2f}, {score.high:.2f}]"
