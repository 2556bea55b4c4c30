"""Figures with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from commandv.errors import InputError


class Score(NamedTuple):
    """A measured figure with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str = "rate"


def rate(name: str, outcomes: Sequence[bool]) -> Score:
    """Return the share of True with its 95 % Wilson interval.

    Raises:
        InputError: no outcomes.
    """
    if not len(outcomes):
        raise InputError(f"{name}: no outcomes to take a rate of")
    hits = sum(map(bool, outcomes))
    interval = stats.binomtest(hits, len(outcomes)).proportion_ci(0.95, method="wilson")
    return Score(name, hits / len(outcomes), float(interval.low), float(interval.high), len(outcomes))


def mean(name: str, values: Sequence[float], unit: str) -> Score:
    """Return the mean with its 95 % interval (Student's t).

    Raises:
        InputError: no values.
    """
    if not len(values):
        raise InputError(f"{name}: no values to take a mean of")
    array = np.asarray(values, np.float64)
    centre, n = float(array.mean()), len(array)
    margin = float(stats.t.ppf(0.975, n - 1) * array.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    return Score(name, centre, centre - margin, centre + margin, n, unit)
