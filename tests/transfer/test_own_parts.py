"""Fitters, converters and matchers of a user's own, defined outside the package, do all that the package's do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

import commandv as cv
from commandv.errors import InputError
from commandv.mapping import fit_mapper
from made_up import D_DONOR, adapter_of, both, same_tensors
from rows import normal


def least_squares(x, y):
    """A plain function of two tensors, as short as a fitter can be."""
    return cv.Dense(torch.linalg.lstsq(x.double(), y.double()).solution, torch.zeros(y.shape[1], dtype=torch.float64))


class Kernel(cv.AffineMap):
    """A converter that keeps its rows and forms no matrix: y = x Xᵀ (X Xᵀ + s I)⁻¹ Y."""

    def __init__(self, x, y, strength):
        self.x, self.d_y = x.double(), y.shape[1]
        gram = self.x @ self.x.T
        self.weights = torch.linalg.solve(gram + strength * gram.diagonal().mean() * torch.eye(len(x)), y.double())
        self.facts = {"rows": len(x)}

    d_y = 0

    def pull(self, read):
        return (read.double() @ self.weights.T) @ self.x, torch.zeros(len(read), dtype=torch.float64)

    def push(self, write):
        return (write.double() @ self.x.T) @ self.weights


@dataclass(frozen=True)
class KernelFit:
    strength: float = 1e-3
    name = "kernel"

    def __call__(self, x, y, groups):
        assert len(groups) == len(x)
        return Kernel(x, y, self.strength)


class Bent:
    """A fitter that cannot be hashed or compared, and a converter that is not affine."""

    __hash__ = None

    def __call__(self, x, y, **more):
        assert set(more) == {"groups", "kept"}
        straight = least_squares(x, y).weight.float()
        hidden = torch.eye(x.shape[1])
        parts = {"mean": x.float().mean(0), "encode": hidden, "shift": torch.zeros(x.shape[1])}
        parts |= {"decode": 0.1 * straight, "bias": y.float().mean(0), "linear": 0.9 * straight}
        return cv.Network.from_tensors(parts, "relu")


OWN = {"least_squares": least_squares, "kernel": KernelFit(), "Bent": Bent()}


def upside_down(donor, recipient, layers):
    """A matcher."""
    return [cv.LayerPair(layer, recipient.n_layers - 1 - layer) for layer in layers]


@pytest.mark.parametrize("name", OWN)
def test_a_fitter_and_a_matcher_of_one_s_own_paste_measure_and_save(name, tmp_path):
    donor, recipient = both()
    adapter, where = adapter_of(1, 2), {"match": upside_down, "layers": "all_layers"}
    link = cv.link(donor, recipient, fit=OWN[name])
    pasted = link.paste(adapter, **where)
    assert pasted.layers == [6, 7]
    told = link.fidelity(adapter, **where)
    assert [(one.donor, one.recipient) for one in told] == [(1, 7), (2, 6)]
    again = cv.link(donor, recipient, fit=OWN[name]).fidelity(adapter, **where)
    assert [tuple(one) for one in again] == [pytest.approx(tuple(one), rel=1e-5) for one in told]
    loaded = cv.load_adapter(cv.save(pasted, tmp_path / "own"))
    assert same_tensors(loaded, pasted)
    assert loaded.provenance["link"]["fit"]["name"] == name
    shuffled = dataclasses.replace(link, shuffle=0).paste(adapter, **where)
    assert not same_tensors(shuffled, pasted)
    states = donor.layer(1)[:5]
    mapped = fit_mapper(link, (1, 7))(states, torch.zeros(5, dtype=torch.bool))
    torch.testing.assert_close(mapped, link.back(cv.LayerPair(1, 7))(states.double()).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["least_squares", "kernel"])
def test_affine_converters_of_one_s_own_fold_and_carry_directions(name):
    donor, recipient = both()
    link = cv.link(donor, recipient, fit=OWN[name])
    v = normal(D_DONOR, seed=4).float()
    carried = cv.carry_directions({4: v}, link, layers=[6])[6]
    torch.testing.assert_close(carried, link.back(cv.LayerPair(4, 6)).push(v[None])[0].float(), rtol=1e-4, atol=1e-5)
    (one,) = link.paste(adapter_of(4)).interventions[6]
    h = recipient.layer(6).double()
    inner = adapter_of(4).interventions[4][0]
    seen = link.into(cv.LayerPair(4, 6))(h)
    coefficients = seen @ inner.read.double().T + inner.bias.double()
    expected = link.back(cv.LayerPair(4, 6)).push(inner.write).T @ coefficients.T
    torch.testing.assert_close(one.delta(h.float()).double(), expected.T, rtol=1e-3, atol=1e-3)


def test_options_of_a_fitter_of_one_s_own_are_recorded_and_tell_its_fits_apart():
    donor, recipient = both()
    link = cv.link(donor, recipient, fit=KernelFit())
    pasted = link.paste(adapter_of(4))
    assert pasted.provenance["link"]["fit"] == {"name": "kernel", "strength": 1e-3}
    assert pasted.provenance["layers"][0]["read"]["rows"] < len(donor)
    other = dataclasses.replace(link, fit=KernelFit(strength=1.0)).paste(adapter_of(4))
    assert not same_tensors(other, pasted)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"fit": lambda x, y: None}, r"the fitter <lambda> returned a NoneType, expected a converter"),
        ({"fit": lambda x, y: x}, r"returned a Tensor, expected a converter"),
        ({"fit": "ridge"}, r"fit is a str 'ridge', expected"),
        (
            {"match": lambda donor, recipient, layers: None},
            r"the matcher made None of the layers .*: expected a list of",
        ),
        ({"match": lambda donor, recipient, layers: [(0, 0)]}, r"expected a list of LayerPair"),
        ({"match": lambda donor, recipient, layers: [cv.LayerPair(layers[0], 999)]}, r"with recipient layers 0 \.\."),
        ({"match": lambda donor, recipient, layers: [cv.LayerPair(99, 0)]}, r"of the layers .*of these"),
    ],
)
def test_what_an_own_part_returns_is_looked_at(own, message):
    donor, recipient = both()
    with pytest.raises(InputError, match=message):
        cv.paste(adapter_of(0, 1), donor, recipient, **own)
