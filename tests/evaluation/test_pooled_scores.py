"""Scores of one arm, pooled over seeds: known answers, properties, and that their intervals cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from commandv.evaluation import mean, pooled, rate
from commandv.evaluation.scores import wilson
from labels import BITS, NAN, REPEATS, grids, inside, quick

VALUES = st.integers(-200, 200).map(lambda n: n / 4)


def test_one_seed_is_wilson_or_student() -> None:
    labels = [1.0, 0.0, 1.0, NAN, 1.0]
    assert pooled("arm", [labels], "rate") == rate("arm", [True, False, True, True])
    assert pooled("arm", [[3.0, NAN, 5.0, 9.0]], "words") == mean("arm", [3.0, 5.0, 9.0], "words")
    assert pooled("arm", [[1, None, 0]], "rate") == rate("arm", [True, False])


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (41, 250)])
def test_wilson_is_scipys(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_with_a_broken_n() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected = proportion.proportion_confint(0.3 * 17.5, 17.5, method="wilson")
    assert wilson(0.3, 17.5) == pytest.approx(expected, abs=1e-12)


@given(grids(BITS, 1))
@quick
def test_rates_over_seeds_are_never_surer_than_independent_labels(grid: list[list[list[float]]]) -> None:
    score = pooled("arm", grid[0], "rate")
    low, high = wilson(score.value, score.n)
    assert score.low <= low + 1e-12
    assert score.high >= high - 1e-12
    assert inside(score)
    assert 0 <= score.low < score.high <= 1
    assert score.n == np.size(grid[0])


@given(grids(VALUES, 1))
@quick
def test_means_over_seeds_lie_in_their_interval(grid: list[list[list[float]]]) -> None:
    score = pooled("arm", grid[0], "words")
    assert score.value == pytest.approx(np.mean(grid[0]))
    assert inside(score)


def test_a_repeated_measurement_is_worth_no_more_than_one() -> None:
    """A deterministic arm that was copied to every seed must not look better measured."""
    labels = [1.0] * 12 + [0.0] * 36
    once, thrice = pooled("arm", [labels], "rate"), pooled("arm", [labels] * 3, "rate")
    assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.1)
    sure = pooled("arm", [[1.0] * 24] * 3, "rate")
    assert sure.low == pytest.approx(wilson(1.0, 24)[0])
    values = list(np.random.default_rng(0).normal(size=48))
    once, thrice = pooled("arm", [values], "words"), pooled("arm", [values] * 3, "words")
    assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.1)


def test_seeds_that_differ_widen_the_interval() -> None:
    alike, apart = [[1.0, 0.0] * 20] * 4, [[1.0] * 40, [0.0] * 40] * 2
    a, b = pooled("alike", alike, "rate"), pooled("apart", apart, "rate")
    assert a.value == b.value
    assert b.high - b.low > 1.5 * (a.high - a.low)


def test_means_over_seeds_know_both_factors() -> None:
    """Variance from the closed form of the two-way resampling, prompts and seeds additive."""
    rng = np.random.default_rng(3)
    labels = rng.normal(size=(1, 60)) + rng.normal(size=(6, 1))
    score = pooled("arm", labels.tolist(), "words")
    variance = labels.mean(axis=0).var(ddof=1) / 60 + labels.mean(axis=1).var(ddof=1) / 6
    assert (score.high - score.low) / 2 == pytest.approx(stats.t.ppf(0.975, 59) * variance**0.5, rel=0.06)


@pytest.mark.parametrize("unit", ["rate", "words"])
def test_intervals_cover_the_truth(unit: str) -> None:
    """Prompts, seeds and noise; at least 95 % less three standard errors."""
    rng, covered = np.random.default_rng(5), 0
    for _ in range(REPEATS):
        level = rng.normal(size=(1, 40)) + 0.2 * rng.normal(size=(4, 1))
        if unit == "rate":
            labels, truth = (rng.random((4, 40)) < stats.norm.cdf(level)).astype(float), 0.5
        else:
            labels, truth = level + 0.5 * rng.normal(size=(4, 40)), 0.0
        score = pooled("arm", labels.tolist(), unit)
        covered += score.low <= truth <= score.high
    assert covered / REPEATS >= 0.95 - 3 * (0.95 * 0.05 / REPEATS) ** 0.5
