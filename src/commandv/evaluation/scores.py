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
    share = sum(map(bool, outcomes)) / len(outcomes)
    return Score(name, share, *wilson(share, len(outcomes)), len(outcomes))


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share: all p with |share - p| <= z sqrt(p (1 - p) / n).

    Args:
        share: observed, 0 to 1.
        n: number of outcomes; need not be whole, so that clustered outcomes can count as the fewer that they are worth.
    """
    z2 = float(stats.norm.ppf(0.975)) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    margin = (z2 * (share * (1 - share) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
    # The formula gives 0 and 1 at the ends only up to rounding; the share itself must lie inside.
    return max(0.0, min(share, centre - margin)), min(1.0, max(share, centre + margin))


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


def geometric_mean(name: str, logs: Sequence[float], unit: str) -> Score:
    """Return exp of the mean of logarithms and of its 95 % interval (Student's t), as perplexities are averaged.

    Infinity where it is too large: a ruined model's interval may reach anywhere.

    Raises:
        InputError: no values.
    """
    score = mean(name, logs, unit)
    with np.errstate(over="ignore"):
        value, low, high = np.exp(np.array([score.value, score.low, score.high])).tolist()
    return score._replace(value=value, low=low, high=high)
