"""Arms compared on the same prompts: differences, tests, what a paste recovers; `scores` has the intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import optimize

from commandv.arguments import checked
from commandv.errors import InputError
from commandv.evaluation.scores import Labels, Score, aligned, contrast, cross, pooled, sides

LOWEST_P = math.log(1e-12)  # smaller ones are not told apart


class Comparison(NamedTuple):
    """One row of a table of arms.

    Attributes:
        method: the arm's name.
        score: its pooled figure, over all of its own labels.
        difference: arm minus reference over what both were judged on; None for the reference.
        p: of the paired test against the reference.
        adjusted: p after Holm's correction over the table.
        recovered: share of the direct arm's effect; None where that cannot be told.
    """

    method: str
    score: Score
    difference: Score | None = None
    p: float | None = None
    adjusted: float | None = None
    recovered: Score | None = None


@checked
def difference(name: str, a: Labels, b: Labels, unit: str) -> Score:
    """Return a minus b with its 95 % interval, paired by prompt and seed; `n` counts the prompts judged in both.

    Means: Student's t on the differences. Rates: the arms' own intervals joined, given the correlation r of their
    errors, low = a - b - sqrt(x² - 2 r x y + y²) with x = a - low(a), y = high(b) - b, and likewise upwards, which with
    one seed is Newcombe's interval.

    Args:
        name: of the score.
        a: labels of one arm, seed by seed.
        b: of the other; one seed is compared with each seed of the first.
        unit: of the labels.

    Raises:
        InputError: labels that cannot be paired.

    Source: Newcombe 1998, method 10 (its correction of r included); Zou and Donner 2008.
    """
    return contrast(name, cross({"the first arm": a, "the second arm": b}, unit), (1.0, -1.0))


@checked
def paired_p(a: Labels, b: Labels, unit: str) -> float:
    """Return the two-sided p-value for "both arms do the same": 1 minus the level whose interval just reaches 0.

    So p is at most .05 where the interval of `difference` leaves out 0, with the same clusters. For means of one seed
    that is the paired t-test.

    Raises:
        InputError: labels that cannot be paired.
    """
    table = cross({"the first arm": a, "the second arm": b}, unit)
    weights = np.array([1.0, -1.0])
    gap = float(weights @ table.means)
    if gap == 0 or table.prompts < 2:
        return 1.0

    def short(log_p: float) -> float:
        """Above 0 while the interval of the level 1 - p leaves 0 out."""
        below, above = sides(table, weights, -math.expm1(log_p))
        return gap - below if gap > 0 else -gap - above

    if short(LOWEST_P) > 0:
        return math.exp(LOWEST_P)
    return math.exp(float(optimize.brentq(short, LOWEST_P, -1e-9, xtol=1e-10)))


@checked
def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method, in the order given.

    The k-th smallest of m is multiplied by m - k + 1; none is then below a smaller one, none above 1.

    Raises:
        InputError: a value outside 0 to 1.
    """
    p = np.asarray(p_values, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"p-values {list(p_values)}: expected numbers from 0 to 1; leave out tests that were not made")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


@checked
def recovered_fraction(
    pasted: Labels, unmodified: Labels, direct: Labels, unit: str, success: Literal["more", "less"]
) -> Score | None:
    """Return (pasted - unmodified) / (direct - unmodified) with its 95 % interval.

    The interval holds each r for which pasted - (1 - r) unmodified - r direct is compatible with 0 (intervals as in
    `difference`). It is bounded as long as the denominator's interval leaves out 0, has no trouble with denominators
    near 0 as a percentile of resampled ratios has, and keeps its width where all arms sit at 0 or 1.

    Args:
        pasted: labels, seed by seed.
        unmodified: of the recipient as it is.
        direct: of the adapter that was trained on the recipient.
        unit: of the labels.
        success: whether `"more"` or `"less"` is the aim.

    Returns:
        The fraction (may be below 0 or above 1), or None where direct does not move in the wanted direction by more
        than its interval: then there is nothing to recover. `n` counts the prompts that all three were judged on.

    Raises:
        InputError: labels that cannot be paired.

    Source: Fieller 1954 (which it is for means with one seed); Zou, Huang and Zhang 2009 for unequal sides.
    """
    table = cross({"pasted": pasted, "unmodified": unmodified, "direct": direct}, unit)
    whole = contrast("direct", table, (0.0, -1.0, 1.0))
    if not (whole.low > 0 if success == "more" else whole.high < 0):  # also where the interval is unknown (NaN)
        return None

    def excess(fraction: float) -> float:
        """Above 0 where the fraction is not compatible with the labels."""
        gap = contrast("", table, (1.0, fraction - 1, -fraction))
        return max(gap.low, -gap.high)

    value = contrast("", table, (1.0, -1.0, 0.0)).value / whole.value
    low, high = (_edge(excess, value, step) for step in (-1.0, 1.0))
    return Score("recovered", value, low, high, whole.n, "fraction", whole.over)


