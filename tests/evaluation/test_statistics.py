"""Statistics of arms on the same prompts: known answers, properties, and that nothing is found where nothing is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats
from statsmodels.stats import inter_rater, proportion

from commandv.errors import InputError
from commandv.evaluation import (
    compare,
    difference,
    holm,
    kappa,
    paired_p,
    pooled,
    recovered_fraction,
)
from commandv.evaluation.scores import wilson
from labels import BITS, NAN, REPEATS, grids, inside, quick


def table(wins: int, losses: int, both: int, neither: int) -> tuple[list[list[float]], list[list[float]]]:
    """Two arms whose labels fall into these cells."""
    a = [1.0] * wins + [0.0] * losses + [1.0] * both + [0.0] * neither
    b = [0.0] * wins + [1.0] * losses + [1.0] * both + [0.0] * neither
    return [a], [b]


# Two arms


def test_the_p_value_of_means_is_the_paired_t() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 15))
    assert paired_p([a.tolist()], [b.tolist()], "words") == pytest.approx(stats.ttest_rel(a, b).pvalue)


@given(grids(BITS, 2), st.sampled_from(["rate", "words"]))
@quick
def test_p_is_below_the_level_where_the_interval_leaves_out_nothing(grid: list[list[list[float]]], unit: str) -> None:
    score, p = difference("d", *grid, unit), paired_p(*grid, unit)
    if math.isfinite(score.low) and abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == (score.low > 0 or score.high < 0)


def test_what_differs_on_no_prompt_differs_not() -> None:
    assert paired_p([[1.0, 0.0]], [[1.0, 0.0]], "rate") == 1
    assert paired_p([[1.0]], [[3.0]], "words") == 1  # one prompt tells nothing
    for a, b in ((2.0, 1.0), (1.0, 2.0), (1.25, 1.0), (9.0, 1.0)):  # the same difference everywhere
        assert paired_p([[a, a]], [[b, b]], "words") == pytest.approx(1e-12)


def test_the_p_value_of_two_prompts_is_the_paired_t() -> None:
    assert paired_p([[1.0, 3.0]], [[0.5, 1.0]], "words") == pytest.approx(stats.ttest_rel([1, 3], [0.5, 1]).pvalue)


@pytest.mark.parametrize("cells", [(9, 1, 5, 5), (30, 18, 2, 0), (12, 0, 20, 16)])
def test_one_seed_agrees_with_mcnemar(cells: tuple[int, int, int, int]) -> None:
    """Newcombe's interval, which p comes from, is no exact test, but near to one."""
    wins, losses, _, _ = cells
    exact = stats.binomtest(wins, wins + losses).pvalue
    assert paired_p(*table(*cells), "rate") == pytest.approx(exact, abs=0.06)


@given(grids(BITS, 2), st.randoms(use_true_random=False), st.sampled_from(["rate", "words"]))
@quick
def test_the_order_of_prompts_does_not_matter(grid: list[list[list[float]]], random: object, unit: str) -> None:
    order = list(range(len(grid[0][0])))
    random.shuffle(order)  # type: ignore[attr-defined]
    a, b = ([[row[k] for k in order] for row in arm] for arm in grid)
    assert paired_p(a, b, unit) == pytest.approx(paired_p(*grid, unit))
    assert paired_p(b, a, unit) == pytest.approx(paired_p(*grid, unit))
    moved, still = difference("d", a, b, unit), difference("d", *grid, unit)
    assert moved.value == pytest.approx(still.value)
    if len(grid[0]) == 1:  # no resampling; where arms are alike the width is the root of a rounding error
        assert moved[1:4] == pytest.approx(still[1:4], nan_ok=True, abs=1e-6)


def binary(rng: np.random.Generator, seeds: int) -> list[list[float]]:
    return (rng.random((seeds, 60)) < 0.4).astype(float).tolist()


