"""Many arms on the same prompts: intervals over prompts and seeds, paired tests, and what a paste recovers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from commandv.errors import InputError
from commandv.evaluation.scores import Score, mean, rate, wilson

Labels: TypeAlias = Sequence[Sequence[float | None]]
"""Labels of one arm, seed by seed: every seed has the same prompts in the same order; NaN or None = no judgment."""
Array: TypeAlias = NDArray[np.float64]

RESAMPLES = 2000
FLIPS = 9999


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


class _Estimates(NamedTuple):
    """Means of arms on what all were judged on, and how their errors go together."""

    scores: list[Score]
    correlation: Array  # [arms, arms]
    prompts: int


def pooled(name: str, by_seed: Labels, unit: str) -> Score:
    """Return the rate or mean of one arm over all seeds with its 95 % interval; `n` counts labels.

    One seed: Wilson's interval (rates) or Student's t (means). Several: the same labels come back in every seed and
    the same seeds in every prompt, so both are resampled at once (2,000 times), which gives the variance v of the
    estimate. Means: estimate +- t sqrt(v). Rates: Wilson's interval with n = p (1 - p) / v, at most the number of
    labels: never narrower than the interval that takes all labels for independent, never of width zero.

    In simulation the interval covers 97 to 100 % where seeds differ little (the resampling counts pure noise in both
    factors). Where two or three seeds differ by much, their spread is hardly known and it covers 86 to 94 %.

    Args:
        name: of the arm.
        by_seed: labels, seed by seed.
        unit: `"rate"` for labels 0 and 1, otherwise what the labels count.

    Raises:
        InputError: no seeds, prompts or judgments; seeds of unequal length; a rate with labels other than 0 and 1.

    Source: two-way resampling: Owen 2007, "The pigeonhole bootstrap", with one draw fewer than there are seeds and
    prompts, which makes the variance of each factor unbiased (Rao and Wu 1988). Wilson with an effective n: Korn and
    Graubard 1998, Dean and Pagano 2015.
    """
    return _estimates({name: by_seed}, unit).scores[0]


def paired_p(a: Labels, b: Labels, unit: str) -> float:
    """Return the two-sided p-value for "both arms do the same", on the prompts that both were judged on.

    Rates with one seed: McNemar's exact test. Otherwise the signs of the prompts' differences (each averaged over
    seeds) are flipped at random, all 2^n ways for up to 13 prompts that differ, else 9,999 ways. If arms are alike
    their labels can be swapped prompt by prompt, so flipping rejects at the nominal rate for any number of prompts; a
    bootstrap of the mean rejects too often when they are few. (McNemar's test is the same flip for labels 0 and 1; it
    is discrete and rejects a little less often.) The prompt is the unit: the answer holds for these seeds.

    Args:
        a: labels of one arm, seed by seed.
        b: of the other; one seed is compared with each seed of the first.
        unit: of the labels.

    Raises:
        InputError: labels that cannot be paired.
    """
    first, second = _aligned({"the first arm": a, "the second arm": b}, unit)
    if unit == "rate" and len(first) == 1:
        wins, losses = int((first > second).sum()), int((first < second).sum())
        return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return _sign_flip(np.nanmean(first - second, axis=0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method, in the order given.

    Sorted upwards, p_(k) becomes the largest of (m - j + 1) p_(j) over j <= k, at most 1.

    Raises:
        InputError: a value outside 0 to 1.
    """
    p = np.asarray(p_values, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"p-values {list(p_values)}: expected numbers from 0 to 1; leave out tests that were not made")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return [float(value) for value in adjusted]


