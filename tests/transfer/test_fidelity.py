"""Which rows a paste is fitted on, which are kept from it, and the fidelity that these show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import commandv as cv
from commandv.errors import InputError, MismatchError
from commandv.profiles.profile import Profile
from commandv.transfer.convert.fitters import Pinv
from commandv.transfer.fidelity import cosine, r2
from commandv.transfer.link import held_out_prompts
from commandv.transfer.paste import paste
from made_up import D_RECIPIENT, DONOR, FIT, RECIPIENT, adapter_of, both, end_keys, profile_of, same_tensors
from rows import normal

# -- end rows for reading, text rows for writing ----------------------------------------------------------------------


def with_text(n: int = 40, per_text: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Keys of n prompts' ends and of texts after them, and which of them are text."""
    text = np.array([[n + i, 4 * (k + 1)] for i in range(n) for k in range(per_text)])
    keys = np.concatenate([end_keys(n), text])
    return keys, keys[:, 1] >= 0


def changed(profile: Profile, rows: np.ndarray) -> Profile:
    noise = 3 * normal(int(rows.sum()), profile.d_model, seed=66).float()
    layers = {}
    for layer, values in profile.activations.items():
        layers[layer] = values.clone()
        layers[layer][torch.from_numpy(rows)] += noise
    return replace(profile, activations=layers)


def test_text_rows_serve_writing_and_end_rows_reading():
    keys, text = with_text()
    donor, recipient = both(len(keys), keys=keys)
    adapter = adapter_of(4)
    (plain,) = paste(adapter, donor, recipient).interventions[6]
    (other_text,) = paste(adapter, changed(donor, text), recipient).interventions[6]
    (other_ends,) = paste(adapter, changed(donor, ~text), recipient).interventions[6]
    assert torch.equal(other_text.read, plain.read)
    assert not torch.allclose(other_text.write, plain.write, rtol=0.01)
    assert torch.equal(other_ends.write, plain.write)
    assert not torch.allclose(other_ends.read, plain.read, rtol=0.01)


def test_rows_are_chosen_on_request():
    keys, text = with_text()
    donor, recipient = both(len(keys), keys=keys)
    adapter = adapter_of(4)
    by_ends = paste(adapter, donor, recipient, write_rows="end")
    assert same_tensors(by_ends, paste(adapter, changed(donor, text), changed(recipient, text), write_rows="end"))
    ends_only = profile_of({layer: rows[:40] for layer, rows in donor.activations.items()}, DONOR)
    assert same_tensors(by_ends, paste(adapter, ends_only, recipient))  # no text rows to share: ends serve both
    with pytest.raises(InputError, match=r"0 shared text rows .* expected at least 2; profile with text="):
        paste(adapter, ends_only, recipient, write_rows="text")


# -- prompts kept from the fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", FIT)
def test_held_out_prompts_are_never_seen_by_a_fit(fit):
    keys, text = with_text()
    donor, recipient = both(len(keys), keys=keys)
    adapter = adapter_of(4, 5)
    expected = paste(adapter, donor, recipient, fit=fit, holdout=0.2)
    unseen = held_out_prompts(keys[:, 0], 0.2)
    assert unseen[text].any()
    assert unseen[~text].any()
    got = paste(adapter, changed(donor, unseen), changed(recipient, unseen), fit=fit, holdout=0.2)
    assert same_tensors(got, expected)
    seen = np.flatnonzero(~unseen & ~text)[:1]
    one_row = np.isin(np.arange(len(keys)), seen)
    assert not same_tensors(paste(adapter, donor, changed(recipient, one_row), fit=fit, holdout=0.2), expected)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_held_out_prompts_are_the_share_asked_for_and_grow_with_it(share):
    marked = held_out_prompts(np.arange(2000), share)
    assert marked.mean() == pytest.approx(share, abs=0.01)
    assert (marked <= held_out_prompts(np.arange(2000), share + 0.1)).all()
    # Spread over the set, not one end of it.
    assert held_out_prompts(np.arange(1000), share).mean() == pytest.approx(share, abs=0.02)
    # By prompt, whatever rows are asked about.
    assert (held_out_prompts(np.repeat(np.arange(50), 3)[::-1], share) == marked[:50].repeat(3)[::-1]).all()


# -- fidelity ---------------------------------------------------------------------------------------------------------


def test_fidelity_is_near_one_where_the_streams_are_related():
    donor, recipient = both(300)
    (told,) = cv.link(donor, recipient).fidelity(adapter_of(4))
    assert (told.donor, told.recipient, told.n) == (4, 6, int(held_out_prompts(np.arange(300), 0.1).sum()))
    for name in ("read_r2", "write_r2", "read_cosine", "write_cosine", "adapter_read_r2", "adapter_write_r2"):
        assert 0.98 < getattr(told, name) <= 1.0, name
    assert 0 <= told.cycle_error < 0.02


