"""Factorisations of rows whose singular values are plain to see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commandv.transfer.convert.factor import Cholesky, Factor, Spectral
from commandv.transfer.convert.fitters import Pinv
from commandv.transfer.convert.rows import Rows
from rows import normal


def diagonal(*singular: float) -> torch.Tensor:
    return torch.diag(torch.tensor(singular, dtype=torch.float64))


def plain(x: torch.Tensor) -> Rows:
    return Rows.of(x, centre=False, standardise=False)


def test_an_exact_solve_of_dependent_rows_cuts_at_1e_7():
    weight, _ = Pinv(exact=True)(diagonal(3.0, 4.5e-7, 1.8e-7, 0.0), torch.eye(4, dtype=torch.float64)).matrix()
    torch.testing.assert_close(weight.diagonal(), torch.tensor([1 / 3, 1 / 4.5e-7, 0, 0]).double())


def test_a_cut_is_relative_to_the_largest_singular_value():
    for x in (diagonal(100, 2, 0.5), torch.cat([diagonal(100, 2, 0.5), torch.zeros(2, 3)])):
        gains = Spectral.of(plain(x), 0.01).gains
        np.testing.assert_allclose(sorted(gains), [0, 1e-4, 0.25])


def test_pivots_of_less_than_a_millionth_are_rounding():
    for size in (1.0, 100.0):
        assert Cholesky.of(plain(size * diagonal(1, 1.5e-6, 1))) is not None
        assert Cholesky.of(plain(size * diagonal(1, 0.9e-6, 1))) is None
    assert Cholesky.of(plain(torch.ones(3, 3))) is None


def test_the_weakest_strength_is_1e_12_of_the_greatest_eigenvalue():
    """1 / (s + lambda / s) for a singular value s."""
    for size in (1.0, 8.0):
        solved = Factor.of(plain(size * diagonal(1.0, 1e-6)), np.float64).ridge(1e-300).right(np.eye(2))
        np.testing.assert_allclose(np.diag(solved), np.array([1 / (1 + 1e-12), 0.5e6]) / size, rtol=1e-9)


def test_strengths_are_relative_to_the_mean_eigenvalue():
    factor = Factor.of(plain(diagonal(2.0, 4.0)), np.float64)  # eigenvalues 4 and 16
    assert (factor.unit, factor.ridge(0.5).penalty) == pytest.approx((10, 5))


def test_the_bound_is_gershgorin_s():
    """|T| summed along its rows: 2 1 0 / 1 2 1 / 0 1 2 gives 3, 4, 3, for the greatest eigenvalue 2 + sqrt 2."""
    matrix = np.array([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]])
    x = torch.from_numpy(np.linalg.cholesky(matrix))
    assert Factor.of(plain(x), np.float64).bound == pytest.approx(4)
    for singular in ((3.0, 2.0), (2.0, 3.0)):
        assert Factor.of(plain(diagonal(*singular)), np.float64).bound == pytest.approx(9)
    alone = Factor(plain(x), matrix, np.zeros(2), np.array([1.0, 3.0, 1.0, 5.0]), np.array([-2.0, 1.0, 4.0]))
    assert alone.bound == 9  # 5 + 4


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (7, 7)])
@pytest.mark.parametrize("kind", ["ridge", "cholesky", "spectral"])
def test_both_sides_of_every_solver_are_the_pseudo_inverse(kind, shape):
    x = normal(*shape)
    n, d = shape
    rows = plain(x)
    if kind == "ridge":
        factor = Factor.of(rows, np.float64)
        solver, penalty = factor.ridge(0.2), 0.2 * float(x.square().sum()) / min(shape)
        expected = torch.linalg.solve(x.T @ x + penalty * torch.eye(d).double(), x.T).numpy()
    else:
        solver = Cholesky.of(rows) if kind == "cholesky" else Spectral.of(rows, 1e-9)
        expected = torch.linalg.pinv(x).numpy()
    targets, weights = normal(n, 3, seed=1).numpy(), normal(2, d, seed=2).numpy()
    np.testing.assert_allclose(solver.right(targets), expected @ targets, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(solver.left(weights), weights @ expected, rtol=1e-7, atol=1e-9)
