"""The converters: one contract over every fitter, and each fitter against its closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commandv.convert import FITTERS, Affine, FactorStore, FourierRidge, Pinv, Procrustes, ReducedRank, Ridge
from commandv.convert import strength as strength_module
from commandv.convert.factor import Cholesky, Factor, Spectral
from commandv.convert.rows import Rows
from commandv.convert.strength import STRENGTHS, _sample, choose_strength, gcv, loo, sketch
from commandv.errors import InputError
from commandv.held_out import r2

SHAPES = {"N<d": (12, 20, 17), "N=d": (16, 16, 16), "N>d": (60, 14, 18)}
FIT = [pytest.param(cls(), id=name) for name, cls in FITTERS.items()] + [
    pytest.param(Pinv(exact=True), id="pinv-exact"),
    pytest.param(Ridge(select="gcv", standardise=False), id="ridge-gcv"),
    pytest.param(ReducedRank(rank=3), id="reduced-rank-3"),
]
IN_CLOSED_FORM = [fit for fit in FIT if fit.id != "autoencoder"]  # which sees its rows one after the other


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, d_x: int, d_y: int, *, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows with means far from zero, y linear in x up to noise; float32, as profiles come."""
    x = normal(n, d_x, seed=seed) * (0.5 + normal(d_x, seed=seed + 1).abs()) + 2 * normal(d_x, seed=seed + 2)
    y = x @ normal(d_x, d_y, seed=seed + 3) / d_x**0.5 + noise * normal(n, d_y, seed=seed + 4) + 3
    return x.float(), y.float()


def rank_of_condition(n: int, d: int, condition: float, seed: int = 0) -> Tensor:
    """Rows of full rank with singular values from 1 down to 1 / condition, float64."""
    k = min(n, d)
    u, v = (torch.linalg.qr(normal(size, k, seed=seed + i)).Q for i, size in enumerate((n, d)))
    return (u * torch.logspace(0, -np.log10(condition), k, dtype=torch.float64)) @ v.T


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def action(converter, d_x: int, d_y: int) -> Tensor:
    """What a converter does, to compare it by: its matrix, or its values on fixed states if it is not affine."""
    return converter.matrix(d_y)[0] if converter.affine else converter(normal(20, d_x, seed=12))


def solved(solver, n: int, d: int) -> Tensor:
    """The map that a solver applies, from its right side."""
    return torch.from_numpy(solver.right(np.eye(n))).double()


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", FIT)
def test_pull_push_call_and_matrix_are_one_affine_map(fit, shape):
    x, y = related(*SHAPES[shape])
    converter = fit(x, y)
    if not converter.affine:
        assert not {"pull", "push", "matrix"} & set(dir(converter))
        states = normal(2, 5, x.shape[1])
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            out = converter(states.to(dtype))
            assert (out.shape, out.dtype) == ((2, 5, y.shape[1]), dtype)
        torch.testing.assert_close(converter(states)[1, 3], converter(states[1, 3]), rtol=1e-4, atol=1e-4)
        return
    weight, bias = converter.matrix(y.shape[1])
    assert weight.shape == (x.shape[1], y.shape[1])
    size = float(weight.norm())
    read, write, states = normal(3, y.shape[1], seed=9), normal(2, x.shape[1], seed=10), normal(2, 5, x.shape[1])
    pulled, shift = converter.pull(read)
    torch.testing.assert_close(pulled, read @ weight.T, rtol=1e-3, atol=1e-4 * size)
    torch.testing.assert_close(shift, read @ bias, rtol=1e-3, atol=1e-3 * size)
    torch.testing.assert_close(converter.push(write), write @ weight, rtol=1e-3, atol=1e-4 * size)
    torch.testing.assert_close(converter(states), states @ weight + bias, rtol=1e-3, atol=1e-3 * size)
    assert converter(states.float()).dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", IN_CLOSED_FORM)
def test_the_order_of_rows_does_not_matter(fit, shape):
    x, y = related(*SHAPES[shape])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    first, second = (action(fit(*rows), x.shape[1], y.shape[1]) for rows in ((x, y), (x[order], y[order])))
    assert relative(second, first) < 2e-3


