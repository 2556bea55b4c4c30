"""A link fits once, shares what it made, and frees it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

import commandv as cv
import factorised
from commandv.mapping import fit_mapper
from commandv.transfer.convert.fitters import Pinv, ReducedRank, Ridge
from commandv.transfer.convert.table import FITTERS
from commandv.transfer.match import LayerPair, explicit
from commandv.transfer.paste import paste
from made_up import (
    D_DONOR,
    RECIPIENT,
    adapter_of,
    both,
    same_tensors,
)

factorisations = factorised.factorisations


@pytest.mark.parametrize("fit", [Ridge(strength=1.0), Pinv(exact=True)], ids=["ridge", "pinv-exact"])
def test_a_link_fits_once_whatever_goes_through_it(fit, factorisations):
    donor, recipient = both()
    link = cv.link(donor, recipient, fit=fit)
    assert not factorisations
    first = link.paste(adapter_of(4, 5))
    assert len(factorisations) == 4  # two layers, each way
    other = adapter_of(4, 5).scaled(3.0)
    second = link.paste(other)
    assert link.fidelity(other)
    cv.carry_directions({4: torch.ones(D_DONOR)}, link, layers=[6])
    fit_mapper(link, (5, 7))
    assert len(factorisations) == 4
    assert same_tensors(first, paste(adapter_of(4, 5), donor, recipient, fit=fit))
    assert same_tensors(second, paste(other, donor, recipient, fit=fit))


def test_donor_layers_that_meet_share_the_recipient_layer_s_factorisation(factorisations):
    link = cv.link(*both(), fit=Ridge(strength=1.0))
    link.paste(adapter_of(2, 4), match=explicit({2: 7, 4: 7}))
    assert len(factorisations) == 3


def test_a_link_frees_what_it_made():
    link = cv.link(*both())
    link.paste(adapter_of(4))
    solver = weakref.ref(link.into(LayerPair(4, 6)).solver)
    assert solver() is not None
    del link
    gc.collect()
    assert solver() is None


def test_variants_of_a_link_share_and_do_not_mix_up():
    """Controls, settings and other profiles of the same names, all over what one link keeps."""
    donor, recipient = both()
    alien = replace(recipient, activations={k: rows.flip(0) for k, rows in recipient.activations.items()})
    adapter, other = adapter_of(4), adapter_of(6, ref=RECIPIENT)
    back = {"match": explicit({6: 4}), "layers": "all_layers"}
    pastes = [
        (adapter, {}, {}),
        (adapter, {"shuffle": 0}, {}),
        (adapter, {"shuffle": 1}, {}),
        (adapter, {"holdout": 0.3}, {}),
        (adapter, {"fit": Ridge(select="gcv")}, {}),
        (adapter, {"fit": Ridge(standardise=False)}, {}),
        (adapter, {"fit": ReducedRank(2)}, {}),
        (adapter, {"fit": Pinv()}, {}),
        (adapter, {"fit": Pinv(exact=True)}, {}),
        (adapter, {"fit": FITTERS["affine"]()}, {}),
        (adapter, {"recipient": alien}, {}),
        (other, {"donor": recipient, "recipient": donor}, back),
        (adapter, {"recipient": donor}, {"layers": [4]}),
    ]
    link = cv.link(donor, recipient)
    for one, changes, where in pastes * 2:
        shared = replace(link, **changes)
        own = {"donor": donor, "recipient": recipient} | changes
        pasted = paste(one, own.pop("donor"), own.pop("recipient"), **own, **where)
        assert same_tensors(shared.paste(one, **where), pasted), changes


def test_profiles_without_text_rows_are_told_of_once(caplog):
    donor, recipient = both()
    link = cv.link(donor, recipient)
    (told,) = caplog.messages
    assert "profile both models with text" in told
    link.paste(adapter_of(4))
    replace(link, shuffle=1).paste(adapter_of(4))
    cv.link(donor, recipient, write_rows="end")
    assert len(caplog.messages) == 1
    assert link.paste(adapter_of(4)).provenance["link"]["rows"] == {"read": "end", "write": "end"}