def test_fidelity_is_near_zero_where_they_are_not():
    donor, _ = both(300)
    # Of the same prompts, and nothing in common.
    alien = profile_of({layer: normal(300, D_RECIPIENT, seed=900 + layer) for layer in range(9)}, RECIPIENT)
    (told,) = cv.link(donor, alien).fidelity(adapter_of(4))
    for name in ("read_r2", "write_r2", "adapter_read_r2", "adapter_write_r2"):
        assert -0.35 < getattr(told, name) < 0.1, name
    assert abs(told.read_cosine) < 0.3
    assert told.cycle_error > 0.9


def test_shuffled_pairs_destroy_fidelity():
    donor, recipient = both(300)
    adapter = adapter_of(4)
    link = cv.link(donor, recipient, shuffle=0)
    shuffled = link.paste(adapter)
    (plain,) = cv.link(donor, recipient).fidelity(adapter)
    (told,) = link.fidelity(adapter)
    assert plain.read_r2 > 0.98
    assert plain.write_r2 > 0.98
    assert max(told.read_r2, told.write_r2, told.adapter_read_r2, told.adapter_write_r2) < 0.1
    assert same_tensors(shuffled, paste(adapter, donor, recipient, shuffle=0))
    assert not same_tensors(shuffled, paste(adapter, donor, recipient, shuffle=1))


def test_fidelity_measures_held_out_rows_not_fitted_ones():
    """Least squares through as many rows as dimensions fits its own rows exactly and others not at all."""
    donor, recipient = both(17, noise=1.0)
    (told,) = cv.link(donor, recipient, fit=Pinv(exact=True), holdout=0.2).fidelity(adapter_of(4))
    fitted = ~held_out_prompts(np.arange(17), 0.2)
    x, y = recipient.layer(6)[torch.from_numpy(fitted)], donor.layer(4)[torch.from_numpy(fitted)]
    assert len(x) <= D_RECIPIENT
    assert r2(Pinv(exact=True)(x, y)(x.double()), y.double()) > 0.999
    assert told.read_r2 < 0.5


@pytest.mark.parametrize("fit", FIT)
def test_fidelity_is_that_of_the_fits_pasted_through_and_the_same_in_one_go(fit):
    donor, recipient = both()
    adapter = adapter_of(4, 5)
    link = cv.link(donor, recipient, fit=fit)
    made = [(link.into(pair), link.back(pair)) for pair in link.layer_pairs(adapter.layers)]
    link.paste(adapter)
    told = link.fidelity(adapter)
    assert all(link.into(pair) is one[0] for pair, one in zip(link.layer_pairs(adapter.layers), made, strict=True))
    again = cv.link(donor, recipient, fit=fit).fidelity(adapter)
    assert [tuple(one) for one in again] == [pytest.approx(tuple(one), rel=1e-3, abs=1e-6) for one in told]


def test_fidelity_leaves_out_dimensions_that_do_not_vary():
    donor, recipient = both(300)
    (plain,) = cv.link(donor, recipient).fidelity(adapter_of(4))
    for profile in (donor, recipient):
        for rows in profile.activations.values():
            rows[:, 3], rows[:, 5] = 0.0, 1234.567
    (told,) = cv.link(donor, recipient).fidelity(adapter_of(4))
    for name in ("read_r2", "write_r2", "read_cosine", "write_cosine", "cycle_error"):
        assert getattr(told, name) == pytest.approx(getattr(plain, name), abs=0.02), name


def test_r2_and_cosine_of_known_predictions():
    true = normal(50, 4) * torch.tensor([1.0, 10.0, 100.0, 1e4]) + 7
    mean, std = true.mean(0), true.std(0, correction=0)
    assert r2(true, true) == 1.0
    assert r2(mean.expand_as(true), true) == pytest.approx(0.0)
    assert r2(true + 0.5 * std, true) == pytest.approx(0.75)
    assert r2(mean - (true - mean), true) == pytest.approx(-3.0)
    assert cosine(mean + 5 * (true - mean), true) == pytest.approx(1.0)
    assert cosine(mean - (true - mean), true) == pytest.approx(-1.0)


def test_fidelity_without_rows_to_measure_on_is_refused():
    donor, recipient = both()
    with pytest.raises(InputError, match="holdout=0: no prompts are left"):
        cv.link(donor, recipient, holdout=0).fidelity(adapter_of(4))
    donor, recipient = both(4)
    with pytest.raises(InputError, match=r"keeps 1 rows from the fit, expected at least 2"):
        cv.link(donor, recipient).fidelity(adapter_of(4))


def test_fidelity_of_another_model_s_adapter_is_refused():
    donor, recipient = both()
    with pytest.raises(MismatchError, match="made for donor"):
        cv.link(recipient, donor).fidelity(adapter_of(4))
    with pytest.raises(MismatchError, match="adapter test: made for recipient"):
        cv.link(donor, recipient).fidelity(paste(adapter_of(4), donor, recipient))