def difference(name: str, a: Labels, b: Labels, unit: str) -> Score:
    """Return a minus b with its 95 % paired interval; `n` counts the prompts that both were judged on.

    The interval joins those of the two arms (see `pooled`), given the correlation r of their errors:
    low = a - b - sqrt(x^2 - 2 r x y + y^2) with x = a - low(a), y = high(b) - b, and likewise upwards. With one seed
    that is Newcombe's interval for rates and the paired t for means; with several, r comes from the same resamples.

    Source: Newcombe 1998, method 10 (its correction of r included); Zou and Donner 2008.

    Raises:
        InputError: labels that cannot be paired.
    """
    return _contrast(name, _estimates({"the first arm": a, "the second arm": b}, unit), (1.0, -1.0))


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
    estimates = _estimates({"pasted": pasted, "unmodified": unmodified, "direct": direct}, unit)
    whole = _contrast("direct", estimates, (0.0, -1.0, 1.0))
    if not (whole.low > 0 if success == "more" else whole.high < 0):  # also where the interval is unknown (NaN)
        return None

    def excess(fraction: float) -> float:
        """Above 0 where the fraction is not compatible with the labels."""
        gap = _contrast("", estimates, (1.0, fraction - 1, -fraction))
        return max(gap.low, -gap.high)

    value = _contrast("", estimates, (1.0, -1.0, 0.0)).value / whole.value
    return Score("recovered", value, _edge(excess, value, -1.0), _edge(excess, value, 1.0), whole.n, "fraction")


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
        _aligned({name: arms[name], reference: base}, unit)  # an error here names the arm, later ones its role
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


def kappa(a: Sequence[float | None], b: Sequence[float | None]) -> tuple[float, int]:
    """Return Cohen's kappa of two judges, (agreement - chance) / (1 - chance), and the number of answers both judged.

    NaN where both judges give one and the same label throughout: chance then explains everything.

    Raises:
        InputError: unequal lengths, or nothing that both judged.
    """
    first, second = (np.asarray(labels, np.float64) for labels in (a, b))
    if first.shape != second.shape:
        raise InputError(f"{first.size} and {second.size} labels; expected one of each judge for every answer")
    both = ~(np.isnan(first) | np.isnan(second))
    if not both.any():
        raise InputError("no answer has a label of both judges; let both judge the same answers")
    first, second = first[both], second[both]
    chance = sum(float((first == label).mean() * (second == label).mean()) for label in np.unique(first))
    agreement = float((first == second).mean())
    return (agreement - chance) / (1 - chance) if chance < 1 else float("nan"), len(first)


def _matrix(name: str, by_seed: Labels, unit: str) -> Array:
    """Return labels as [seeds, prompts]."""
    lengths = {len(labels) for labels in by_seed}
    if not lengths or lengths == {0}:
        raise InputError(f"{name}: no labels; expected one or more seeds with a label per prompt")
    if len(lengths) > 1:
        raise InputError(
            f"{name}: seeds with {sorted(lengths)} labels; expected the same prompts in each. Use NaN for no judgment"
        )
    matrix = np.asarray(by_seed, np.float64)
    given = matrix[~np.isnan(matrix)]
    if not len(given):
        raise InputError(f"{name}: the judge had no judgment on any of {matrix.size} answers; check the judge")
    if not np.isfinite(given).all():
        raise InputError(f"{name}: an infinite label; expected numbers, NaN for no judgment")
    if unit == "rate" and not np.isin(given, (0, 1)).all():
        wrong = given[~np.isin(given, (0, 1))][0]
        raise InputError(f"{name}: label {wrong:g} in a rate; expected 0 or 1. Name what the labels count as the unit")
    return matrix


def _aligned(arms: Mapping[str, Labels], unit: str) -> Array:
    """Return labels as [arms, seeds, prompts], NaN in every arm where one has no judgment."""
    matrices = {name: _matrix(name, by_seed, unit) for name, by_seed in arms.items()}
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    if len({prompts for _, prompts in shapes.values()}) > 1:
        counts = ", ".join(f"{name} {prompts}" for name, (_, prompts) in shapes.items())
        raise InputError(f"arms on different numbers of prompts ({counts}); measure all on the same prompts")
    if len({seeds for seeds, _ in shapes.values()} - {1}) > 1:
        counts = ", ".join(f"{name} {seeds}" for name, (seeds, _) in shapes.items())
        raise InputError(f"arms with different numbers of seeds ({counts}); expected the same seeds, or one, in each")
    stack = np.stack(np.broadcast_arrays(*matrices.values()))
    judged = ~np.isnan(stack).any(axis=0)
    if not judged.any():
        raise InputError(f"no prompt was judged in each of {', '.join(arms)}; check the judge's labels of each arm")
    stack = np.where(judged, stack, np.nan)
    return stack[:, judged.any(axis=1)][:, :, judged.any(axis=0)]


