"""Pasting on made-up profiles whose relation is known, so that every result can be told in advance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter, Intervention
from commandv.adapters.carried import Carried
from commandv.adapters.kinds import steering_vector
from commandv.profiles.profile import END
from commandv.transfer.convert.fitters import Pinv, Ridge
from commandv.transfer.match import explicit, nearest, proportional
from commandv.transfer.paste import paste, published, random_like
from made_up import (
    D_DONOR,
    D_RECIPIENT,
    DONOR,
    FIT,
    RANK,
    RECIPIENT,
    N,
    adapter_of,
    both,
    end_keys,
    intervention,
    profile_of,
    same_tensors,
)
from rows import normal, relative


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def delta(adapter: Adapter, layer: int, h: Tensor) -> Tensor:
    many = adapter.interventions[layer]
    return sum((one if isinstance(one, Carried) else replace(one, **doubled(one))).delta(h.double()) for one in many)


def doubled(one: Intervention) -> dict[str, Tensor]:
    return {"read": one.read.double(), "bias": one.bias.double(), "write": one.write.double()}


# -- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("n", [9, 14, N], ids=["N<d", "N=d", "N>d"])
@pytest.mark.parametrize("fit", FIT)
def test_folded_adapter_acts_as_the_unfolded_one(fit, n, activation):
    donor, recipient = both(n)
    adapter = adapter_of(4, activation=activation)
    pasted = paste(adapter, donor, recipient, fit=fit, holdout=0)
    assert pasted.layers == [6]
    into, back = fit(recipient.layer(6), donor.layer(4)), fit(donor.layer(4), recipient.layer(6))
    h = recipient.layer(6).double() + normal(n, D_RECIPIENT, seed=3)
    seen = into(h)
    assert relative(delta(pasted, 6, h), back(seen + delta(adapter, 4, seen)) - back(seen)) < 1e-3


@pytest.mark.parametrize("fit", FIT)
def test_an_adapter_that_does_nothing_is_pasted_as_one(fit):
    donor, recipient = both()
    nothing = adapter_of(4).scaled(0.0)
    assert not delta(paste(nothing, donor, recipient, fit=fit), 6, recipient.layer(6)).any()


def test_pasting_onto_the_same_model_gives_the_adapter_back():
    donor, _ = both()
    adapter = adapter_of(4, 5, activation="relu")
    pasted = paste(adapter, donor, donor, fit=Pinv(exact=True), layers="all_layers")
    for layer in (4, 5):
        h = normal(30, D_DONOR, seed=8)
        assert relative(delta(pasted, layer, h), delta(adapter, layer, h)) < 1e-4


def test_with_few_prompts_self_paste_reads_and_writes_what_the_rows_span():
    donor, _ = both(6)
    adapter = adapter_of(4)
    pasted = paste(adapter, donor, donor, fit=Pinv(exact=True), holdout=0)
    rows = donor.layer(4).double()
    onto_rows = torch.linalg.pinv(rows) @ rows
    assert relative(delta(pasted, 4, rows), delta(adapter, 4, rows) @ onto_rows) < 1e-4


def test_pasting_into_a_rotated_twin_gives_the_rotated_adapter():
    donor, _ = both()
    turn = rotation(D_DONOR, 5)
    twin = profile_of({layer: rows.double() @ turn for layer, rows in donor.activations.items()}, DONOR)
    adapter = adapter_of(5, activation="relu")
    pasted = paste(adapter, donor, twin, fit=Pinv(exact=True))
    h = normal(30, D_DONOR, seed=8)
    assert relative(delta(pasted, 5, h @ turn), delta(adapter, 5, h) @ turn) < 1e-4


@pytest.mark.parametrize("exact", [False, True])
def test_rotating_either_basis_changes_nothing_for_pinv(exact):
    donor, recipient = both()
    adapter, fit = adapter_of(4, activation="relu"), Pinv(exact=exact)
    expected, h = paste(adapter, donor, recipient, fit=fit), normal(30, D_RECIPIENT, seed=8)
    turn = rotation(D_RECIPIENT, 3)
    turned = profile_of({layer: rows.double() @ turn for layer, rows in recipient.activations.items()}, RECIPIENT)
    got = paste(adapter, donor, turned, fit=fit)
    assert relative(delta(got, 6, h @ turn), delta(expected, 6, h) @ turn) < 1e-4
    turn = rotation(D_DONOR, 4)
    turned = profile_of({layer: rows.double() @ turn for layer, rows in donor.activations.items()}, DONOR)
    moved = adapter.map(lambda one: replace(one, read=one.read @ turn.float(), write=one.write @ turn.float()))
    assert relative(delta(paste(moved, turned, recipient, fit=fit), 6, h), delta(expected, 6, h)) < 1e-4


@pytest.mark.parametrize("fit", FIT)
def test_the_gauge_of_an_adapter_does_not_matter(fit):
    donor, recipient = both()
    m = (torch.eye(RANK) + 0.4 * normal(RANK, RANK, seed=11)).float()
    adapter = adapter_of(4)
    other = adapter.map(
        lambda one: Intervention(m @ one.read, m @ one.bias, torch.linalg.inv(m).T @ one.write, one.activation)
    )
    h = recipient.layer(6)
    first, second = (delta(paste(one, donor, recipient, fit=fit), 6, h) for one in (adapter, other))
    assert relative(second, first) < 1e-3


def test_a_steering_vector_is_carried_as_a_difference():
    """Without the bias of the writing converter, and whatever the state."""
    donor, recipient = both()
    v = normal(D_DONOR, seed=2).float()
    pasted = paste(Adapter({4: steering_vector(v)}, DONOR, "v"), donor, recipient, holdout=0)
    expected = Ridge()(donor.layer(4), recipient.layer(6)).push(v[None])[0]
    torch.testing.assert_close(delta(pasted, 6, normal(5, D_RECIPIENT)), expected.expand(5, -1), rtol=1e-4, atol=1e-5)


def test_donor_layers_that_meet_add_up():
    donor, recipient = both()
    adapter = adapter_of(2, 3, 4)
    together = paste(adapter, donor, recipient, match=explicit({2: 7, 3: 8, 4: 7}))
    assert together.layers == [7, 8]
    apart = [paste(adapter.on_layers([layer]), donor, recipient, match=explicit({layer: 7})) for layer in (2, 4)]
    h = recipient.layer(7)
    assert relative(delta(together, 7, h), sum(delta(one, 7, h) for one in apart)) < 1e-6


def test_layers_and_matcher_say_where_it_acts():
    donor, recipient = both()
    adapter = adapter_of(0, 1, 2, 3, 4, 5)
    assert paste(adapter, donor, recipient).layers == [6, 7]  # floor(1.5 l) within 6, 7, 8
    assert paste(adapter, donor, recipient, layers="all_layers").layers == [0, 1, 3, 4, 6, 7]
    assert paste(adapter, donor, recipient, layers=[1, 2, 3]).layers == [1, 3]
    assert paste(adapter, donor, recipient, match=nearest, layers="7,8").layers == [7]


def test_as_published_is_pinv_on_all_last_rows_into_the_nearest_layers_everywhere():
    donor, recipient = both()
    adapter = adapter_of(0, 1, 4, 5)
    whole = {"layers": "all_layers", "match": nearest, "write_rows": "end"}
    assert same_tensors(
        published(adapter, donor, recipient), paste(adapter, donor, recipient, fit=Pinv(), holdout=0.0, **whole)
    )
    assert not same_tensors(published(adapter, donor, recipient), paste(adapter, donor, recipient, fit=Pinv(), **whole))


def test_scale_multiplies_what_is_added():
    donor, recipient = both()
    adapter, h = adapter_of(4, activation="tanh"), recipient.layer(6)
    plain, scaled = (paste(adapter, donor, recipient, scale=scale) for scale in (1.0, -2.5))
    torch.testing.assert_close(delta(scaled, 6, h), -2.5 * delta(plain, 6, h), rtol=1e-5, atol=1e-6)
    assert scaled.provenance["scale"] == -2.5


def test_profiles_are_joined_by_key_not_by_place():
    donor, recipient = both()
    expected = paste(adapter_of(4), donor, recipient)
    order = np.random.default_rng(0).permutation(N)
    mixed = profile_of({layer: rows[order] for layer, rows in donor.activations.items()}, DONOR, end_keys(N)[order])
    # The other one has a prompt more, which counts for nothing.
    longer = profile_of(
        {layer: torch.cat([1e3 * rows[:1], rows]) for layer, rows in recipient.activations.items()},
        RECIPIENT,
        np.concatenate([[[N + 5, END]], end_keys(N)]),
    )
    assert same_tensors(paste(adapter_of(4), mixed, longer), expected)


def test_a_vector_beside_an_adapter_of_its_layer_goes_through_the_same_fits():
    """One of two reads nothing: what the other reads is carried all the same."""
    donor, recipient = both()
    reading, (vector,) = intervention(3), steering_vector(normal(D_DONOR, seed=8).float())
    match = explicit({4: 6})
    alone = paste(Adapter({4: (reading,)}, DONOR, "alone"), donor, recipient, match=match)
    pair = paste(Adapter({4: (reading, vector)}, DONOR, "pair"), donor, recipient, match=match)
    torch.testing.assert_close(pair.interventions[6][0].read, alone.interventions[6][0].read)
    torch.testing.assert_close(pair.interventions[6][0].bias, alone.interventions[6][0].bias)
    assert not pair.interventions[6][1].read.any()


def test_an_intervention_that_writes_nothing_does_not_hide_one_that_does():
    donor, recipient = both()
    silent = replace(intervention(3), write=torch.zeros(RANK, D_DONOR))
    pasted = paste(Adapter({4: (silent, intervention(5))}, DONOR, "two"), donor, recipient, match=explicit({4: 6}))
    assert [bool(one.write.any()) for one in pasted.interventions[6]] == [False, True]


# -- random control ---------------------------------------------------------------------------------------------------


def test_random_control_adds_as_much_on_every_state_in_other_directions():
    donor, recipient = both()
    adapter = adapter_of(2, 4, 5)
    pasted = paste(adapter, donor, recipient, match=explicit({2: 6, 4: 6, 5: 7}))
    assert len(pasted.interventions[6]) == 2  # which partly cancel or add up on each state
    control = random_like(pasted, 0)
    h = 3 * normal(50, D_RECIPIENT, seed=4)
    for layer in (6, 7):
        a, b = delta(pasted, layer, h), delta(control, layer, h)
        torch.testing.assert_close(b.norm(dim=1), a.norm(dim=1), rtol=1e-5, atol=1e-6)
        assert abs(float(torch.nn.functional.cosine_similarity(a, b).mean())) < 0.8
    assert same_tensors(control, random_like(pasted, 0))
    assert not same_tensors(control, random_like(pasted, 1))
    assert control.interventions[6][0].write is not pasted.interventions[6][0].write


def test_random_control_has_no_direction_it_prefers():
    one = Adapter({0: steering_vector(torch.ones(D_DONOR))}, DONOR, "v")
    drawn = torch.stack([random_like(one, seed).interventions[0][0].write[0] for seed in range(400)])
    torch.testing.assert_close(drawn.norm(dim=1), torch.full((400,), D_DONOR**0.5))
    assert drawn.mean(0).norm() < 0.1 * D_DONOR**0.5
    assert len({tuple(row) for row in drawn.tolist()}) == 400


def test_random_control_within_activations_follows_how_they_vary():
    """Where they do not vary it does not write, however far from 0 they are; each seed draws anew."""
    rows = normal(40, D_DONOR, seed=6)
    rows[:, 0], rows[:, 1] = 100.0, rows[:, 1] * 1e-3
    flat = profile_of({0: rows}, DONOR)
    one = Adapter({0: (intervention(7, rank=2),)}, DONOR, "a")
    first, second = (random_like(one, seed, within=flat).interventions[0][0].write for seed in (0, 1))
    assert float(first[:, 0].abs().max()) < 1e-4 * float(first.abs().max())
    assert float(first[:, 1].abs().max()) < 0.05 * float(first.abs().max())
    assert not torch.allclose(first, second, rtol=0.1)


def test_random_control_of_more_directions_than_dimensions():
    one = Adapter({0: tuple(intervention(seed, rank=8) for seed in (0, 30))}, DONOR, "wide")
    h = normal(20, D_DONOR, seed=4)
    a, b = delta(one, 0, h), delta(random_like(one, 0), 0, h)
    torch.testing.assert_close(b.norm(dim=1), a.norm(dim=1), rtol=1e-5, atol=1e-6)


# -- layers that nobody chose -----------------------------------------------------------------------------------------


def test_an_adapter_of_middle_layers_is_pasted_where_it_is_matched():
    """As `steer` makes them; one that reaches the last third acts there alone."""
    donor, recipient = both(N)
    third = recipient.n_layers - recipient.n_layers // 3
    matched = {pair.donor: pair.recipient for pair in proportional(donor, recipient, range(donor.n_layers))}
    middle = [layer for layer, own in matched.items() if own < third][-2:]
    last = [layer for layer, own in matched.items() if own >= third]
    many = {layer: (intervention(),) for layer in (*middle, *last)}
    whole = Adapter(many, DONOR, "whole")
    assert paste(whole, donor, recipient).layers == sorted({matched[layer] for layer in last})
    steering = Adapter({layer: many[layer] for layer in middle}, DONOR, "middle")
    assert paste(steering, donor, recipient).layers == sorted({matched[layer] for layer in middle})