def normal(rng: np.random.Generator, seeds: int) -> list[list[float]]:
    return rng.normal(size=(seeds, 12)).tolist()


def skewed(rng: np.random.Generator, seeds: int) -> list[list[float]]:
    return rng.exponential(size=(seeds, 30)).tolist()


Draw = Callable[[np.random.Generator, int], list[list[float]]]
NULLS = [
    pytest.param(binary, "rate", 1, True, id="rates"),
    pytest.param(binary, "rate", 3, False, id="rates over seeds"),
    pytest.param(normal, "nats", 1, True, id="means of few prompts"),
    pytest.param(skewed, "words", 1, True, id="skewed means"),
    pytest.param(skewed, "words", 2, False, id="means over seeds"),
]


@pytest.mark.parametrize(("draw", "unit", "seeds", "exact"), NULLS)
def test_nothing_is_found_where_nothing_is(draw: Draw, unit: str, seeds: int, exact: bool) -> None:
    rng = np.random.default_rng(11)
    rejected = sum(paired_p(draw(rng, seeds), draw(rng, seeds), unit) <= 0.05 for _ in range(REPEATS))
    # 99.9 % of binomial samples at the nominal rate; with seeds that do not differ the test rejects less often.
    assert rejected <= stats.binom.ppf(0.9995, REPEATS, 0.05)
    assert not exact or rejected >= stats.binom.ppf(0.0005, REPEATS, 0.05)


@pytest.mark.parametrize(("unit", "seeds"), [("rate", 1), ("rate", 3), ("words", 1), ("words", 3)])
def test_an_effect_is_found(unit: str, seeds: int) -> None:
    rng = np.random.default_rng(2)
    level = rng.normal(size=(1, 60))
    b, a = (level + shift + rng.normal(size=(seeds, 60)) for shift in (0.0, 1.0))
    if unit == "rate":
        a, b = (a > 0).astype(float), (b > 0).astype(float)
    # Three seeds say little of other seeds, so that an effect over both is less sure than one over prompts alone.
    assert paired_p(a.tolist(), b.tolist(), unit) < (0.01 if seeds == 1 else 0.05)
    effect = difference("effect", a.tolist(), b.tolist(), unit)
    assert effect.low > 0
    assert effect.value == pytest.approx(a.mean() - b.mean())
    assert (effect.n, effect.unit) == (60, unit)


def test_the_difference_of_means_is_the_paired_t() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 15))
    b += a
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    score = difference("d", [a.tolist()], [b.tolist()], "words")
    assert (score.low, score.high) == pytest.approx((expected.low, expected.high))


def test_the_difference_of_uncorrelated_rates_is_newcombes() -> None:
    a, b = table(wins=8, losses=2, both=4, neither=4)  # 4 * 4 = 8 * 2: no correlation
    expected = proportion.confint_proportions_2indep(12, 18, 6, 18, method="newcomb", compare="diff")
    score = difference("d", a, b, "rate")
    assert (score.low, score.high) == pytest.approx(expected)


def test_the_difference_of_correlated_rates_is_newcombes_method_10() -> None:
    """Worked by hand after Newcombe 1998: 36 both, 12 only the first, 2 only the second, none neither."""
    a, b = table(wins=12, losses=2, both=36, neither=0)
    (l1, u1), (l2, u2) = wilson(48 / 50, 50), wilson(38 / 50, 50)
    phi = (36 * 0 - 12 * 2) / math.sqrt(48 * 2 * 38 * 12)  # negative: no correction
    low = 0.2 - math.sqrt((0.96 - l1) ** 2 - 2 * phi * (0.96 - l1) * (u2 - 0.76) + (u2 - 0.76) ** 2)
    high = 0.2 + math.sqrt((u1 - 0.96) ** 2 - 2 * phi * (u1 - 0.96) * (0.76 - l2) + (0.76 - l2) ** 2)
    assert difference("d", a, b, "rate")[1:4] == pytest.approx((0.2, low, high))
    a, b = table(wins=6, losses=2, both=30, neither=12)
    (l1, u1), (l2, u2) = wilson(36 / 50, 50), wilson(32 / 50, 50)
    phi = (30 * 12 - 6 * 2 - 25) / math.sqrt(36 * 14 * 32 * 18)
    low = 0.08 - math.sqrt((0.72 - l1) ** 2 - 2 * phi * (0.72 - l1) * (u2 - 0.64) + (u2 - 0.64) ** 2)
    high = 0.08 + math.sqrt((u1 - 0.72) ** 2 - 2 * phi * (u1 - 0.72) * (0.64 - l2) + (0.64 - l2) ** 2)
    assert difference("d", a, b, "rate")[1:4] == pytest.approx((0.08, low, high))


