"""Converters that are not affine: what they find, and how they are trained."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import commandv as cv
from commandv.adapters.adapter import Intervention
from commandv.errors import FormatError, InputError
from commandv.transfer.convert import autoencoder as module
from commandv.transfer.convert.autoencoder import Autoencoder
from commandv.transfer.convert.fitters import Ridge
from commandv.transfer.convert.fourier import FourierRidge
from commandv.transfer.convert.linear import Dense
from commandv.transfer.fidelity import r2
from commandv.transfer.paste import paste
from made_up import adapter_of, both
from rows import D_X, D_Y, N, normal, planted

UNSEEN = 500
LEARNING = Autoencoder(hidden=64, epochs=60, learning_rate=3e-3, patience=5)


def unseen_r2(fit, x: Tensor, y: Tensor) -> float:
    return r2(fit(x[UNSEEN:], y[UNSEEN:])(x[:UNSEEN].double()), y[:UNSEEN].double())


# -- the fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [FourierRidge(features=512), LEARNING], ids=["fourier", "autoencoder"])
def test_a_curved_relation_is_found_where_ridge_finds_only_its_line(fit):
    x, y = planted(curved=True)
    assert unseen_r2(Ridge(), x, y) < 0.75
    assert unseen_r2(fit, x, y) > unseen_r2(Ridge(), x, y) + 0.1


def test_on_a_straight_relation_the_cosines_add_nothing():
    x, y = planted(curved=False, noise=0.5)
    assert unseen_r2(FourierRidge(), x, y) == pytest.approx(unseen_r2(Ridge(), x, y), abs=0.003)


def test_cosines_are_the_closed_form_of_their_formula():
    x, y = planted(curved=True)
    fit = FourierRidge(features=40, strength=0.05, bandwidth=3.0)
    net = fit(x, y)
    strength = net.facts["linear_strength"]
    z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    t = (y.double() - y.double().mean(0)) / y.double().std(0, correction=0)
    penalty = strength * N
    t = t - z @ torch.linalg.solve(z.T @ z + penalty * torch.eye(D_X), z.T @ t)
    scale = x.double().std(0, correction=0)
    phi = torch.cos(z @ (net.encode.double() * scale[:, None]) + net.shift.double())
    phi = phi - phi.mean(0)
    gram = phi.T @ phi
    weights = torch.linalg.solve(gram + 0.05 * gram.diagonal().mean() * torch.eye(40), phi.T @ t)
    expected = y.double() - (t - phi @ weights) * y.double().std(0, correction=0)
    assert r2(net(x.double()), expected) > 1 - 1e-5
    frequencies = (net.encode.double() * scale[:, None]).numpy()
    assert frequencies.std() == pytest.approx(1 / 3, rel=0.1)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_few_rows_are_fitted_all_the_same(n):
    x, y = (part[:n] for part in planted(curved=True))
    for fit in (FourierRidge(features=16), Autoencoder(), Autoencoder(relu=False)):
        assert torch.isfinite(fit(x, y, groups=np.zeros(n, np.int64))(x)).all()


@pytest.mark.parametrize("how", [{"features": 0}, {"bandwidth": 0.0}, {"strength": -1.0}, {"strength": float("nan")}])
def test_fourier_refuses_settings_that_are_none(how):
    with pytest.raises(InputError, match=next(iter(how))):
        FourierRidge(**how)


@pytest.mark.parametrize("how", [{"hidden": 0}, {"epochs": 0}, {"batch_size": 0}, {"patience": 0}])
def test_the_autoencoder_refuses_settings_that_are_none(how):
    with pytest.raises(InputError, match=f"{next(iter(how))}=0"):
        Autoencoder(**how)
    with pytest.raises(InputError, match="validation"):
        Autoencoder(validation=1.0)
    with pytest.raises(InputError, match="learning_rate"):
        Autoencoder(learning_rate=0.0)


def test_hidden_units_are_the_paper_s_number():
    x, y = planted(curved=False)
    assert Autoencoder(epochs=1)(x, y).facts["hidden"] == int((D_X * D_Y) ** 0.5)


def test_no_global_seed_is_read_or_changed():
    x, y = planted(curved=True)
    for fit in (FourierRidge(features=16), Autoencoder(epochs=1)):
        torch.manual_seed(1)
        np.random.seed(1)
        first, state = fit(x, y), torch.get_rng_state()
        torch.manual_seed(2)
        assert not torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first(x), fit(x, y)(x))
        assert not torch.equal(first(x), replace(fit, seed=5)(x, y)(x))


def test_the_affine_twin_is_affine_and_folds():
    x, y = planted(curved=False)
    twin = replace(LEARNING, relu=False)(x, y)
    assert isinstance(twin, Dense)
    assert r2(twin(x.double()), y.double()) > 0.99
    donor, recipient = both()
    pasted = paste(adapter_of(4), donor, recipient, fit=Autoencoder(relu=False))
    assert [type(one) for one in pasted.interventions[6]] == [Intervention]


@pytest.mark.parametrize("fit", [FourierRidge(features=64), LEARNING], ids=["fourier", "autoencoder"])
def test_fidelity_is_told_of_every_fitter_and_is_high_where_streams_are_related(fit):
    donor, recipient = both(300)
    (told,) = cv.link(donor, recipient, fit=fit).fidelity(adapter_of(4))
    assert min(told.read_r2, told.write_r2, told.adapter_read_r2, told.adapter_write_r2) > 0.7
    assert told.cycle_error < 0.4


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_that_was_cut_off_resumes_to_the_same_converter(tmp_path, monkeypatch):
    x, y = planted(curved=True)
    fit = Autoencoder(epochs=4, learning_rate=1e-3)
    steps: list[int] = []
    original = torch.optim.AdamW.step

    def counted(optimizer) -> None:
        if len(steps) == cut_at:
            raise KeyboardInterrupt
        steps.append(1)
        original(optimizer)

    cut_at = None
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    whole = fit(x, y)
    each = len(steps) // 4
    steps.clear()
    cut_at = 2 * each + 1  # within the third epoch
    kept = replace(fit, checkpoint=str(tmp_path / "kept"))
    with pytest.raises(KeyboardInterrupt):
        kept(x, y)
    cut_at = None
    steps.clear()
    resumed = kept(x, y)
    assert len(steps) == 2 * each
    for name, value in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], value), name
    assert resumed.facts == whole.facts
    kept(x, y)  # finished: nothing is learned again
    assert len(steps) == 2 * each
    kept(x + 1, y)  # other rows are another training
    assert len(steps) == 6 * each


@pytest.mark.parametrize("damage", ["cut", "other", "text"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    x, y = planted(curved=True)
    fit = Autoencoder(epochs=1, checkpoint=str(tmp_path))
    fit(x, y)
    (file,) = tmp_path.glob("*.safetensors")
    if damage == "other":
        replace(fit, seed=1)(x, y)
        (other,) = set(tmp_path.glob("*.safetensors")) - {file}
        other.replace(file)
    else:
        file.write_bytes(file.read_bytes()[:100] if damage == "cut" else b"text")
    with pytest.raises(FormatError, match="delete it to train anew"):
        fit(x, y)


def test_training_stops_when_unseen_prompts_gain_nothing_and_keeps_the_best_epoch():
    x, _ = planted(curved=False)
    noise = normal(N, D_Y, seed=77).float()
    groups = np.repeat(np.arange(N // 5), 5)
    fit = Autoencoder(hidden=128, epochs=200, learning_rate=1e-2, patience=2)
    facts = fit(x, noise, groups=groups).facts
    assert facts["epochs"] == facts["best_epoch"] + 2 < 50
    losses = facts["validation_loss"]
    assert losses[facts["best_epoch"]] == min(losses)


def test_validation_rows_are_whole_prompts_and_teach_nothing():
    groups = np.repeat(np.arange(30), 7)
    learned, unseen = module._split(groups, 0.2, seed=3)
    assert len(unseen) == 6 * 7
    assert not set(groups[learned]) & set(groups[unseen])
    x, y = planted(curved=True)
    fit = Autoencoder(epochs=1)
    own = np.arange(N)
    _, unseen = module._split(own, 0.1, seed=0)
    mixed = y.clone()
    mixed[unseen] = mixed[unseen.tolist()[::-1]]  # the same moments, other pairs
    # What is learned is the same; the stored order of rounding is too.
    assert torch.allclose(fit(x, y).decode, fit(x, mixed).decode, rtol=1e-4, atol=1e-6)


def test_the_checkpoint_is_not_recorded(tmp_path):
    donor, recipient = both()
    fit = Autoencoder(epochs=1, checkpoint=str(tmp_path / "kept"))
    link = cv.link(donor, recipient, fit=fit)
    pasted = link.paste(adapter_of(4))
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert str(tmp_path) not in json.dumps(pasted.provenance)
    assert link.fidelity(adapter_of(4))
