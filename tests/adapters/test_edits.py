"""What every kind of edit answers alike, and that files give it back; a new kind is tested on arrival."""

from __future__ import annotations

import pytest
import torch

import commandv as cv
from commandv.adapters.kinds import steering_vector
from commandv.adapters.store import EDITS
from commandv.models.identity import ModelRef
from commandv.transfer.convert.table import FITTERS
from commandv.transfer.match import MATCHERS
from made_up import D_RECIPIENT, adapter_of, both, intervention, same_tensors
from rows import normal


def network(d_x: int, d_y: int, seed: int) -> cv.Network:
    g = torch.Generator().manual_seed(seed)
    shapes = {"mean": (d_x,), "encode": (d_x, 5), "shift": (5,), "decode": (5, d_y), "bias": (d_y,)}
    return cv.Network.from_tensors({name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}, "relu")


EXAMPLES = {
    "affine": lambda: intervention(3, activation="tanh", d=D_RECIPIENT),
    "carried": lambda: cv.Carried(intervention(3), network(D_RECIPIENT, 10, 1), network(10, D_RECIPIENT, 2), 0.7),
}


def test_every_kind_has_an_example():
    assert set(EXAMPLES) == set(EDITS)


@pytest.mark.parametrize("kind", EDITS)
def test_edits_answer_alike(kind):
    one, h = EXAMPLES[kind](), normal(6, D_RECIPIENT, seed=9).float()
    delta = one.delta(h)
    assert type(one) is EDITS[kind]
    assert delta.shape == h.shape
    torch.testing.assert_close(one.scaled(-3.0).delta(h), -3 * delta, rtol=1e-4, atol=1e-5)
    assert one.scaled(-3.0).write_norm == pytest.approx(3 * one.write_norm)
    moved = one.at(cv.Positions.parse("f1+l2"))
    assert str(moved.positions) == moved.facts()["positions"] == "f1+l2"
    assert torch.equal(moved.delta(h), delta)
    turn = torch.linalg.qr(normal(D_RECIPIENT, D_RECIPIENT, seed=2).float()).Q
    torch.testing.assert_close(one.turned(lambda rows: rows @ turn).delta(h), delta @ turn, rtol=1e-3, atol=1e-4)
    basis = torch.linalg.qr(one.writes.T.double()).Q
    torch.testing.assert_close(delta.double() @ basis @ basis.T, delta.double(), rtol=1e-3, atol=1e-4)
    assert torch.equal(one.to(torch.device("cpu")).delta(h), delta)
    assert one.n_parameters == sum(part.numel() for part in one.tensors().values())


@pytest.mark.parametrize("kind", EDITS)
def test_edits_of_one_group_join_into_their_sum(kind):
    one, two, h = EXAMPLES[kind](), EXAMPLES[kind]().scaled(0.5), normal(6, D_RECIPIENT, seed=9).float()
    if one.group == two.group:
        torch.testing.assert_close(one.joined([two]).delta(h), one.delta(h) + two.delta(h), rtol=1e-4, atol=1e-4)
    assert one.group != one.at(cv.Positions.parse("all")).group
    torch.testing.assert_close(one.joined([]).delta(h), one.delta(h))


@pytest.mark.parametrize("kind", EDITS)
def test_files_give_edits_back(kind, tmp_path):
    model = ModelRef("m", "r", D_RECIPIENT, 4)
    adapter = cv.Adapter({2: (EXAMPLES[kind](),), 3: (EXAMPLES[kind]().at(cv.Positions.parse("all")),)}, model)
    again = cv.load_adapter(cv.save(adapter, tmp_path / kind))
    assert same_tensors(again, adapter)
    h = normal(6, D_RECIPIENT, seed=9).float()
    for layer in (2, 3):
        one, two = again.interventions[layer][0], adapter.interventions[layer][0]
        assert (type(one), one.facts()) == (type(two), two.facts())
        assert torch.equal(one.delta(h), two.delta(h))


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("fitter", FITTERS)
def test_what_any_fitter_and_matcher_pastes_is_saved_and_read(fitter, matcher, tmp_path):
    donor, recipient = both()
    link = cv.link(donor, recipient, fit=FITTERS[fitter](), write_rows="end")
    where = {"match": MATCHERS[matcher], "layers": "all_layers"}
    pasted = link.paste(adapter_of(0, 4), **where)
    assert set(pasted.layers) <= set(range(recipient.n_layers))
    assert same_tensors(cv.load_adapter(cv.save(pasted, tmp_path / "pasted")), pasted)
    assert pasted.provenance["link"]["fit"]["name"] == fitter
    assert all(one.n > 1 and one.read_r2 <= 1 for one in link.fidelity(adapter_of(0, 4), **where))
    vector = cv.Adapter({4: steering_vector(torch.ones(10))}, donor.model)
    assert link.paste(vector, **where).layers
