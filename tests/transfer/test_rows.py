"""Centred, scaled rows and their products, block by block, against NumPy on the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commandv.errors import InputError
from commandv.transfer.convert import blas, rows as module
from commandv.transfer.convert.rows import Rows
from rows import normal

MIB = 1 << 20
# Wider, higher and squarer than a block of 4 MiB, and not a multiple of one.
SHAPES = [(150, 9000), (9000, 150), (900, 900)]
WAYS = [(False, False), (True, False), (False, True), (True, True)]


def drifting(n: int, d: int) -> torch.Tensor:
    """Rows whose mean changes from block to block; one column is zero, one constant, one varies by 2."""
    x = normal(n, d) + torch.arange(n)[:, None] / n * torch.linspace(-3, 3, d) + 1
    x[:, 0], x[:, 1], x[:, 2] = 0.0, -7.5, torch.tensor([2.0, -2.0]).repeat(n // 2)
    return x


def plainly(x: torch.Tensor, centre: bool, standardise: bool) -> np.ndarray:
    values = x.numpy()
    deviation = values.std(0)
    scale = np.where(deviation > 1e-12, deviation, 1.0)
    return (values - (values.mean(0) if centre else 0.0)) / (scale if standardise else 1.0)


@pytest.mark.parametrize(("centre", "standardise"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_over_blocks_are_those_of_the_whole(shape, centre, standardise):
    x = drifting(*shape)
    rows, z = Rows.of(x, centre=centre, standardise=standardise), plainly(x, centre, standardise)
    close = {"rtol": 1e-9, "atol": 1e-8}
    np.testing.assert_allclose(rows.dense(np.float64), z, **close)
    np.testing.assert_allclose(rows.at(np.array([5, 3])).dense(np.float64), z[[5, 3]], **close)
    by_d, by_n = normal(shape[1], 3, seed=2).numpy(), normal(shape[0], 3, seed=3).numpy()
    np.testing.assert_allclose(rows.times(by_d), z @ by_d, **close)
    np.testing.assert_allclose(rows.transposed_times(by_n), z.T @ by_n, **close)
    gram = z @ z.T if shape[0] <= shape[1] else z.T @ z
    np.testing.assert_allclose(np.triu(rows.gram(np.float64)), np.triu(gram), **close)
    right = normal(len(gram), 2, seed=4).numpy()
    np.testing.assert_allclose(rows.gram_times(right), gram @ right, rtol=1e-9, atol=1e-6)


def test_single_precision_is_as_near_as_it_can_be():
    x = drifting(150, 90)
    rows, z = Rows.of(x, centre=True, standardise=True), plainly(x, True, True)
    got = rows.gram(np.float32)
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.triu(got), np.triu(z.T @ z), rtol=1e-3, atol=1e-2)


def test_unscaled_rows_keep_the_centre_alone():
    x = drifting(40, 9)
    rows = Rows.of(x, centre=True, standardise=True).unscaled()
    np.testing.assert_allclose(rows.dense(np.float64), plainly(x, True, False), atol=1e-12)


def test_columns_that_all_have_the_deviation_two_are_halved():
    x = torch.tensor([[2.0, -2.0], [-2.0, 2.0]], dtype=torch.float64)
    np.testing.assert_array_equal(Rows.of(x, centre=True, standardise=True).dense(np.float64), x.numpy() / 2)


def test_what_varies_by_no_more_than_rounding_is_constant():
    """Up to 1e-12 of its mean; a zero column has no mean to compare with."""
    wave = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)
    x = torch.stack([1e6 + 1e-8 * wave, 1e-6 + 1.5e-18 * wave, 1 + 1.5e-12 * wave, 0 * wave], 1)
    scale = Rows.of(x, centre=True, standardise=True).scale
    assert scale[[0, 3]].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(scale[[1, 2]], [1.5e-18, 1.5e-12], rtol=1e-2)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 3, 3), (0, 4)])
def test_what_is_no_table_of_two_rows_or_more_is_refused(shape):
    with pytest.raises(InputError, match="expected \\[rows, d_model\\] with 2 rows or more"):
        Rows.of(torch.zeros(shape), centre=True, standardise=False)
    assert Rows.of(torch.zeros(2, 1), centre=True, standardise=True).n == 2


def test_the_smaller_gram_matrix_is_made_and_of_a_square_the_rows_own():
    assert [Rows.of(torch.zeros(n, 5), centre=False, standardise=False).dual for n in (4, 5, 6)] == [True, True, False]


def test_memory_is_bounded(monkeypatch):
    """Blocks are of 4 MiB, or 64 rows or columns where these take more; of a large Gram matrix a fourth of it."""
    sizes: list[int] = []
    original = module.own_pages

    def pages(shape, dtype):
        made = original(shape, dtype)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(module, "own_pages", pages)
    for shape in SHAPES:
        sizes.clear()
        rows = Rows.of(drifting(*shape), centre=True, standardise=False)
        rows.times(np.ones((shape[1], 1)))
        rows.transposed_times(np.ones((shape[0], 1)))
        rows.gram_times(np.ones((min(shape), 1)))
        assert len(sizes) == 4
        assert max(sizes) <= max(4 * MIB, 64 * 8 * max(shape))
        assert min(sizes) > 3.9 * MIB
    widths: list[int] = []
    monkeypatch.setattr(blas, "add_gram", lambda total, block, dual: widths.append(block.shape[1 if dual else 0]))
    Rows.of(normal(1500, 1500), centre=False, standardise=False).gram(np.float64)
    Rows.of(normal(1501, 1500), centre=False, standardise=False).gram(np.float64)
    assert widths == [375] * 4 + [375] * 4 + [1]
    sizes.clear()
    Rows.of(torch.zeros(100, 20_000), centre=False, standardise=False).times(np.ones((20_000, 1)))
    assert sizes == [64 * 8 * 20_000]
