"""Least squares, reduced rank and Procrustes: each against its closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from commandv.transfer.convert.fitters import Affine, Pinv, Procrustes, ReducedRank, Ridge
from rows import SHAPES, normal, rank_of_condition, related, relative


def solved(solver, n: int, d: int) -> Tensor:
    """The map that a solver applies, from its right side."""
    return torch.from_numpy(solver.right(np.eye(n))).double()


# -- least squares ----------------------------------------------------------------------------------------------------

DIMENSIONS = st.integers(2, 14)
SEEDS = st.integers(0, 10_000)


@settings(max_examples=40, deadline=None)
@given(n=DIMENSIONS, d=DIMENSIONS, rank=DIMENSIONS, seed=SEEDS, exact=st.booleans())
def test_moore_penrose_conditions(n, d, rank, seed, exact):
    rank = min(n, d, rank)
    x = rank_of_condition(n, rank, 50.0, seed) @ torch.linalg.qr(normal(d, rank, seed=seed + 7)).Q.T
    p = Pinv(exact=exact)(x, torch.eye(n, dtype=torch.float64)).matrix()[0]  # X⁺ I
    size = float(p.norm())
    torch.testing.assert_close(x @ p @ x, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(p @ x @ p, p, rtol=0, atol=1e-8 * size)
    torch.testing.assert_close(x @ p, (x @ p).T, rtol=0, atol=1e-8 * size)
    torch.testing.assert_close(p @ x, (p @ x).T, rtol=0, atol=1e-8 * size)


@settings(max_examples=30, deadline=None)
@given(n=DIMENSIONS, d=DIMENSIONS, seed=SEEDS, exact=st.booleans())
def test_pinv_solves_the_normal_equations_with_the_smallest_norm(n, d, seed, exact):
    x, y = rank_of_condition(n, d, 50.0, seed), normal(n, 3, seed=seed + 3)
    weight = Pinv(exact=exact)(x, y).matrix()[0]
    torch.testing.assert_close(x.T @ (x @ weight - y), torch.zeros(d, 3).double(), rtol=0, atol=1e-8)
    # Any other solution adds something that X does not see; the smallest one has no such part.
    unseen = torch.eye(d, dtype=torch.float64) - torch.linalg.pinv(x) @ x
    torch.testing.assert_close(unseen @ weight, torch.zeros(d, 3).double(), rtol=0, atol=1e-8 * float(weight.norm()))


@settings(max_examples=20, deadline=None)
@given(n=DIMENSIONS, d=DIMENSIONS, seed=SEEDS, strength=st.sampled_from([None, 0.01, 3.0]))
def test_solvers_apply_one_matrix_from_both_sides(n, d, seed, strength):
    x, y = related(max(n, 4), d, 3, seed=seed)
    solver = Ridge(strength=strength).solve(x, y, groups=None, kept=None)[0]
    from_left = torch.from_numpy(solver.left(np.eye(d))).double()
    assert relative(from_left, solved(solver, len(x), d)) < 1e-3


@pytest.mark.parametrize("shape", [(40, 90, 70), (90, 90, 70), (200, 60, 70)], ids=list(SHAPES))
def test_pinv_is_the_published_computation(shape):
    x, y = related(*shape)
    published = torch.linalg.pinv(x) @ y
    condition = float(torch.linalg.cond(x.double()))
    assert relative(Pinv()(x, y).matrix()[0], published) < 20 * condition * torch.finfo(torch.float32).eps


def test_pinv_cuts_what_the_published_float32_computation_cuts():
    n, d = 50, 80
    x = rank_of_condition(n, d, 1e8).float()  # float32 pinv cuts at 80 * 1.2e-7 = 9.5e-6
    y = normal(n, 6).float()
    cut = torch.linalg.pinv(x.double(), rtol=max(n, d) * torch.finfo(torch.float32).eps) @ y.double()
    assert relative(Pinv()(x, y).matrix()[0], cut) < 1e-3
    assert relative(Pinv(exact=True)(x, y).matrix()[0], cut) > 0.1


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
    weight, bias = Affine()(x, y).matrix()
    torch.testing.assert_close(weight, expected[:-1], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(bias, expected[-1], rtol=1e-8, atol=1e-9)


def test_nothing_is_the_pseudo_inverse_of_nothing():
    for exact in (False, True):
        assert not Pinv(exact=exact)(torch.zeros(5, 3), normal(5, 2)).matrix()[0].any()


# -- reduced rank, Procrustes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_reduced_rank_has_the_rank_and_is_ridge_at_full_rank(shape):
    x, y = related(*SHAPES[shape])
    ridge = Ridge(strength=0.1)
    whole = ridge(x, y).matrix()[0]
    narrow = ReducedRank(4, ridge)(x, y)
    assert narrow.facts["rank"] == 4
    singular = torch.linalg.svdvals(narrow.matrix()[0])
    assert singular[3] > 1e-3 * singular[0]
    assert singular[4] < 1e-5 * singular[0]
    assert relative(ReducedRank(500, ridge)(x, y).matrix()[0], whole) < 2e-3


def test_reduced_rank_is_capped_at_what_the_rows_allow():
    """Centred rows span one dimension less than they are."""
    for n, d_y, rank, expected in ((6, 10, 8, 5), (40, 3, 8, 3), (40, 10, 1, 1)):
        x, y = related(n, 12, d_y)
        assert ReducedRank(rank, Ridge(strength=0.1))(x, y).facts["rank"] == expected
    x, y = related(140, 135, 132)
    assert ReducedRank(ridge=Ridge(strength=0.1))(x, y).facts["rank"] == 128


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
    weight = Procrustes()(x, y).matrix()[0]
    q = weight * x.std(0, correction=0)[:, None] / y.std(0, correction=0)
    gram = q.T @ q
    factor = float(gram.diagonal().mean())
    torch.testing.assert_close(gram, factor * torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-4 * factor)
    # The scale is the best one.
    t = (y - y.mean(0)) / y.std(0, correction=0)
    z = (x - x.mean(0)) / x.std(0, correction=0) @ q
    assert float((z * t).sum() / z.square().sum()) == pytest.approx(1.0, abs=1e-4)