@pytest.mark.parametrize("fit", FIT)
def test_inputs_are_not_changed(fit):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, y = (one.to(dtype) for one in related(30, 10, 12))
        copies = x.clone(), y.clone()
        fit(x, y)(normal(2, 10))
        assert torch.equal(x, copies[0])
        assert torch.equal(y, copies[1])


@pytest.mark.parametrize("fit", FIT)
def test_rows_that_do_not_pair_up_or_are_too_few_are_refused(fit):
    x, y = related(10, 6, 5)
    with pytest.raises(InputError, match=r"10 rows of x and 9 rows of y"):
        fit(x, y[:9])
    with pytest.raises(InputError, match="2 rows or more"):
        fit(x[:1], y[:1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("fit", FIT)
def test_rows_that_are_not_finite_are_refused(fit, side, bad):
    x, y = related(10, 6, 5)
    (x if side == "x" else y)[3, 2] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        fit(x, y)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", FIT)
def test_constant_columns_are_carried_as_constants(fit, shape):
    x, y = related(*SHAPES[shape])
    x[:, 3], y[:, 4], y[:, 5] = 1234.5, -77.25, 0.0
    converter = fit(x, y)
    out = converter(x.double())
    assert torch.isfinite(out).all()
    if converter.facts["fit"] != "pinv":  # which has no intercept
        torch.testing.assert_close(out[:, 4], torch.full((len(x),), -77.25).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(out[:, 5], torch.zeros(len(x)).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", FIT)
def test_rows_that_are_all_alike_predict_their_mean(fit, shape):
    x, y = related(*SHAPES[shape])
    x = x[:1].expand(len(x), -1)
    torch.testing.assert_close(fit(x, y)(x[:1])[0], y.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", [Pinv(), Pinv(exact=True), Affine()], ids=["pinv", "pinv-exact", "affine"])
def test_repeated_rows_do_not_break_least_squares(fit, shape):
    x, y = (one.double() for one in related(*SHAPES[shape]))
    x, y = torch.cat([x, x[:5]]), torch.cat([y, y[:5]])
    if isinstance(fit, Affine):
        expected = torch.linalg.pinv(x - x.mean(0), rtol=1e-7) @ (y - y.mean(0))
    else:
        expected = torch.linalg.pinv(x, rtol=1e-6) @ y
    assert relative(fit(x, y).matrix(y.shape[1])[0], expected) < 1e-6


@pytest.mark.parametrize("fit", IN_CLOSED_FORM)
def test_repeating_every_row_changes_no_fit_at_a_fixed_strength(fit):
    if isinstance(fit, Ridge | ReducedRank):
        # The strength is relative to the mean eigenvalue, which doubles with the rows when N > d.
        fit = Ridge(strength=0.1) if isinstance(fit, Ridge) else ReducedRank(fit.rank, Ridge(strength=0.1))
    if isinstance(fit, FourierRidge):  # and the median distance would be another
        fit = FourierRidge(features=8, bandwidth=5.0, strength=0.1)
    x, y = related(60, 14, 18)
    twin, groups = (torch.cat([x, x]), torch.cat([y, y])), np.arange(120) % 60
    once, twice = action(fit(x, y), 14, 18), action(fit(*twin, groups=groups), 14, 18)
    assert relative(twice, once) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", FIT)
def test_outlier_dimensions_of_scale_1e4_do_no_harm(fit, shape):
    n, d_x, d_y = SHAPES[shape]
    x, y = related(n, d_x, d_y, noise=0.1)
    tame = fit(x, y)(x)
    wild_x, wild_y = x.clone(), y.clone()
    wild_x[:, 1] *= 1e4
    wild_y[:, 2] *= 1e4
    out = fit(wild_x, wild_y)(wild_x)
    out[:, 2] /= 1e4
    assert torch.isfinite(out).all()
    if getattr(fit, "standardise", True):  # a ridge that does not standardise may see nothing but the outlier
        assert r2(out.double(), y.double()) > r2(tame.double(), y.double()) - 0.02


# -- least squares ----------------------------------------------------------------------------------------------------

DIMENSIONS = st.integers(2, 14)
SEEDS = st.integers(0, 10_000)


@settings(max_examples=40, deadline=None)
@given(n=DIMENSIONS, d=DIMENSIONS, rank=DIMENSIONS, seed=SEEDS, exact=st.booleans())
def test_moore_penrose_conditions(n, d, rank, seed, exact):
    rank = min(n, d, rank)
    x = rank_of_condition(n, rank, 50.0, seed) @ torch.linalg.qr(normal(d, rank, seed=seed + 7)).Q.T
    p = Pinv(exact=exact)(x, torch.eye(n, dtype=torch.float64)).matrix(n)[0]  # X⁺ I
    size = float(p.norm())
    torch.testing.assert_close(x @ p @ x, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(p @ x @ p, p, rtol=0, atol=1e-8 * size)
    torch.testing.assert_close(x @ p, (x @ p).T, rtol=0, atol=1e-8 * size)
    torch.testing.assert_close(p @ x, (p @ x).T, rtol=0, atol=1e-8 * size)


@settings(max_examples=30, deadline=None)
@given(n=DIMENSIONS, d=DIMENSIONS, seed=SEEDS, exact=st.booleans())
def test_pinv_solves_the_normal_equations_with_the_smallest_norm(n, d, seed, exact):
    x, y = rank_of_condition(n, d, 50.0, seed), normal(n, 3, seed=seed + 3)
    weight = Pinv(exact=exact)(x, y).matrix(3)[0]
    torch.testing.assert_close(x.T @ (x @ weight - y), torch.zeros(d, 3).double(), rtol=0, atol=1e-8)
    # Any other solution adds something that X does not see; the smallest one has no such part.
    unseen = torch.eye(d, dtype=torch.float64) - torch.linalg.pinv(x) @ x
    torch.testing.assert_close(unseen @ weight, torch.zeros(d, 3).double(), rtol=0, atol=1e-8 * float(weight.norm()))


@settings(max_examples=20, deadline=None)
@given(n=DIMENSIONS, d=DIMENSIONS, seed=SEEDS, strength=st.sampled_from([None, 0.01, 3.0]))
def test_solvers_apply_one_matrix_from_both_sides(n, d, seed, strength):
    x, y = related(max(n, 4), d, 3, seed=seed)
    solver = Ridge(strength=strength).solve(x, y, groups=None, store=None, key=None)[0]
    from_left = torch.from_numpy(solver.left(np.eye(d))).double()
    assert relative(from_left, solved(solver, len(x), d)) < 1e-3


@pytest.mark.parametrize("shape", [(40, 90, 70), (90, 90, 70), (200, 60, 70)], ids=list(SHAPES))
def test_pinv_is_the_published_computation(shape):
    x, y = related(*shape)
    published = torch.linalg.pinv(x) @ y
    condition = float(torch.linalg.cond(x.double()))
    assert relative(Pinv()(x, y).matrix(shape[2])[0], published) < 20 * condition * torch.finfo(torch.float32).eps


def test_pinv_cuts_what_the_published_float32_computation_cuts():
    n, d = 50, 80
    x = rank_of_condition(n, d, 1e8).float()  # float32 pinv cuts at 80 * 1.2e-7 = 9.5e-6
    y = normal(n, 6).float()
    cut = torch.linalg.pinv(x.double(), rtol=max(n, d) * torch.finfo(torch.float32).eps) @ y.double()
    assert relative(Pinv()(x, y).matrix(6)[0], cut) < 1e-3
    assert relative(Pinv(exact=True)(x, y).matrix(6)[0], cut) > 0.1


@pytest.mark.parametrize("shape", [(40, 80), (80, 80), (120, 50)], ids=list(SHAPES))
@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4, 1e5, 1e6])
def test_folded_action_agrees_with_a_float64_svd(condition, shape):
    x, y = rank_of_condition(*shape, condition), normal(shape[0], 30, seed=5)
    expected = torch.linalg.pinv(x, rtol=1e-12) @ y
    converter = Pinv(exact=True)(x, y)
    read, write = normal(8, 30, seed=6), normal(8, shape[1], seed=7)
    allowed = max(1e-12, 1e-15 * condition)  # 1e-6 is asked for up to 1e5; without refinement 1e6 misses even that
    assert relative(converter.pull(read)[0], read @ expected.T) < allowed
    assert relative(converter.push(write), write @ expected) < allowed


@pytest.mark.parametrize("fit", [Affine(), Ridge(), ReducedRank(rank=200), Procrustes()], ids=lambda fit: fit.name)
def test_shifting_either_stream_shifts_the_prediction_only(fit):
    x, y = (one.double() for one in related(50, 12, 10))
    by_x, by_y = 5 * normal(12, seed=3), 5 * normal(10, seed=4)
    plain, shifted = fit(x, y), fit(x + by_x, y + by_y)
    states = normal(7, 12, seed=5)
    torch.testing.assert_close(shifted(states + by_x), plain(states) + by_y, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(shifted.push(states), plain.push(states), rtol=1e-3, atol=1e-3)


def test_affine_is_least_squares_with_an_intercept():
    x, y = (one.double() for one in related(50, 12, 10))
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(50, 1).double()], 1), y).solution
    weight, bias = Affine()(x, y).matrix(10)
    torch.testing.assert_close(weight, expected[:-1], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(bias, expected[-1], rtol=1e-8, atol=1e-9)


# -- ridge ------------------------------------------------------------------------------------------------------------


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
    weight, bias = Ridge(strength=strength, standardise=standardise)(x, y).matrix(y.shape[1])
    expected = closed_form(x, y, strength, standardise)
    assert relative(weight, expected[0]) < 1e-3
    assert relative(bias, expected[1]) < 1e-3


@pytest.mark.parametrize("strength", [1e-3, 1e-9])
def test_weak_strengths_are_solved_in_float64(strength):
    """A float32 Gram matrix is off by more than such a strength."""
    x, y = rank_of_condition(60, 30, 1e5), normal(60, 8, seed=3)
    weight = Ridge(strength=strength, standardise=False)(x, y).matrix(8)[0]
    assert relative(weight, closed_form(x, y, strength, False)[0]) < 1e-6


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_ridge_refuses_strengths_that_are_none(strength):
    with pytest.raises(InputError, match="strength"):
        Ridge(strength=strength)


def test_ridge_refuses_an_unknown_rule_and_reduced_rank_no_rank():
    with pytest.raises(InputError, match="'loo' or 'gcv'"):
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
    for got, wanted in zip(ridge.matrix(2), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeated_rows_and_constant_columns_leave_ridge_its_closed_form(shape):
    x, y = related(*SHAPES[shape])
    x, y = torch.cat([x, x[:5]]), torch.cat([y, y[:5]])
    x[:, 2] = 7.5
    for strength in (1e-6, 0.1):
        weight, _ = Ridge(strength=strength)(x, y).matrix(y.shape[1])
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
    weight, bias = Ridge(strength=1e-300)(x, y).matrix(18)
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


# -- reduced rank, Procrustes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_reduced_rank_has_the_rank_and_is_ridge_at_full_rank(shape):
    x, y = related(*SHAPES[shape])
    ridge = Ridge(strength=0.1)
    whole = ridge(x, y).matrix(y.shape[1])[0]
    narrow = ReducedRank(4, ridge)(x, y)
    assert narrow.facts["rank"] == 4
    singular = torch.linalg.svdvals(narrow.matrix(y.shape[1])[0])
    assert singular[3] > 1e-3 * singular[0]
    assert singular[4] < 1e-5 * singular[0]
    assert relative(ReducedRank(500, ridge)(x, y).matrix(y.shape[1])[0], whole) < 2e-3


def test_reduced_rank_keeps_the_directions_that_explain_most():
    x, y = (one.double() for one in related(80, 14, 12, noise=0.1))
    ridge = Ridge(strength=0.1)
    scale = y.std(0, correction=0)
    fitted = (ridge(x, y)(x) - y.mean(0)) / scale
    u, s, vt = torch.linalg.svd(fitted, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vt[:3]
    got = (ReducedRank(3, ridge)(x, y)(x) - y.mean(0)) / scale
    assert relative(got, best) < 1e-3


@pytest.mark.parametrize("n", [15, 60])
def test_procrustes_recovers_a_rotation_and_a_scale(n):
    """Of standardised rows: white ones stay standard under a rotation. With few rows, on what they span."""
    d = 10 if n > 20 else 25
    white = normal(n, d)
    white = white - white.mean(0)
    if n > d:
        white = torch.linalg.qr(white).Q * n**0.5
        rotation = torch.linalg.qr(normal(d, d, seed=3)).Q
        x = white * torch.logspace(-1, 1, d) + 4
        y = (white @ rotation) * torch.logspace(1, -1, d) - 2
    else:
        rotation = torch.eye(d, dtype=torch.float64)[torch.randperm(d, generator=torch.Generator().manual_seed(1))]
        x, y = white + 4, 3 * white @ rotation - 2
    got = Procrustes()(x, y)(x)
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-4)


def test_procrustes_is_a_scaled_rotation_of_standardised_rows():
    x, y = (one.double() for one in related(80, 12, 12))
    weight = Procrustes()(x, y).matrix(12)[0]
    q = weight * x.std(0, correction=0)[:, None] / y.std(0, correction=0)
    gram = q.T @ q
    factor = float(gram.diagonal().mean())
    torch.testing.assert_close(gram, factor * torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-4 * factor)
    # The scale is the best one.
    t = (y - y.mean(0)) / y.std(0, correction=0)
    z = (x - x.mean(0)) / x.std(0, correction=0) @ q
    assert float((z * t).sum() / z.square().sum()) == pytest.approx(1.0, abs=1e-4)


# -- what is kept for the next adapter --------------------------------------------------------------------------------


@pytest.fixture
def factorisations(monkeypatch) -> list[str]:
    seen: list[str] = []
    for cls in (Factor, Cholesky, Spectral):
        original = cls.of.__func__

        def counted(kind, *args, original=original):
            seen.append(kind.__name__)
            return original(kind, *args)

        monkeypatch.setattr(cls, "of", classmethod(counted))
    return seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", [fit for fit in IN_CLOSED_FORM if fit.id != "procrustes"])  # which factorises nothing
def test_a_store_spares_factorisations_and_changes_nothing(fit, shape, factorisations):
    x, y = related(*SHAPES[shape])
    plain = action(fit(x, y), x.shape[1], y.shape[1])
    store = FactorStore()
    first = action(fit(x, y, store=store, key=("x", "y")), x.shape[1], y.shape[1])
    needed = len(factorisations)
    second = action(fit(x, y, store=store, key=("x", "y")), x.shape[1], y.shape[1])
    assert needed
    assert len(factorisations) == needed
    assert torch.equal(first, plain)
    assert torch.equal(second, plain)


def test_one_factorisation_serves_every_strength(factorisations):
    x, y = related(40, 14, 10)
    store = FactorStore()
    for strength in (0.1, 1.0, 10.0):
        kept = Ridge(strength=strength)(x, y, store=store, key=("x", "y")).matrix(10)[0]
        assert torch.equal(kept, Ridge(strength=strength)(x, y).matrix(10)[0])
    assert len(factorisations) == 1 + 3


def test_one_factorisation_serves_every_partner_each_with_its_own_strength(factorisations):
    x, y = related(40, 14, 10, noise=0.01)
    noise = normal(40, 10, seed=77)
    store = FactorStore()
    kept = [Ridge()(x, target, store=store, key=("x", name)) for name, target in (("y", y), ("noise", noise))]
    assert factorisations.count("Factor") <= 2  # float32, and float64 where the strength is weak
    assert [one.facts for one in kept] == [Ridge()(x, target).facts for target in (y, noise)]
    assert kept[0].facts["strength"] < kept[1].facts["strength"]


def test_a_store_keeps_layers_apart():
    store = FactorStore()
    (x1, y1), (x2, y2) = related(30, 9, 8, seed=1), related(30, 9, 8, seed=50)
    Ridge()(x1, y1, store=store, key=(1, 1))
    kept = Ridge()(x2, y2, store=store, key=(2, 2)).matrix(8)[0]
    assert torch.equal(kept, Ridge()(x2, y2).matrix(8)[0])


def test_a_store_without_a_key_keeps_nothing():
    store = FactorStore()
    (x1, y1), (x2, y2) = related(30, 9, 8, seed=1), related(30, 9, 8, seed=50)
    for fit in (Ridge(), Pinv()):
        fit(x1, y1, store=store)
        assert torch.equal(fit(x2, y2, store=store).matrix(8)[0], fit(x2, y2).matrix(8)[0])
