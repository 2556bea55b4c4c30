"""Ridge against its closed form, and how its strength is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from commandv.errors import InputError
from commandv.transfer.convert import strength as strength_module
from commandv.transfer.convert.factor import Factor
from commandv.transfer.convert.fitters import Affine, Pinv, ReducedRank, Ridge
from commandv.transfer.convert.rows import Rows
from commandv.transfer.convert.strength import STRENGTHS, _sample, choose_strength, gcv, loo, sketch
from commandv.transfer.fidelity import r2
from rows import SHAPES, normal, rank_of_condition, related, relative


def closed_form(x: Tensor, y: Tensor, strength: float, standardise: bool) -> tuple[Tensor, Tensor]:
    """A and a of ridge in float64, from the normal equations of the centred rows; `strength` is relative."""
    x, y = x.double(), y.double()
    scale = x.std(0, correction=0) if standardise else torch.ones(x.shape[1]).double()
    z = (x - x.mean(0)) / scale
    penalty = strength * float(z.square().sum()) / min(x.shape)
    weight = torch.linalg.solve(z.T @ z + penalty * torch.eye(x.shape[1]), z.T @ (y - y.mean(0))) / scale[:, None]
    return weight, y.mean(0) - x.mean(0) @ weight


@pytest.mark.parametrize("strength", [1e-6, 0.03, 1.0, 100.0])
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_ridge_is_its_closed_form(shape, standardise, strength):
    x, y = related(*SHAPES[shape])
    weight, bias = Ridge(strength=strength, standardise=standardise)(x, y).matrix()
    expected = closed_form(x, y, strength, standardise)
    assert relative(weight, expected[0]) < 1e-3
    assert relative(bias, expected[1]) < 1e-3


@pytest.mark.parametrize("strength", [1e-3, 1e-9])
def test_weak_strengths_are_solved_in_float64(strength):
    """A float32 Gram matrix is off by more than such a strength."""
    x, y = rank_of_condition(60, 30, 1e5), normal(60, 8, seed=3)
    weight = Ridge(strength=strength, standardise=False)(x, y).matrix()[0]
    assert relative(weight, closed_form(x, y, strength, False)[0]) < 1e-6


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_ridge_refuses_strengths_that_are_none(strength):
    with pytest.raises(InputError, match="strength"):
        Ridge(strength=strength)


def test_ridge_refuses_an_unknown_rule_and_reduced_rank_no_rank():
    with pytest.raises(InputError, match="select is a str 'aic', expected one of 'loo', 'gcv'"):
        Ridge(select="aic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rank=0"):
        ReducedRank(rank=0)


def centred(y: Tensor) -> np.ndarray:
    return (y.double() - y.double().mean(0)).numpy()


def leave_out(
    z: np.ndarray, t: np.ndarray, strength: float, groups: np.ndarray, drawn: np.ndarray | None = None
) -> float:
    """Sum of squared errors on each group from a ridge with intercept refitted without it, columns scaled as given."""
    total = 0.0
    for group in np.unique(groups) if drawn is None else drawn:
        kept, out = groups != group, groups == group
        mean_z, mean_t = z[kept].mean(0), t[kept].mean(0)
        centred = z[kept] - mean_z
        a = np.linalg.solve(centred.T @ centred + strength * np.eye(z.shape[1]), centred.T @ (t[kept] - mean_t))
        total += float(((t[out] - mean_t - (z[out] - mean_z) @ a) ** 2).sum())
    return total


def predictors(x: Tensor, dtype: type = np.float64) -> tuple[Factor, np.ndarray]:
    rows = Rows.of(x.double(), centre=True, standardise=True)
    return Factor.of(rows, dtype), rows.dense(np.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_is_above_the_greatest_eigenvalue_and_the_unit_is_the_mean(shape):
    factor, z = predictors(related(*SHAPES[shape])[0])
    values = np.linalg.eigvalsh(z @ z.T if factor.rows.dual else z.T @ z)
    assert values[-1] <= factor.bound * (1 + 1e-9) <= 4 * values[-1]
    assert factor.unit == pytest.approx(values.mean())


def test_means_and_deviations_are_those_of_all_blocks_together():
    n = 200_000  # more than a block holds
    x = normal(n, 3, seed=5).double() + torch.arange(n)[:, None] / n * torch.tensor([0.0, 1.0, -3.0])  # blocks differ
    rows = Rows.of(x, centre=True, standardise=True)
    np.testing.assert_allclose(rows.mean, x.numpy().mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(rows.scale, x.numpy().std(0), rtol=1e-9)


def test_rows_that_are_all_alike_have_the_unit_one():
    factor, _ = predictors(torch.ones(5, 3))
    assert factor.unit == 1.0


def prompts(n: int, kind: str) -> np.ndarray:
    """Prompt numbers, of unequal sizes and not side by side where there are several rows of one."""
    return {
        "rows": np.arange(n),
        "prompts": np.random.default_rng(1).integers(0, n // 3, n),
        "pairs": np.arange(n) % (n // 2),
    }[kind]


@pytest.mark.parametrize("kind", ["rows", "pairs", "prompts"])
@pytest.mark.parametrize("shape", SHAPES)
def test_leave_one_out_is_refitting_without_each_row_or_prompt(shape, kind):
    x, y = related(*SHAPES[shape])
    (factor, z), t, groups = predictors(x), centred(y), prompts(len(x), kind)
    expected = [leave_out(z, t, strength * factor.unit, groups) for strength in STRENGTHS]
    got, sure = loo(factor, t, STRENGTHS, groups=groups), STRENGTHS > 2e-3
    np.testing.assert_allclose(got[sure], np.array(expected)[sure], rtol=1e-8)
    np.testing.assert_allclose(got, expected, rtol=1e-4)  # weaker ones are nearer to the rounding of either side
    single = loo(predictors(x, np.float32)[0], t.astype(np.float32), STRENGTHS[sure], groups=groups)
    np.testing.assert_allclose(single, got[sure], rtol=1e-2)


def test_long_recurrences_are_cut_into_blocks_without_a_seam(monkeypatch):
    x, y = related(*SHAPES["N>d"])
    (factor, _), t, groups = predictors(x), centred(y), prompts(len(x), "prompts")
    whole = loo(factor, t, STRENGTHS, groups=groups)
    for size in (1, 5 * len(STRENGTHS) * len(x) * 8):
        monkeypatch.setattr(strength_module, "BLOCK_BYTES", size)
        np.testing.assert_allclose(loo(factor, t, STRENGTHS, groups=groups), whole, rtol=1e-9)


@pytest.mark.parametrize("kind", ["rows", "prompts"])
@pytest.mark.parametrize("shape", SHAPES)
def test_leave_one_out_on_a_sample_is_refitting_without_what_was_drawn(monkeypatch, shape, kind):
    monkeypatch.setattr(strength_module, "LOO_ROWS", 8)
    x, y = related(*SHAPES[shape])
    (factor, z), t, groups = predictors(x), centred(y), prompts(len(x), kind)
    index, sizes = _sample(groups)
    drawn = np.unique(groups[index])
    assert len(drawn) == len(sizes) < len(np.unique(groups))
    assert np.array_equal(np.sort(index), np.flatnonzero(np.isin(groups, drawn)))  # all rows of what was drawn
    assert len(index) < 20
    strengths = STRENGTHS[::6]
    expected = [leave_out(z, t, strength * factor.unit, groups, drawn) for strength in strengths]
    np.testing.assert_allclose(loo(factor, t, strengths, groups=groups), expected, rtol=1e-4)


@pytest.mark.parametrize("prompt", [1, 8])
@pytest.mark.parametrize("decay", [0.35, 1.0])
@pytest.mark.parametrize("shape", [(1600, 200), (1100, 1200)], ids=["N>d", "N<d"])
def test_a_sample_of_rows_chooses_nearly_what_all_choose(monkeypatch, shape, decay, prompt):
    """Spectra that decay as those of activations do."""
    (n, d), groups = shape, np.arange(shape[0]) // prompt
    spectrum = torch.arange(1, min(shape) + 1).double() ** -decay
    shared = normal(n, len(spectrum)) + normal(n // prompt + 1, len(spectrum), seed=1).repeat_interleave(prompt, 0)[:n]
    x, y = (
        (shared + mix * normal(n, len(spectrum), seed=2 + mix)) * spectrum @ normal(len(spectrum), d, seed=4 + mix)
        for mix in (0, 1)
    )
    factor, t = predictors(x)[0], sketch(Rows.of(y, centre=True, standardise=True), np.float64)
    some = loo(factor, t, STRENGTHS, groups=groups)
    monkeypatch.setattr(strength_module, "LOO_ROWS", n)
    everything = loo(factor, t, STRENGTHS, groups=groups)
    assert abs(int(np.argmin(some)) - int(np.argmin(everything))) <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_gcv_is_its_formula(shape):
    x, y = related(*SHAPES[shape], noise=1.0)
    (factor, z), t, n = predictors(x), centred(y), len(x)
    scores = []
    for strength in STRENGTHS * factor.unit:
        hat = z @ np.linalg.solve(z.T @ z + strength * np.eye(z.shape[1]), z.T) + 1 / n
        scores.append(((t - hat @ t) ** 2).sum() / np.trace(np.eye(n) - hat) ** 2)
    got, sure = gcv(factor, t, STRENGTHS), STRENGTHS > 2e-3
    np.testing.assert_allclose(got[sure], np.array(scores)[sure], rtol=1e-7)
    np.testing.assert_allclose(got, scores, rtol=1e-4)
    single = gcv(predictors(x, np.float32)[0], t.astype(np.float32), STRENGTHS[sure])
    np.testing.assert_allclose(single, got[sure], rtol=1e-2)


@pytest.mark.parametrize("method", ["loo", "gcv"])
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_strength_is_chosen_and_float64_not_asked_for_strong_ones(shape, noise, method):
    x, y = related(*SHAPES[shape], noise=noise)
    rows, targets = Rows.of(x, centre=True, standardise=True), Rows.of(y, centre=True, standardise=True)
    asked: list[type] = []

    def factorise(dtype: type) -> Factor:
        asked.append(dtype)
        return Factor.of(rows, dtype)

    groups = np.arange(len(x))
    chosen = choose_strength(factorise, targets, groups, method)
    factor, t = Factor.of(rows, np.float64), sketch(targets, np.float64)
    scores = loo(factor, t, STRENGTHS, groups=groups) if method == "loo" else gcv(factor, t, STRENGTHS)
    assert scores[chosen == STRENGTHS] <= 1.01 * scores.min()
    assert (np.float64 in asked) == (chosen < 1e-3)


def test_strengths_are_half_decades_from_1e_6_and_quarters_from_1e_3_to_10_to_the_2_75():
    powers = [-6, -5.5, -5, -4.5, -4, -3.5, *(-3 + quarter / 4 for quarter in range(24))]
    np.testing.assert_allclose(STRENGTHS, [10**power for power in powers], rtol=1e-12)
    assert len(STRENGTHS) == 30


@pytest.mark.parametrize("method", ["loo", "gcv"])
def test_strengths_that_drown_in_float32_are_tried_only_where_the_weakest_other_seems_best(monkeypatch, method):
    """Below 1e-4 of the greatest eigenvalue; then all are tried anew in float64."""
    x, y = related(60, 14, 18)
    rows, targets = Rows.of(x * 10, centre=True, standardise=False), Rows.of(y, centre=True, standardise=True)
    factor = Factor.of(rows, np.float32)
    weakest = 1e-4 * factor.bound / factor.unit
    tried: list[tuple[type, np.ndarray]] = []

    def scores(best: int):
        def told(factor, t, strengths, **_):
            tried.append((factor.dtype.type, strengths))
            return np.abs(np.arange(len(strengths)) - best % len(strengths))

        return told

    for best, dtypes in ((0, [np.float32, np.float64]), (1, [np.float32]), (-1, [np.float32])):
        tried.clear()
        monkeypatch.setattr(strength_module, method, scores(best))
        chosen = choose_strength(lambda dtype: Factor.of(rows, dtype), targets, np.arange(60), method)
        assert [dtype for dtype, _ in tried] == dtypes
        np.testing.assert_array_equal(tried[0][1], STRENGTHS[weakest <= STRENGTHS])
        assert len(tried[0][1]) < len(STRENGTHS)
        np.testing.assert_array_equal(tried[-1][1], STRENGTHS if best == 0 else tried[0][1])
        assert chosen == tried[-1][1][best]


def test_a_given_strength_is_solved_in_float64_from_1e_4_of_the_greatest_eigenvalue_down():
    x, y = related(60, 14, 18)
    rows = Rows.of(x * 10, centre=True, standardise=False)
    factor = Factor.of(rows, np.float32)
    for share, dtype in ((1.5e-4, np.float32), (0.9e-4, np.float64)):
        ridge = Ridge(strength=share * factor.bound / factor.unit, standardise=False)
        assert ridge.solve(x * 10, y, groups=None, kept=None)[0].dtype == dtype


def test_about_512_rows_of_whole_prompts_choose():
    assert [len(part) for part in _sample(np.arange(4096))] == [512, 512]
    index, sizes = _sample(np.zeros(2000, np.int64))  # all of one prompt, which cannot be cut
    assert (len(index), sizes.tolist()) == (2000, [2000])
    index, sizes = _sample(np.repeat(np.arange(2), 2000))
    assert (len(index), sizes.tolist()) == (2000, [2000])


@pytest.mark.parametrize("shape", SHAPES)
def test_gcv_of_targets_a_thousandth_the_size_is_a_millionth(shape):
    x, y = related(*SHAPES[shape], noise=1.0)
    factor, t = predictors(x)[0], centred(y)
    np.testing.assert_allclose(gcv(factor, 1e-3 * t, STRENGTHS), 1e-6 * gcv(factor, t, STRENGTHS), rtol=1e-5)


def test_nearly_exact_relations_get_weak_strengths():
    """As between a model and a rotated twin of it, kept in bfloat16."""
    x = normal(200, 40)
    y = x @ torch.linalg.qr(normal(40, 40, seed=1)).Q
    fitted = Ridge()(x[:150], y[:150])
    assert fitted.facts["strength"] <= 1e-5
    assert r2(fitted(x[150:]), y[150:]) > 1 - 1e-8
    rounded = Ridge()(x[:150].bfloat16(), y[:150].bfloat16())
    assert 1e-6 <= rounded.facts["strength"] < 1e-3


@pytest.mark.parametrize("select", ["loo", "gcv"])
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("n", [2, 3])
def test_a_few_rows_of_a_few_dimensions(n, d, select):
    x, y = related(n, d, 2)
    ridge = Ridge(select=select)(x, y)
    expected = closed_form(x, y, ridge.facts["strength"], True)
    for got, wanted in zip(ridge.matrix(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeated_rows_and_constant_columns_leave_ridge_its_closed_form(shape):
    x, y = related(*SHAPES[shape])
    x, y = torch.cat([x, x[:5]]), torch.cat([y, y[:5]])
    x[:, 2] = 7.5
    for strength in (1e-6, 0.1):
        weight, _ = Ridge(strength=strength)(x, y).matrix()
        z = x.double() - x.double().mean(0)
        scale = torch.where(z.abs().amax(0) > 0, z.square().mean(0).sqrt(), 1.0)
        z = z / scale
        penalty = strength * float(z.square().sum()) / min(x.shape)
        inner = torch.linalg.solve(z @ z.T + penalty * torch.eye(len(z)), y.double() - y.double().mean(0))
        assert relative(weight, z.T @ inner / scale[:, None]) < 1e-3
    assert np.isfinite(Ridge()(x, y).facts["strength"])


def test_strengths_below_all_rounding_still_solve():
    """Such as leave a singular Gram matrix singular; they act as the rounding's own size does."""
    x, y = (one.double() for one in related(60, 14, 18))
    x = torch.cat([x, x], 1)
    weight, bias = Ridge(strength=1e-300)(x, y).matrix()
    scale = x.std(0, correction=0)
    expected = torch.linalg.pinv((x - x.mean(0)) / scale, rtol=1e-7) @ (y - y.mean(0)) / scale[:, None]
    assert relative(weight, expected) < 1e-3
    assert torch.isfinite(bias).all()
    alike = Ridge(strength=1e-300)(x[:1].expand(9, -1), y[:9])
    torch.testing.assert_close(alike(x[:1])[0], y[:9].mean(0), rtol=1e-4, atol=1e-4)