def _estimates(arms: Mapping[str, Labels], unit: str) -> _Estimates:
    stack = _aligned(arms, unit)
    _, seeds, prompts = stack.shape
    given = stack[:, ~np.isnan(stack[0])]  # [arms, labels]
    if seeds == 1:
        errors = given
        scores = [
            rate(name, [bool(label) for label in row]) if unit == "rate" else mean(name, [*row], unit)
            for name, row in zip(arms, given, strict=True)
        ]
    else:
        errors = _resampled(stack)
        columns = zip(arms, given, errors.var(axis=1), strict=True)
        scores = [_clustered(name, labels, float(variance), unit, prompts) for name, labels, variance in columns]
    spread = errors.std(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.cov(errors, bias=True).reshape(len(arms), -1) / np.outer(spread, spread)
        correlation = np.nan_to_num(correlation, nan=0.0, posinf=0.0, neginf=0.0).clip(-1, 1)
        if unit == "rate":
            # Newcombe's correction for continuity: arms that agree on every prompt need not do so on the next.
            deviation = np.sqrt([score.value * (1 - score.value) for score in scores])
            lowered = correlation - 0.5 / (prompts * np.outer(deviation, deviation))
            correlation = np.where(correlation > 0, np.maximum(lowered, 0), correlation)
    np.fill_diagonal(correlation, 1.0)
    return _Estimates(scores, correlation, prompts)


def _resampled(stack: Array) -> Array:
    """Return the arms' means over resampled seeds and prompts, the same draws for every arm: [arms, resamples]."""
    _, seeds, prompts = stack.shape
    generator = np.random.default_rng(0)
    by_seed, by_prompt = (
        generator.multinomial(max(n - 1, 1), np.full(n, 1 / n), RESAMPLES).astype(np.float64) for n in (seeds, prompts)
    )
    counts = ((by_seed @ ~np.isnan(stack[0])) * by_prompt).sum(axis=1)
    # Subtracting the mean first keeps the sums exact where labels are large and differ little.
    centre = np.nanmean(stack, axis=(1, 2), keepdims=True)
    sums = np.stack([((by_seed @ arm) * by_prompt).sum(axis=1) for arm in np.nan_to_num(stack - centre)])
    return sums[:, counts > 0] / counts[counts > 0]


def _clustered(name: str, labels: Array, variance: float, unit: str, prompts: int) -> Score:
    value, n = float(labels.mean()), len(labels)
    if unit != "rate":
        margin = float(stats.t.ppf(0.975, prompts - 1) * variance**0.5) if prompts > 1 else float("nan")
        return Score(name, value, value - margin, value + margin, n, unit)
    # Labels all alike, or of one prompt, do not show how prompts vary: they count as one label per prompt.
    worth = value * (1 - value) / variance if variance > 0 and prompts > 1 else prompts
    return Score(name, value, *wilson(value, min(worth, n)), n, unit)


def _contrast(name: str, estimates: _Estimates, weights: tuple[float, ...]) -> Score:
    """Return the weighted sum of the arms' means; each side of its interval joins the arms' sides that lead there."""
    scores, correlation, prompts = estimates
    value, low, high = (np.array([score[k] for score in scores]) for k in (1, 2, 3))
    c = np.array(weights)
    down, up = c * np.where(c > 0, value - low, high - value), c * np.where(c > 0, high - value, value - low)
    # Rounding, or the correction of the correlations, can take the square of a side of no length below 0.
    below, above = (float(max(side @ correlation @ side, 0.0)) ** 0.5 for side in (down, up))
    total = float(c @ value)
    return Score(name, total, total - below, total + above, prompts, scores[0].unit)


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


def _sign_flip(differences: Array) -> float:
    """Return the share of sign patterns whose sum is at least as far from 0 as the one observed."""
    moved = differences[differences != 0]  # a difference of 0 has no sign to flip
    n = len(moved)
    exact = 2**n <= FLIPS
    generator = np.random.default_rng(0)
    # Sums that are equal on paper differ by rounding; without slack such ties would count at random.
    observed = abs(moved.sum()) - 1e-9 * np.abs(moved).sum()
    if exact:
        signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((np.abs(signs @ moved) >= observed).mean())
    hits = 0
    for start in range(0, FLIPS, 1111):  # in parts, for memory
        signs = 1.0 - 2.0 * generator.integers(0, 2, (min(1111, FLIPS - start), n), np.int8)
        hits += int((np.abs(signs @ moved) >= observed).sum())
    return (1 + hits) / (1 + FLIPS)
