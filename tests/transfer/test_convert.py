"""The converters: one contract over every fitter, and what is kept for the next adapter."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

import factorised
from commandv.errors import InputError
from commandv.transfer.convert.fitters import Affine, Pinv, ReducedRank, Ridge, fitted, fitter_settings
from commandv.transfer.convert.fourier import FourierRidge
from commandv.transfer.convert.kept import Kept
from commandv.transfer.convert.linear import AffineMap, Dense
from commandv.transfer.convert.table import FITTERS
from commandv.transfer.fidelity import r2
from rows import SHAPES, normal, related, relative

factorisations = factorised.factorisations

FIT = [pytest.param(cls(), id=name) for name, cls in FITTERS.items()] + [
    pytest.param(Pinv(exact=True), id="pinv-exact"),
    pytest.param(Ridge(select="gcv", standardise=False), id="ridge-gcv"),
    pytest.param(ReducedRank(rank=3), id="reduced-rank-3"),
]
IN_CLOSED_FORM = [fit for fit in FIT if fit.id != "autoencoder"]  # which sees its rows one after the other


def action(converter, d_x: int, d_y: int) -> Tensor:
    """What a converter does, to compare it by: its matrix, or its values on fixed states if it is not affine."""
    return converter.matrix()[0] if isinstance(converter, AffineMap) else converter(normal(20, d_x, seed=12))


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", FIT)
def test_pull_push_call_and_matrix_are_one_affine_map(fit, shape):
    x, y = related(*SHAPES[shape])
    converter = fit(x, y)
    if not isinstance(converter, AffineMap):
        assert converter.pull(normal(2, y.shape[1])) is converter.push(normal(2, x.shape[1])) is None
        states = normal(2, 5, x.shape[1])
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            out = converter(states.to(dtype))
            assert (out.shape, out.dtype) == ((2, 5, y.shape[1]), dtype)
        torch.testing.assert_close(converter(states)[1, 3], converter(states[1, 3]), rtol=1e-4, atol=1e-4)
        return
    weight, bias = converter.matrix()
    assert weight.shape == (x.shape[1], y.shape[1])
    size = float(weight.norm())
    read, write, states = normal(3, y.shape[1], seed=9), normal(2, x.shape[1], seed=10), normal(2, 5, x.shape[1])
    pulled, shift = converter.pull(read)
    torch.testing.assert_close(pulled, read @ weight.T, rtol=1e-3, atol=1e-4 * size)
    torch.testing.assert_close(shift, read @ bias, rtol=1e-3, atol=1e-3 * size)
    torch.testing.assert_close(converter.push(write), write @ weight, rtol=1e-3, atol=1e-4 * size)
    torch.testing.assert_close(converter(states), states @ weight + bias, rtol=1e-3, atol=1e-3 * size)
    assert converter(states.float()).dtype == torch.float32
    network = converter.network()  # for what is carried beside a converter that is not affine
    torch.testing.assert_close(network(states), states @ weight + bias, rtol=1e-3, atol=1e-3 * size)
    assert (network.encode.numel(), network.decode.numel(), network.facts) == (0, 0, converter.facts)


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
    assert relative(fit(x, y).matrix()[0], expected) < 1e-6


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


# -- fitters of one's own ---------------------------------------------------------------------------------------------


def test_a_function_is_given_what_it_names_and_no_more():
    x, y = related(10, 6, 5)
    groups, kept = np.arange(10), Kept()

    seen, made = {}, Dense(torch.zeros(6, 5), torch.zeros(5))

    def plain(x, y):
        return made

    def grouped(x, y, groups):
        seen["grouped"] = (groups,)
        return made

    def anything(x, y, **more):
        seen["anything"] = (more["groups"], more["kept"])
        return made

    for fit in (plain, grouped, anything):
        assert fitted(fit, x, y, groups, kept) is made
    assert seen["grouped"][0] is groups
    assert [a is b for a, b in zip(seen["anything"], (groups, kept), strict=True)] == [True, True]


@dataclass(frozen=True)
class Shrunk:
    """A fitter without a name, with a setting and something that decides nothing."""

    by: float = 0.5
    told: list[str] = field(default_factory=list, compare=False)

    def __call__(self, x, y):
        return Ridge(strength=self.by)(x, y)


def test_settings_are_a_fitter_s_name_and_what_decides_its_result():
    assert fitter_settings(Ridge(strength=0.5)) == {
        "name": "ridge", "strength": 0.5, "select": "loo", "standardise": True,
    }  # fmt: skip
    assert fitter_settings(Shrunk(by=2.0)) == {"name": "Shrunk", "by": 2.0}
    assert fitter_settings(Shrunk) == {"name": "Shrunk"}  # the class is no configuration
    assert fitter_settings(related) == {"name": "related"}


# -- what is kept for the next adapter --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", [fit for fit in IN_CLOSED_FORM if fit.id not in ("procrustes", "fourier")])
def test_what_is_kept_spares_factorisations_and_changes_nothing(fit, shape, factorisations):
    x, y = related(*SHAPES[shape])
    plain = action(fit(x, y), x.shape[1], y.shape[1])
    kept = Kept()
    first = action(fit(x, y, kept=kept), x.shape[1], y.shape[1])
    needed = len(factorisations)
    second = action(fit(x, y, kept=kept), x.shape[1], y.shape[1])
    assert needed
    assert len(factorisations) == needed
    assert torch.equal(first, plain)
    assert torch.equal(second, plain)


def test_one_factorisation_serves_every_strength(factorisations):
    x, y = related(40, 14, 10)
    kept = Kept()
    for strength in (0.1, 1.0, 10.0):
        weight = Ridge(strength=strength)(x, y, kept=kept).matrix()[0]
        assert torch.equal(weight, Ridge(strength=strength)(x, y).matrix()[0])
    assert len(factorisations) == 1 + 3


def test_one_factorisation_serves_every_partner_each_with_its_own_strength(factorisations):
    x, y = related(40, 14, 10, noise=0.01)
    noise = normal(40, 10, seed=77)
    kept = Kept()
    found = [Ridge()(x, target, kept=kept) for target in (y, noise)]
    assert factorisations.count("Factor") <= 2  # float32, and float64 where the strength is weak
    assert [one.facts for one in found] == [Ridge()(x, target).facts for target in (y, noise)]
    assert found[0].facts["strength"] < found[1].facts["strength"]


def test_what_is_kept_is_made_once_by_many_threads_and_an_error_keeps_nothing():
    kept, made = Kept(), []

    def slowly():
        made.append(1)
        time.sleep(0.05)
        return object()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: kept.get("one", slowly), range(8)))
    assert len(made) == len(set(map(id, found))) == len(kept) == 1
    with pytest.raises(ZeroDivisionError):
        kept.get("two", lambda: 1 / 0)
    assert kept.get("two", lambda: 2) == 2
