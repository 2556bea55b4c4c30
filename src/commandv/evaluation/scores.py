"""Figures with their uncertainty: labels as prompts x seeds, and the one method of every interval.

The unit is the prompt. Seeds (of training; donors as well) are clusters that cross the prompts: the same prompts come
back with every seed, and every seed in each prompt. So a label is y_sp = mean + seed_s + prompt_p + noise, and the
variance of a mean over S seeds and P prompts has two parts, estimated from the mean squares of the two-way table:

    V_prompts = MS_prompts / (S P)        V_seeds = max(MS_seeds - 3/4 MS_noise, 0) / (S P)

A 95 % interval reaches sqrt(t²[P - 1] V_prompts + t²[S - 1] V_seeds) to either side, with Student's t of so many
degrees of freedom: few seeds say little about how seeds vary. (The 3/4 keep seeds that agree by chance from counting as
none that differ.) Rates: Wilson's interval for as many labels as have this variance, z for the first t, so that it has
a width at 0 and 1 as well. With one seed V_seeds is unknown and no interval claims it: `Score.over` says what an
interval is over. `docs/benchmarks/coverage.md` has how often the intervals hold a known truth. No library has them for
two crossed clusters.

Source: Cornfield and Tukey 1956 (mean squares of crossed random factors); Graybill and Wang 1980, Zou and Donner 2008
(parts of an interval joined by their squares); Wilson with an effective n: Korn and Graubard 1998, Dean, Pagano 2015.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from commandv.arguments import checked
from commandv.errors import InputError

Labels: TypeAlias = Sequence[Sequence[float | None]]
"""Labels of one arm, seed by seed: every seed has the same prompts in the same order; NaN or None = no judgment."""
Over: TypeAlias = Literal["prompts", "prompts and seeds"]
Array: TypeAlias = NDArray[np.float64]
LEVEL = 0.95
Z = float(stats.norm.ppf(0.5 + LEVEL / 2))
NOISE_SHARE = 0.75  # of MS_noise, taken from MS_seeds; chosen by benchmarks/coverage.py


class Score(NamedTuple):
    """A measured figure with its 95 % interval.

    Attributes:
        name: of what was measured.
        value: the figure.
        low: lower end of its interval.
        high: upper end.
        n: prompts that it rests on.
        unit: of the figure; `"rate"` for shares.
        over: what the interval allows for: other prompts, or other prompts and other seeds (seeds, donors). One seed
            tells nothing of others.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str = "rate"
    over: Over = "prompts"


def wilson(share: float, n: float, z: float = Z) -> tuple[float, float]:
    """Return Wilson's interval of a share: all p with |share - p| <= z sqrt(p (1 - p) / n).

    Written out because libraries take whole counts and one level at a time from a table.

    Args:
        share: observed, 0 to 1.
        n: number of outcomes; need not be whole, so that clustered outcomes can count as the fewer that they are worth.
        z: quantile of the normal distribution; that of the usual 95 % interval is the default.
    """
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5 / (1 + z * z / n)
    # The formula gives 0 and 1 at the ends only up to rounding; the share itself must lie inside.
    return max(0.0, min(share, centre - margin)), min(1.0, max(share, centre + margin))


@checked
def pooled(name: str, by_seed: Labels, unit: str) -> Score:
    """Return the rate or mean of one arm over all seeds with its 95 % interval (see the module); `n` counts prompts.

    Args:
        name: of the arm.
        by_seed: labels, seed by seed.
        unit: `"rate"` for labels 0 and 1, otherwise what the labels count.

    Raises:
        InputError: no seeds, prompts or judgments; seeds of unequal length; a rate with labels other than 0 and 1.
    """
    return contrast(name, cross({name: by_seed}, unit), (1.0,))


@checked
def rate(name: str, outcomes: Sequence[bool]) -> Score:
    """Return the share of True with its 95 % Wilson interval.

    Raises:
        InputError: no outcomes.
    """
    return pooled(name, [[float(bool(one)) for one in outcomes]], "rate")


@checked
def mean(name: str, values: Sequence[float], unit: str) -> Score:
    """Return the mean with its 95 % interval (Student's t).

    Raises:
        InputError: no values.
    """
    return pooled(name, [values], unit)


def geometric_mean(name: str, logs: Sequence[float], unit: str) -> Score:
    """Return exp of the mean of logarithms and of its 95 % interval (Student's t), as perplexities are averaged.

    Infinity where it is too large: a ruined model's interval may reach anywhere.

    Raises:
        InputError: no values.
    """
    score = pooled(name, [logs], unit)
    with np.errstate(over="ignore"):
        value, low, high = np.exp(np.array([score.value, score.low, score.high])).tolist()
    return score._replace(value=value, low=low, high=high)


# -- the two-way table -----------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Arms on what all were judged on."""

    means: Array  # [arms]
    # mean squares and products of the arms over prompts, seeds and noise, each [arms, arms]
    squares: tuple[Array, Array, Array]
    labels: int  # per arm
    seeds: int  # how many
    prompts: int  # how many
    unit: str  # of the labels