def test_an_arm_that_is_all_alike_goes_with_no_other() -> None:
    b = [[0.0] * 18]
    for hits in (6, 12):
        expected = proportion.confint_proportions_2indep(hits, 18, 0, 18, method="newcomb", compare="diff")
        score = difference("d", [[1.0] * hits + [0.0] * (18 - hits)], b, "rate")
        assert (score.low, score.high) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_the_difference_of_rates_over_seeds_joins_their_own_intervals(seed: int) -> None:
    """By hand: each arm's interval, and the correlation of their errors from the mean products of the two-way table."""
    rng = np.random.default_rng(seed)
    level = rng.normal(size=(1, 24)) + rng.normal(size=(3, 1)) * (seed % 2)
    labels = np.array([(level + shift + rng.normal(size=(3, 24)) > 0) for shift in (0.5, 0.0)]).astype(float)
    means = labels.mean((1, 2))
    by_prompt, by_seed = labels.mean(1) - means[:, None], labels.mean(2) - means[:, None]
    rest = labels - means[:, None, None] - by_prompt[:, None] - by_seed[:, :, None]
    prompts, seeds = 3 * by_prompt @ by_prompt.T / 23, 24 * by_seed @ by_seed.T / 2
    own, directions = np.linalg.eigh(seeds - np.einsum("isp,jsp->ij", rest, rest) / 46)
    joint = prompts + directions @ np.diag(own.clip(0)) @ directions.T  # no direction has less than no variance
    r = joint[0, 1] / math.sqrt(joint[0, 0] * joint[1, 1])
    if r > 0:
        r = max(r - 0.5 / 24 / math.prod(math.sqrt(one * (1 - one)) for one in means), 0)
    a, b = (pooled("", one.tolist(), "rate") for one in labels)
    gap = a.value - b.value
    x, y = a.value - a.low, b.high - b.value
    low = gap - math.sqrt(x * x - 2 * r * x * y + y * y)
    x, y = a.high - a.value, b.value - b.low
    high = gap + math.sqrt(x * x - 2 * r * x * y + y * y)
    assert difference("d", *labels.tolist(), "rate")[1:4] == pytest.approx((gap, low, high))


@given(grids(BITS, 2))
@quick
def test_differences_of_rates_keep_their_width(grid: list[list[list[float]]]) -> None:
    score = difference("d", *grid, "rate")
    assert inside(score)
    assert score.low < score.high


def test_no_judgment_leaves_the_pair_out() -> None:
    a, b = [[1.0, NAN, 3.0, 9.0]], [[0.0, 5.0, NAN, 4.0]]
    assert difference("d", a, b, "words") == difference("d", [[1.0, 9.0]], [[0.0, 4.0]], "words")
    assert paired_p(a, b, "words") == paired_p([[1.0, 9.0]], [[0.0, 4.0]], "words")


# Several tests


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.0, 1.0, 0.9]) == [0.0, 1.0, 1.0]
    for wrong in (NAN, -0.1, 1.1):
        with pytest.raises(InputError, match="leave out"):
            holm([0.1, wrong])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@quick
