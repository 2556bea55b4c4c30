"""Curves and converters over seeds: effect against price, and held-out R² by layer pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from commandv.adapters.edit import MOST_LAYERS
from commandv.errors import FormatError
from commandv.evaluation.report.findings import Group, Success
from commandv.evaluation.results import Cell

READ, WRITE = "read_r2", "write_r2"
QUALITIES = {
    READ: "read R²",
    WRITE: "write R²",
    "read_cosine": "read cos",
    "write_cosine": "write cos",
    "cycle_error": "cycle error",
    "adapter_read_r2": "adapter's reads R²",
    "adapter_write_r2": "adapter's writes R²",
    "native_cosine": "cosine to the recipient's own",
}


class Tried(NamedTuple):
    """One setting on the development split, averaged over seeds.

    Attributes:
        method: whose strength it is.
        layers: layer choice by name.
        scale: factor on the deltas.
        value: effect.
        kl: price, nats per token.
        seeds: that tried it.
        chosen: seeds that chose it.
        front: no setting of any method has as much effect for less.
    """

    method: str
    layers: str
    scale: float
    value: float
    kl: float
    seeds: int
    chosen: int
    front: bool


class Fit(NamedTuple):
    """One layer pair's converters on unseen prompts, averaged over seeds; `values` by the keys of `QUALITIES`."""

    behaviour: str
    method: str
    donor: int
    recipient: int
    n: int
    values: dict[str, float]


def tried(cells: Sequence[Cell], success: Success) -> list[Tried]:
    """Return the settings that were tried, by method and layers, then by scale."""
    found: dict[tuple[str, str, float], list[tuple[float, float, bool]]] = {}
    for cell in cells:
        for point in cell.curve:
            key = (point.method, point.layers, point.scale)
            found.setdefault(key, []).append((point.value, point.kl, point.chosen))
    rows = []
    for key, points in found.items():
        value, kl = (float(np.mean([point[i] for point in points])) for i in (0, 1))
        rows.append(Tried(*key, value, kl, len(points), sum(point[2] for point in points), False))
    sign = 1 if success == "more" else -1
    rows = [row._replace(front=not any(_better(other, row, sign) for other in rows)) for row in rows]
    order = list(dict.fromkeys((row.method, row.layers) for row in rows))
    return sorted(rows, key=lambda row: (order.index((row.method, row.layers)), row.scale))


def _better(a: Tried, b: Tried, sign: int) -> bool:
    """Tell whether a has as much effect for as little, and more of one."""
    effect, price = sign * (a.value - b.value), b.kl - a.kl
    return effect >= 0 and price >= 0 and (effect > 0 or price > 0)


def shape(points: Sequence[Tried]) -> str:
    """Say in words how the effect goes along the scales of one method and layer choice."""
    if len(points) < 2:
        return "one setting only, so nothing can be said of the curve's shape"
    steps = [b.value - a.value for a, b in itertools.pairwise(points)]
    if not all(map(math.isfinite, steps)):
        return "not known at every scale, so nothing can be said of the curve's shape"
    first, last = points[0], points[-1]
    ends = f"from {first.value:.2f} at scale {first.scale:g} to {last.value:.2f} at scale {last.scale:g}"
    if all(step == 0 for step in steps):
        return f"level: {first.value:.2f} at every scale from {first.scale:g} to {last.scale:g}"
    if all(step >= 0 for step in steps):
        return f"monotone: never falls, {ends}"
    if all(step <= 0 for step in steps):
        return f"monotone: never rises, {ends}"
    top, bottom = max(points, key=lambda one: one.value), min(points, key=lambda one: one.value)
    return (
        f"not monotone: {ends}, highest {top.value:.2f} at scale {top.scale:g}, "
        f"lowest {bottom.value:.2f} at scale {bottom.scale:g}"
    )


def lines(points: Sequence[Tried]) -> dict[tuple[str, str], list[Tried]]:
    """Return the settings by (method, layers)."""
    grouped: dict[tuple[str, str], list[Tried]] = {}
    for point in points:
        grouped.setdefault((point.method, point.layers), []).append(point)
    return grouped


def fits(groups: Sequence[Group]) -> list[Fit]:
    """Return the converters' quality for one pair, averaged over seeds."""
    found: dict[tuple[str, str, int, int], list[dict[str, float]]] = {}
    for group in groups:
        for cell in group.cells:
            for method, rows in cell.fidelity.items():
                for row in rows:
                    if not all(0 <= row.get(name, -1) <= MOST_LAYERS for name in ("donor", "recipient")):
                        raise FormatError(
                            f"a cell of {group.behaviour}: its fidelity of {method} lacks the layers of a pair; "
                            "remove the cell's file, the study makes it again"
                        )
                    key = (group.behaviour, method, int(row["donor"]), int(row["recipient"]))
                    found.setdefault(key, []).append(row)
    return [
        Fit(
            *key,
            int(rows[0].get("n", 0)),
            {name: _mean([row.get(name, math.nan) for row in rows]) for name in QUALITIES},
        )
        for key, rows in found.items()
    ]


def by_layer(found: Sequence[Fit], quality: str) -> dict[str, dict[int, float]]:
    """Return method -> recipient layer -> mean over behaviours and donor layers."""
    values: dict[str, dict[int, list[float]]] = {}
    for fit in found:
        values.setdefault(fit.method, {}).setdefault(fit.recipient, []).append(fit.values[quality])
    return {method: {layer: _mean(layers[layer]) for layer in sorted(layers)} for method, layers in values.items()}


def by_pair(found: Sequence[Fit], quality: str, method: str) -> dict[tuple[int, int], float]:
    """Return (donor layer, recipient layer) -> mean over behaviours, of one method."""
    values: dict[tuple[int, int], list[float]] = {}
    for fit in found:
        if fit.method == method:
            values.setdefault((fit.donor, fit.recipient), []).append(fit.values[quality])
    return {pair: _mean(values[pair]) for pair in sorted(values)}


def _mean(values: Sequence[float]) -> float:
    given = [value for value in values if math.isfinite(value)]
    return float(np.mean(given)) if given else math.nan