def test_rows_of_one_prompt_are_left_out_together():
    """Near-copies of every row make a weak ridge look good unless the copies leave together."""
    x, y = related(12, 30, 8, noise=1.5)
    x, y = (one.repeat(4, 1) for one in (x, y))
    x = x + 1e-3 * normal(*x.shape, seed=8).float()
    groups = np.tile(np.arange(12), 4)
    together, apart = Ridge()(x, y, groups=groups), Ridge()(x, y)
    assert together.facts["strength"] > 5 * apart.facts["strength"]


@pytest.mark.parametrize("select", ["loo", "gcv"])
@pytest.mark.parametrize("n", [40, 61, 150])
def test_chosen_strength_beats_pinv_on_rows_not_seen(n, select):
    x, y = (one.double() for one in related(n + 200, 60, 20, noise=1.0))
    unseen = slice(n, None)
    score = {fit: r2(fit(x[:n], y[:n])(x[unseen]), y[unseen]) for fit in (Ridge(select=select), Pinv(), Affine())}
    assert score[Ridge(select=select)] > 0.1
    assert score[Ridge(select=select)] > max(score[Pinv()], score[Affine()]) + 0.01


def test_chosen_strength_is_near_the_best_on_rows_not_seen():
    x, y = (one.double() for one in related(300, 60, 20, noise=1.0))
    chosen = r2(Ridge()(x[:80], y[:80])(x[80:]), y[80:])
    best = max(r2(Ridge(strength=float(s))(x[:80], y[:80])(x[80:]), y[80:]) for s in STRENGTHS)
    assert best - chosen < 0.02


def test_ridge_stands_on_its_own_units():
    x, y = related(40, 12, 10)
    factors = 2.0 ** torch.arange(-6, 6)
    states = x[:7]
    plain, rescaled = Ridge()(x, y)(states), Ridge()(x * factors, y)(states * factors)
    torch.testing.assert_close(rescaled, plain, rtol=1e-3, atol=1e-3)
    raw = Ridge(standardise=False)
    assert relative(raw(x * factors, y)(states * factors), raw(x, y)(states)) > 1e-2


def test_sketch_keeps_the_proportions_of_sums_of_squares():
    y = normal(300, 400) * torch.logspace(0, -1, 400)
    projected = sketch(Rows.of(y, centre=True, standardise=False), np.float64)
    thirds = [(projected[i : i + 100] ** 2).sum() / float(y[i : i + 100].square().sum()) for i in (0, 100, 200)]
    assert max(thirds) / min(thirds) < 1.15
    assert 0.8 < min(thirds) < max(thirds) < 1.25
    assert projected.shape == (300, 24)