@checked
def compare(
    arms: Mapping[str, Labels],
    unit: str,
    success: Literal["more", "less"],
    *,
    reference: str = "unmodified",
    direct: str = "direct",
) -> list[Comparison]:
    """Compare each arm with the reference, in the order given.

    Holm's correction counts every arm but the reference, so leave out arms that the question is not about. An arm
    with one seed is compared with each seed of the others.

    Args:
        arms: name -> labels, seed by seed, on the same prompts.
        unit: of the labels.
        success: whether `"more"` or `"less"` is the aim.
        reference: arm that the others are compared with.
        direct: arm whose effect counts as all there is to recover; without it no fraction is given.

    Raises:
        InputError: the reference is missing, or labels that cannot be paired.
    """
    if reference not in arms:
        raise InputError(f"reference {reference!r} is not among the arms {sorted(arms)}; measure it or name another")
    base = arms[reference]
    tested = [name for name in arms if name != reference]
    for name in tested:
        aligned({name: arms[name], reference: base}, unit)  # an error here names the arm, later ones its role
    p = [paired_p(arms[name], base, unit) for name in tested]
    tests = dict(zip(tested, zip(p, holm(p), strict=True), strict=True))
    rows = []
    for name, labels in arms.items():
        row = Comparison(name, pooled(name, labels, unit))
        if name in tests:
            fraction = None
            if direct in tests and name != direct:
                fraction = recovered_fraction(labels, base, arms[direct], unit, success)
            row = Comparison(name, row.score, difference(name, labels, base, unit), *tests[name], fraction)
        rows.append(row)
    return rows


@checked
def kappa(a: Sequence[float | None], b: Sequence[float | None]) -> tuple[float, int]:
    """Return Cohen's kappa of two judges, (agreement - chance) / (1 - chance), and the number of answers both judged.

    NaN where both judges give one and the same label throughout: chance then explains everything.

    Raises:
        InputError: unequal lengths, or nothing that both judged.
    """
    from sklearn.metrics import cohen_kappa_score

    first, second = (np.asarray(labels, np.float64) for labels in (a, b))
    if first.shape != second.shape:
        raise InputError(f"{first.size} and {second.size} labels; expected one of each judge for every answer")
    both = ~(np.isnan(first) | np.isnan(second))
    if not both.any():
        raise InputError("no answer has a label of both judges; let both judge the same answers")
    first, second = first[both], second[both]
    if len(np.unique(np.concatenate([first, second]))) == 1:
        return math.nan, len(first)
    # As texts: labels may be any numbers, and scikit-learn takes broken ones for a regression's.
    return float(cohen_kappa_score(first.astype(str), second.astype(str))), len(first)


def _edge(excess: Callable[[float], float], start: float, step: float) -> float:
    """Return where `excess` leaves zero, going from `start` in the direction of `step`."""
    inside = start
    while excess(start + step) <= 0:
        inside, step = start + step, step * 2
        if abs(step) > 1e12:
            return float(np.copysign(np.inf, step))
    if excess(inside) >= 0:
        return inside
    return float(optimize.brentq(excess, inside, start + step))