def cross(arms: Mapping[str, Labels], unit: str) -> Table:
    """Return the two-way table of arms; errors as in `aligned`."""
    stack = aligned(arms, unit)
    _, seeds, prompts = stack.shape
    given = ~np.isnan(stack[0])
    means = stack[:, given].mean(axis=1)
    centred = stack - means[:, None, None]  # keeps squares exact where labels are large and differ little
    by_prompt, by_seed = np.nanmean(centred, axis=1), np.nanmean(centred, axis=2)
    # What a judge left out counts as its prompt and seed let expect; the number of labels knows of it.
    noise = np.nan_to_num(centred - by_prompt[:, None, :] - by_seed[:, :, None])
    share = int(given.sum()) / given.size
    free = max(prompts - 1, 1), max(seeds - 1, 1), max((prompts - 1) * (seeds - 1) * share, 1)
    squares = (
        seeds * share * (by_prompt @ by_prompt.T) / free[0],
        prompts * share * (by_seed @ by_seed.T) / free[1],
        np.einsum("isp,jsp->ij", noise, noise) / free[2],
    )
    return Table(means, squares, int(given.sum()), seeds, prompts, unit)


def inflated(table: Table, weights: Array, level: float = LEVEL) -> float:
    """Return the variance of the weighted sum of the arms' means, each part times (its t / z)² at the level."""
    # Squares, which rounding takes below 0 where the arms differ by the same on every prompt.
    prompts, seeds, noise = (max(float(weights @ one @ weights), 0.0) for one in table.squares)
    z, exact = stats.norm.ppf(0.5 + level / 2), table.unit == "rate"  # of rates the prompts' part follows from the rate
    total = prompts * (1 if exact else (stats.t.ppf(0.5 + level / 2, table.prompts - 1) / z) ** 2)
    if table.seeds > 1:
        total += max(seeds - NOISE_SHARE * noise, 0.0) * (stats.t.ppf(0.5 + level / 2, table.seeds - 1) / z) ** 2
    return float(total / table.labels)


def contrast(name: str, table: Table, weights: Sequence[float]) -> Score:
    """Return the weighted sum of the arms' means with its interval."""
    c = np.array(weights)
    value = float(c @ table.means)
    below, above = math.nan, math.nan
    if table.unit == "rate" or table.prompts > 1:
        below, above = sides(table, c)
    over: Over = "prompts and seeds" if table.seeds > 1 else "prompts"
    return Score(name, value, value - below, value + above, table.prompts, table.unit, over)


def sides(table: Table, c: Array, level: float = LEVEL) -> tuple[float, float]:
    """Return how far the interval of a level reaches below and above the weighted sum of the arms' means.

    Of rates the arms' own sides are joined, given the correlations of their errors (Newcombe 1998, method 10).
    """
    z = float(stats.norm.ppf(0.5 + level / 2))
    if table.unit != "rate":
        margin = z * inflated(table, c, level) ** 0.5
        return margin, margin
    lows, highs = np.array([_wilson_sides(table, arm, level, z) for arm in range(len(c))]).T
    down, up = c * np.where(c > 0, lows, highs), c * np.where(c > 0, highs, lows)
    together = _correlation(table)
    # Rounding, or the correction of the correlations, can take the square of a side of no length below 0.
    below, above = (float(max(side @ together @ side, 0.0)) ** 0.5 for side in (down, up))
    return below, above


def _wilson_sides(table: Table, arm: int, level: float, z: float) -> tuple[float, float]:
    share = float(table.means[arm])
    spread = inflated(table, np.eye(len(table.means))[arm], level)
    # Labels all alike, or of one prompt, do not show how prompts vary: they count as one label per prompt.
    known = spread > 0 and table.prompts > 1 and table.seeds > 1
    worth = share * (1 - share) / spread if known else table.prompts
    low, high = wilson(share, min(worth, table.labels), z)
    return share - low, high - share


def _correlation(table: Table) -> Array:
    """Return the correlations of the errors of the arms' means (rates), [arms, arms]."""
    prompts, seeds, noise = table.squares
    values, vectors = np.linalg.eigh(seeds - noise)
    together = prompts + (vectors * np.maximum(values, 0)) @ vectors.T * (table.seeds > 1)
    spread = np.sqrt(np.diag(together))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.nan_to_num(together / np.outer(spread, spread), nan=0.0, posinf=0.0, neginf=0.0).clip(-1, 1)
        # Newcombe's correction for continuity: arms that agree on every prompt need not do so on the next.
        deviation = np.sqrt(table.means * (1 - table.means))
        lowered = found - 0.5 / (table.prompts * np.outer(deviation, deviation))
        found = np.where(found > 0, np.maximum(lowered, 0), found)
    np.fill_diagonal(found, 1.0)
    return found


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


def aligned(arms: Mapping[str, Labels], unit: str) -> Array:
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
