"""Scores of one arm, pooled over seeds: known answers, properties, and that their intervals cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats
from statsmodels.stats import proportion

from commandv.evaluation import mean, pooled, rate
from commandv.evaluation.scores import geometric_mean, wilson
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
    expected = proportion.proportion_confint(0.3 * 17.5, 17.5, method="wilson")
    assert wilson(0.3, 17.5) == pytest.approx(expected, abs=1e-12)


def test_an_interval_says_what_it_is_over() -> None:
    """One seed tells nothing of others: no interval claims them."""
    assert pooled("arm", [[1.0, 0.0, 1.0]], "rate").over == "prompts"
    assert pooled("arm", [[1.0, 0.0, 1.0]] * 2, "rate").over == "prompts and seeds"
    assert pooled("arm", [[1.0, 0.0, NAN]] * 2, "rate").n == 2  # prompts, however many seeds


@given(grids(BITS, 1))
@quick
def test_rates_over_seeds_are_never_surer_than_independent_labels(grid: list[list[list[float]]]) -> None:
    score = pooled("arm", grid[0], "rate")
    low, high = wilson(score.value, np.size(grid[0]))
    assert score.low <= low + 1e-12
    assert score.high >= high - 1e-12
    assert inside(score)
    assert 0 <= score.low < score.high <= 1
    assert score.n == len(grid[0][0])


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


def test_means_over_seeds_join_both_parts() -> None:
    """Prompts and seeds without noise: each part with its own Student's t, by hand."""
    rng = np.random.default_rng(3)
    labels = rng.normal(size=(1, 60)) + rng.normal(size=(6, 1))
    score = pooled("arm", labels.tolist(), "words")
    of_prompts, of_seeds = labels.mean(axis=0).var(ddof=1) / 60, labels.mean(axis=1).var(ddof=1) / 6
    expected = (stats.t.ppf(0.975, 59) ** 2 * of_prompts + stats.t.ppf(0.975, 5) ** 2 * of_seeds) ** 0.5
    assert (score.high - score.low) / 2 == pytest.approx(expected)


def test_seeds_that_decide_alone_leave_few_degrees_of_freedom() -> None:
    """Three seeds of which each prompt gives the same: Student's t of three values."""
    seeds = [1.0, 2.0, 4.0]
    score = pooled("arm", [[one] * 40 for one in seeds], "words")
    expected = stats.ttest_1samp(seeds, 0).confidence_interval(0.95)
    assert (score.low, score.high) == pytest.approx((expected.low, expected.high))


def test_answers_without_judgment_count_less() -> None:
    rng = np.random.default_rng(4)
    full = (rng.random((3, 60)) < 0.5).astype(float)
    holed = np.where(rng.random((3, 60)) < 0.3, np.nan, full)
    a, b = (pooled("arm", one.tolist(), "rate") for one in (full, holed))
    assert b.high - b.low > a.high - a.low
    assert b.value == pytest.approx(np.nanmean(holed))


def effective(labels: np.ndarray) -> float:
    """How many labels a rate over seeds is worth, from the two-way table by hand (see the module's words)."""
    seeds, prompts = labels.shape
    whole, by_seed, by_prompt = labels.mean(), labels.mean(1, keepdims=True), labels.mean(0, keepdims=True)
    of_prompts = seeds * float(((by_prompt - whole) ** 2).sum()) / (prompts - 1)
    of_seeds = prompts * float(((by_seed - whole) ** 2).sum()) / (seeds - 1)
    of_noise = float(((labels - by_seed - by_prompt + whole) ** 2).sum()) / ((prompts - 1) * (seeds - 1))
    ratio = stats.t.ppf(0.975, seeds - 1) / stats.norm.ppf(0.975)
    spread = (of_prompts + max(of_seeds - 0.75 * of_noise, 0) * ratio**2) / labels.size
    return min(whole * (1 - whole) / spread, labels.size)


@pytest.mark.parametrize("shape", [(2, 2), (2, 9), (3, 2), (4, 30)])
def test_rates_over_seeds_are_wilsons_for_the_labels_they_are_worth(shape: tuple[int, int]) -> None:
    rng, unlike = np.random.default_rng(1), 0
    for _ in range(12):
        labels = (rng.random(shape) + 0.3 * rng.normal(size=(shape[0], 1)) < 0.5).astype(float)
        if labels.mean(0).std() > 0:
            unlike += 1
            score = pooled("arm", labels.tolist(), "rate")
            assert (score.low, score.high) == pytest.approx(wilson(labels.mean(), effective(labels)))
    assert unlike > 6


def test_one_prompt_is_one_label_of_a_rate_and_no_interval_of_a_mean() -> None:
    one = pooled("arm", [[1.0], [0.0], [1.0]], "rate")
    assert (one.low, one.high) == pytest.approx(wilson(2 / 3, 1))
    alone = mean("arm", [3.0], "words")
    assert alone.value == 3
    assert np.isnan([alone.low, alone.high]).all()
    pair = stats.ttest_1samp([3.0, 5.0], 0).confidence_interval(0.95)
    score = mean("arm", [3.0, 5.0], "words")
    assert (score.low, score.high) == pytest.approx((pair.low, pair.high))


def test_geometric_means_are_exp_of_means_and_may_be_infinite() -> None:
    logs = [1.0, 2.0, 4.0]
    score, plain = geometric_mean("it", logs, "perplexity"), mean("it", logs, "")
    assert score[1:4] == pytest.approx(np.exp(plain[1:4]))
    assert (score.name, score.unit, score.n) == ("it", "perplexity", 3)
    assert geometric_mean("it", [1.0, 2000.0], "perplexity").high == float("inf")


# -- coverage; benchmarks/coverage.py has the whole of it -------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("rate_", [0.05, 0.3, 0.5, 0.95])
def test_intervals_of_rates_hold_the_truth(rate_: float, seeds: int) -> None:
    """Prompts and seeds both random; of one seed the truth is that seed's."""
    rng, held = np.random.default_rng(5), []
    level = stats.norm.ppf(rate_) * (1 + 1 + 0.09) ** 0.5
    for number in range(2 * REPEATS):
        prompts = 48 if number % 2 else 128
        by_seed = 0.3 * rng.normal(size=(seeds, 1))
        labels = level + rng.normal(size=(1, prompts)) + by_seed + rng.normal(size=(seeds, prompts)) > 0
        truth = rate_ if seeds > 1 else stats.norm.cdf((level + by_seed[0, 0]) / 2**0.5)
        score = pooled("arm", labels.astype(float).tolist(), "rate")
        held.append(score.low <= truth <= score.high)
    error = (0.95 * 0.05 / len(held)) ** 0.5
    assert 0.93 - 2 * error <= np.mean(held) <= 0.97 + 2 * error


def test_intervals_of_means_hold_the_truth() -> None:
    rng, held = np.random.default_rng(6), []
    for _ in range(2 * REPEATS):
        values = rng.normal(size=(1, 48)) + 0.3 * rng.normal(size=(3, 1)) + rng.normal(size=(3, 48))
        score = pooled("arm", values.tolist(), "words")
        held.append(score.low <= 0 <= score.high)
    error = (0.95 * 0.05 / len(held)) ** 0.5
    assert 0.93 - 2 * error <= np.mean(held) <= 0.97 + 2 * error