def test_holm_keeps_the_order_and_never_lowers(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(before <= after <= 1 for before, after in zip(p, adjusted, strict=True))
    ordered = [after for _, after in sorted(zip(p, adjusted, strict=True))]
    assert ordered == sorted(ordered)
    assert holm(p[::-1]) == adjusted[::-1]


# What a paste recovers


def test_recovered_is_fiellers_for_means() -> None:
    rng = np.random.default_rng(6)
    base = rng.normal(size=30)
    pasted, direct = base + 1 + rng.normal(size=30), base + 2 + rng.normal(size=30)
    x, y = pasted - base, direct - base
    vx, vy, vxy = x.var(ddof=1) / 30, y.var(ddof=1) / 30, np.cov(x, y)[0, 1] / 30
    t2 = stats.t.ppf(0.975, 29) ** 2
    expected = np.roots([y.mean() ** 2 - t2 * vy, -2 * (x.mean() * y.mean() - t2 * vxy), x.mean() ** 2 - t2 * vx])
    score = recovered_fraction([pasted.tolist()], [base.tolist()], [direct.tolist()], "words", "more")
    assert score is not None
    assert (score.low, score.high) == pytest.approx(sorted(expected))
    assert score.value == pytest.approx(x.mean() / y.mean())
    assert (score.n, score.unit) == (30, "fraction")
    mirrored = recovered_fraction([(-pasted).tolist()], [(-base).tolist()], [(-direct).tolist()], "words", "less")
    assert mirrored is not None
    assert mirrored[1:4] == pytest.approx(score[1:4], abs=1e-6)


def test_nothing_to_recover() -> None:
    rng = np.random.default_rng(7)
    draw = [binary(rng, 2) for _ in range(3)]
    assert recovered_fraction(*draw, "rate", "more") is None
    base, direct = [[0.0] * 30], [[1.0] * 30]
    assert recovered_fraction(direct, base, direct, "rate", "less") is None  # the wrong direction
    assert recovered_fraction([[1.0]], [[0.0]], [[5.0]], "words", "more") is None  # one prompt: interval unknown
    for success in ("more", "less"):  # nothing that is more than its interval
        assert recovered_fraction([[0.5, 0.0]], [[0.0, 0.0]], [[0.5, -0.5]], "words", success) is None


def test_the_same_effect_everywhere_leaves_no_width() -> None:
    base = np.random.default_rng(3).normal(size=20)
    for part, whole in ((0.3, 0.7), (0.1, 0.3), (-0.2, 0.9), (14.0, 0.7)):
        score = recovered_fraction(
            [(base + part).tolist()], [base.tolist()], [(base + whole).tolist()], "words", "more"
        )
        assert score is not None
        assert score[1:4] == pytest.approx((part / whole,) * 3, rel=1e-6)  # the root of a rounding error


def test_all_recovered_still_has_an_interval() -> None:
    base, direct = [[0.0] * 24], [[1.0] * 24] * 3
    score = recovered_fraction(direct, base, direct, "rate", "more")
    assert score is not None
    assert score.value == 1
    assert score.low < 0.95
    assert score.high > 1


@given(grids(BITS, 3))
@quick
def test_the_fraction_lies_in_its_interval(grid: list[list[list[float]]]) -> None:
    score = recovered_fraction(*grid, "rate", "more")
    whole = difference("direct", grid[2], grid[1], "rate")
    if whole.low <= -1e-9:
        assert score is None
    if score is not None:
        assert inside(score)
        assert score.low < score.high


@pytest.mark.parametrize("unit", ["rate", "words"])
def test_fractions_cover_the_truth(unit: str) -> None:
    rng, covered = np.random.default_rng(8), 0
    for _ in range(REPEATS):
        shape = (3, 1, 48)
        levels = rng.normal(size=(1, 1, 48)) + np.array([0.0, -1.0, 1.0])[:, None, None] + rng.normal(size=shape)
        labels = (levels > 0).astype(float) if unit == "rate" else levels
        score = recovered_fraction(*labels.tolist(), unit, "more")
        assert score is not None
        covered += score.low <= 0.5 <= score.high  # the shares are symmetric about one half
    assert covered / REPEATS >= 0.95 - 3 * (0.95 * 0.05 / REPEATS) ** 0.5


# Tables


def test_compare_makes_the_table() -> None:
    rng = np.random.default_rng(9)
    level = rng.normal(size=(3, 80))
    arms = {"unmodified": level[:1], "pasted": level + 1, "random": level + 0.01 * rng.normal(size=level.shape)}
    arms["direct"] = level + 2
    labels = {name: (values > 1).astype(float).tolist() for name, values in arms.items()}
    rows = {row.method: row for row in compare(labels, "rate", "more")}
    assert list(rows) == list(arms)
    assert rows["unmodified"][2:] == (None, None, None, None)
    tested = ["pasted", "random", "direct"]
    assert [rows[name].adjusted for name in tested] == holm([rows[name].p or 0.0 for name in tested])
    assert rows["pasted"].score == pooled("pasted", labels["pasted"], "rate")
    assert rows["pasted"].difference == difference("pasted", labels["pasted"], labels["unmodified"], "rate")
    assert rows["pasted"].adjusted is not None
    assert rows["pasted"].adjusted < 0.05
    assert rows["random"].adjusted is not None
    assert rows["random"].adjusted > 0.05
    expected = recovered_fraction(labels["pasted"], labels["unmodified"], labels["direct"], "rate", "more")
    assert rows["pasted"].recovered == expected
    assert rows["direct"].recovered is None
    del labels["direct"]
    assert all(row.recovered is None for row in compare(labels, "rate", "more"))


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"pasted": [[1.0]]}, "'unmodified' is not among the arms"),
        ({"unmodified": []}, "unmodified: no labels"),
        ({"unmodified": [[]]}, "unmodified: no labels"),
        ({"unmodified": [[1.0, 0.0], [1.0]]}, "seeds with \\[1, 2\\] labels"),
        ({"unmodified": [[NAN, NAN]]}, "no judgment on any of 2"),
        ({"unmodified": [[0.0, 1.0, 0.5]]}, "label 0.5 in a rate"),
        ({"unmodified": [[math.inf]]}, "an infinite label"),
        ({"unmodified": [[1.0]], "pasted": [[1.0, 0.0]]}, "pasted 2, unmodified 1.*same prompts"),
        ({"unmodified": [[1.0]] * 2, "pasted": [[1.0]] * 3}, "different numbers of seeds"),
        ({"unmodified": [[1.0, NAN]], "pasted": [[NAN, 1.0]]}, "no prompt was judged in each of pasted, unmodified"),
    ],
)
def test_arms_that_cannot_be_compared(arms: dict[str, list[list[float]]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(arms, "rate", "more")


# Judges


def test_kappa_is_statsmodels() -> None:
    rng = np.random.default_rng(10)
    a = rng.integers(0, 3, 60).astype(float)
    b = np.where(rng.random(60) < 0.7, a, rng.integers(0, 3, 60))
    counts = np.array([[int(((a == i) & (b == j)).sum()) for j in range(3)] for i in range(3)])
    expected = inter_rater.cohens_kappa(counts)
    value, n = kappa([*a, NAN, 1.0, 0.0], [*b, 1.0, NAN, None])
    assert value == pytest.approx(expected.kappa)
    assert n == 60


def test_kappa_at_the_ends() -> None:
    assert kappa([0, 1, 0, 1], [0, 1, 0, 1]) == (1, 4)
    assert kappa([0, 1], [1, 0]) == (-1, 2)
    assert math.isnan(kappa([1, 1], [1, 1])[0])
    with pytest.raises(InputError, match="2 and 1 labels"):
        kappa([0, 1], [1])
    with pytest.raises(InputError, match="let both judge"):
        kappa([0, NAN], [NAN, 1])
