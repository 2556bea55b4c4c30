"""Converters that are not affine, and interventions carried through them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import commandv as cv
from commandv.adapter import Adapter, Intervention, steering_vector
from commandv.carried import Carried
from commandv.convert import Autoencoder, FourierRidge, Network, Ridge
from commandv.convert import autoencoder as module
from commandv.convert.linear import Dense
from commandv.encoding import pad
from commandv.errors import FormatError, InputError, MismatchError
from commandv.held_out import fidelity, r2, written
from commandv.inspection import describe
from commandv.interop.control_vectors import write_control_vector
from commandv.models import ModelRef
from commandv.pasting import paste, random_like
from commandv.positions import Positions
from commandv.profiling import read_rows
from made_up import adapter_of, both
from rows import normal
from tiny import random_adapter, tiny_lm

D_X, D_Y, N, UNSEEN = 8, 10, 1500, 500
LEARNING = Autoencoder(hidden=64, epochs=60, learning_rate=3e-3, patience=5)


def planted(*, curved: bool, noise: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows y of x, off-centre and of unequal scales: x A, and if curved a wave of another direction."""
    x = normal(N, D_X, seed=seed)
    y = x @ normal(D_X, D_Y, seed=seed + 1) / D_X**0.5 + noise * normal(N, D_Y, seed=seed + 2)
    if curved:
        y = y + torch.tanh(2 * x @ normal(D_X, D_Y, seed=seed + 3)) * x[:, :1]
    x = x * torch.logspace(-1, 2, D_X) + 30
    return x.float(), (y * torch.logspace(1, -1, D_Y) - 7).float()


def unseen_r2(fit, x: Tensor, y: Tensor) -> float:
    return r2(fit(x[UNSEEN:], y[UNSEEN:])(x[:UNSEEN].double()), y[:UNSEEN].double())


def network(d_x: int, d_y: int, *, hidden: int = 12, activation: str = "relu", linear: bool = True, seed: int = 0):
    g = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / shape[0] ** 0.5

    through = some(d_x, d_y) if linear else None
    return Network(some(d_x), some(d_x, hidden), some(hidden), some(hidden, d_y), some(d_y), through, activation)


def identity(d: int) -> Network:
    """The identity with a hidden layer: relu(x) - relu(-x)."""
    eye = torch.eye(d)
    zero = torch.zeros(d)
    return Network(zero, torch.cat([eye, -eye], 1), torch.zeros(2 * d), torch.cat([eye, -eye]), zero)


def inner(d: int, rank: int = 3, seed: int = 0, activation: str = "linear", positions: str = "l1") -> Intervention:
    parts = normal(rank, d, seed=seed), normal(rank, seed=seed + 1), normal(rank, d, seed=seed + 2)
    return Intervention(*(part.float() for part in parts), activation, Positions.parse(positions))


def carried(d: int, d_donor: int = 7, **how) -> Carried:
    into, back = network(d, d_donor, seed=1), network(d_donor, d, activation="cos", linear=False, seed=2)
    return Carried(inner(d_donor, **how), into, back, 0.5)


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
    assert twin.affine
    assert r2(twin(x.double()), y.double()) > 0.99
    donor, recipient = both()
    pasted = paste(adapter_of(4), donor, recipient, fit=Autoencoder(relu=False))
    assert [type(one) for one in pasted.interventions[6]] == [Intervention]


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_that_was_cut_off_resumes_to_the_same_converter(tmp_path, monkeypatch):
    x, y = planted(curved=True)
    fit = Autoencoder(epochs=4, learning_rate=1e-3)
    whole = fit(x, y)
    learn = module._Run.learn

    def cut_off(run) -> None:
        if run.epoch == 2:
            raise KeyboardInterrupt
        learn(run)

    monkeypatch.setattr(module._Run, "learn", cut_off)
    kept = replace(fit, checkpoint=str(tmp_path / "kept"))
    with pytest.raises(KeyboardInterrupt):
        kept(x, y)
    epochs: list[int] = []
    monkeypatch.setattr(module._Run, "learn", lambda run: (epochs.append(run.epoch), learn(run))[1])
    resumed = kept(x, y)
    assert epochs == [2, 3]
    for name, value in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], value), name
    assert resumed.facts == whole.facts
    kept(x, y)  # finished: nothing is learned again
    kept(x + 1, y)  # other rows are another training
    assert epochs == [2, 3, 0, 1, 2, 3]


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


# -- carrying ---------------------------------------------------------------------------------------------------------


def test_through_identities_the_donor_s_own_delta_comes_back():
    d, h = 9, 3 * normal(20, 9, seed=5).float()
    for activation in ("linear", "tanh"):
        one = inner(d, activation=activation)
        both_ways = Carried(one, identity(d), identity(d))
        torch.testing.assert_close(both_ways.delta(h), one.delta(h), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both_ways.scaled(-2).delta(h), -2 * one.delta(h), rtol=1e-4, atol=1e-5)


def test_it_carries_differences():
    one, h = carried(6), normal(5, 6).float()
    seen = one.into(h)
    expected = 0.5 * (one.back(seen + one.inner.delta(seen)) - one.back(seen))
    assert torch.equal(one.delta(h), expected)
    assert (one.d_model, one.rank, str(one.positions)) == (6, 3, "l1")


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_what_changes_nothing_in_the_donor_adds_exactly_nothing(activation):
    one = carried(6)
    nothing = replace(one.inner, write=torch.zeros_like(one.inner.write), activation=activation)
    h = 100 * normal(50, 6).float()
    assert not Carried(nothing, one.into, one.back).delta(h).any()
    # A gate that is shut for some states only: these get exactly nothing beside others that get something.
    gate = Intervention(one.inner.read[:1], torch.zeros(1), one.inner.write[:1], "relu")
    shut = (one.into(h) @ gate.read.T <= 0)[:, 0]
    delta = Carried(gate, one.into, one.back).delta(h)
    assert 0 < shut.sum() < 50
    assert not delta[shut].any()
    assert delta[~shut].any(1).all()


def test_an_affine_converter_beside_one_that_is_not_is_carried_as_it_is():
    x, y = planted(curved=False)
    ridge = Ridge()(x, y)
    net = Network.of(ridge, D_Y)
    torch.testing.assert_close(net(x.double()), ridge(x.double()), rtol=1e-4, atol=1e-3)
    steps = normal(4, D_X).float()
    one = Carried(steering_vector(steps[0])[0], network(D_Y, D_X), net)
    expected = ridge.push(steps[:1]).float()
    torch.testing.assert_close(one.delta(normal(1, D_Y).float()), expected, rtol=1e-2, atol=1e-2)


def test_a_fitter_that_is_affine_one_way_only_is_carried_by_the_same_class():
    class OneWay(FourierRidge):
        def __call__(self, x, y, **more):
            return (super().__call__ if x.shape[1] > y.shape[1] else Ridge())(x, y, **more)

    donor, recipient = both()  # widths 10 and 14
    pasted = paste(adapter_of(4), donor, recipient, fit=OneWay(features=16))
    back = paste(adapter_of(4, ref=recipient.model), recipient, donor, fit=OneWay(features=16), layers="all_layers")
    for adapter, hidden in ((pasted, (16, 0)), (back, (0, 16))):
        (one,) = next(iter(adapter.interventions.values()))
        assert (len(one.into.shift), len(one.back.shift)) == hidden


def test_widths_that_do_not_belong_together_and_carrying_twice_are_refused():
    one = carried(6)
    with pytest.raises(MismatchError, match="another pair of models"):
        Carried(inner(6), one.into, one.back)
    with pytest.raises(MismatchError, match="another pair of models"):
        Carried(one.inner, one.into, network(7, 5))
    with pytest.raises(InputError, match="carried already"):
        Carried(one, network(5, 6), network(6, 5))
    with pytest.raises(InputError, match="scale=nan"):
        one.scaled(float("nan"))


def test_what_needs_matrices_says_that_there_are_none(tmp_path):
    one = carried(6)
    for name in ("read", "bias", "write"):
        with pytest.raises(InputError, match="affine fitter"):
            getattr(one, name)
    adapter = Adapter({1: (one,)}, ModelRef("m", "r", 6, 4))
    with pytest.raises(InputError, match="affine fitter"):
        write_control_vector(adapter, tmp_path / "out.gguf")
    with pytest.raises(InputError, match="affine fitter"):
        replace(one, positions=Positions(last=3))  # `at` is the way


def test_adapters_scale_move_and_count_what_they_hold():
    one = carried(6)
    adapter = Adapter({1: (one, inner(6))}, ModelRef("m", "r", 6, 4))
    h = normal(5, 6).float()
    assert torch.equal(adapter.scaled(3.0).interventions[1][0].delta(h), 1.5 / 0.5 * one.delta(h))
    moved = adapter.at(Positions(everywhere=True))
    assert [str(two.positions) for two in moved.interventions[1]] == ["all", "all"]
    maps = sum(part.numel() for net in (one.into, one.back) for part in net.tensors().values())
    assert adapter.n_parameters == maps + 3 * (2 * 7 + 1) + 3 * (2 * 6 + 1)


def test_the_random_control_adds_as_much_on_every_state():
    donor, recipient = both()
    adapter = paste(adapter_of(4, 5), donor, recipient, fit=FourierRidge(features=32))
    mixed = replace(adapter, interventions={6: (*adapter.interventions[6], inner(14)), 7: adapter.interventions[7]})
    control, h = random_like(mixed, 0), recipient.layer(6) + normal(80, 14).float()
    for layer in (6, 7):
        deltas = [sum(one.delta(h) for one in some.interventions[layer]) for some in (mixed, control)]
        torch.testing.assert_close(deltas[1].norm(dim=1), deltas[0].norm(dim=1), rtol=1e-4, atol=1e-4)
        assert abs(float(torch.cosine_similarity(*deltas).mean())) < 0.8
    other = random_like(mixed, 1)
    assert not torch.allclose(other.interventions[6][0].delta(h), control.interventions[6][0].delta(h))


@pytest.mark.parametrize("fit", [FourierRidge(features=64), LEARNING], ids=["fourier", "autoencoder"])
def test_fidelity_is_told_of_every_fitter_and_is_high_where_streams_are_related(fit):
    donor, recipient = both(300)
    (told,) = fidelity(paste(adapter_of(4), donor, recipient, fit=fit), donor, recipient)
    assert min(told.read_r2, told.write_r2, told.adapter_read_r2, told.adapter_write_r2) > 0.7
    assert told.cycle_error < 0.4


def test_directions_written_through_a_map_are_those_pushed_where_it_is_affine():
    donor, recipient = both()
    ridge, one = Ridge()(donor.layer(4), recipient.layer(6)), adapter_of(4).interventions[4][0]
    states = donor.layer(4).double()
    pushed, through = written(ridge, one, states), written(Network.of(ridge, 14), one, states)
    assert torch.cosine_similarity(pushed, through).min() > 1 - 1e-5


def test_the_checkpoint_is_not_recorded(tmp_path):
    donor, recipient = both()
    fit = Autoencoder(epochs=1, checkpoint=str(tmp_path / "kept"))
    pasted = paste(adapter_of(4), donor, recipient, fit=fit)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert str(tmp_path) not in json.dumps(pasted.provenance)
    assert fidelity(pasted, donor, recipient)


# -- attached ---------------------------------------------------------------------------------------------------------

TEXTS = ["Why does Venus spin backwards?", "Tea", "She said that nobody had seen the cat since Monday."]


def last_states(lm: cv.LM, adapter: Adapter, texts: list[str], side: str) -> Tensor:
    batch = pad(lm, [lm.tokenizer(text)["input_ids"] for text in texts], side)
    mask = batch.attention_mask
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    with cv.attach(lm, adapter):
        return read_rows(lm, batch, (torch.arange(len(texts)), last))[lm.n_layers - 1]


@pytest.mark.parametrize("positions", ["l1", "f1+l2", "all"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_batches_and_padding_change_nothing(arch, positions):
    lm = tiny_lm(arch)
    adapter = Adapter({1: (carried(lm.d_model, positions=positions),)}, lm.ref)
    alone = torch.cat([last_states(lm, adapter, [text], "right") for text in TEXTS]).float()
    for side in ("left", "right"):
        torch.testing.assert_close(last_states(lm, adapter, TEXTS, side).float(), alone, rtol=2e-2, atol=2e-2)
    plain = last_states(lm, adapter.scaled(0.0), TEXTS, "right").float()
    assert not torch.allclose(plain, alone, rtol=0.1, atol=0.1)


def test_attached_through_identities_it_is_the_adapter_itself_and_scales_with_it():
    lm = tiny_lm()
    own = random_adapter(lm)
    wrapped = own.map(lambda one: Carried(one, identity(lm.d_model), identity(lm.d_model)))
    answers = []
    for adapter in (own, wrapped):
        with cv.attach(lm, adapter, scale=1.5):
            answers.append(cv.generate(lm, TEXTS, max_new_tokens=12))
    assert answers[0] == answers[1] != cv.generate(lm, TEXTS, max_new_tokens=12)


def test_a_half_precision_model_takes_it():
    lm = tiny_lm(dtype=torch.bfloat16)
    with cv.attach(lm, Adapter({1: (carried(lm.d_model),)}, lm.ref)):
        assert len(cv.generate(lm, TEXTS, max_new_tokens=4)) == 3


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    adapter = Adapter({1: (carried(6), inner(6)), 3: (carried(6, activation="tanh"),)}, ModelRef("m", "r", 6, 4), "it")
    return adapter, cv.save(adapter, tmp_path / "it")


def test_files_give_back_every_bit(saved):
    adapter, path = saved
    again, h = cv.load_adapter(path), normal(5, 6).float()
    assert again.layers == adapter.layers
    for layer in adapter.layers:
        for one, two in zip(adapter.interventions[layer], again.interventions[layer], strict=True):
            assert type(one) is type(two)
            assert (one.activation, one.positions) == (two.activation, two.positions)
            assert torch.equal(one.delta(h), two.delta(h))
    (first, _) = again.interventions[1]
    assert (first.into.activation, first.back.activation, first.scale) == ("relu", "cos", 0.5)
    assert first.back.linear is None


def test_inspection_tells_what_it_goes_through(saved):
    first, second, _ = describe(str(saved[1]))["interventions"]
    assert first["through"] == "Carried(rank 3, 7 -> 6 by relu, 12 and 12 hidden units, scale 0.5)"
    assert first["write_norm"] == pytest.approx(0.5 * float(carried(6).inner.write.norm()), abs=1e-3)
    assert "through" not in second


def edited(config: dict, place: str, value: object) -> None:
    *way, last = place.split(".")
    for name in way:
        config = config[int(name)] if isinstance(config, list) else config[name]
    config[last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("interventions.0.kind", "affine", "unknown kind"),
        ("interventions.0.kind", "kernel", "unknown kind 'kernel'"),
        ("interventions.1.kind", "carried", "unknown kind"),
        ("interventions.0.carried.d_donor", 8, r"the config says float32 \(3, 8\)"),
        ("interventions.0.carried.into.hidden", 13, "the config says float32"),
        ("interventions.0.carried.into.linear", False, "missing or not in the config"),
        ("interventions.0.carried.into.activation", "sin", "'sin'.*expected one of"),
        ("interventions.0.carried.into.more", 1, "into.more"),
        ("interventions.0.carried.scale", None, "carried.scale"),
        ("model.d_model", 5, "the config says float32"),
    ],
)
def test_tampered_configurations_are_refused(saved, place, value, message):
    config = json.loads((saved[1] / "config.json").read_text())
    edited(config, place, value)
    (saved[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        cv.load_adapter(saved[1])


@pytest.mark.parametrize("change", ["missing", "more", "shape", "dtype", "nan"])
def test_tampered_tensors_are_refused(saved, change):
    file, name = saved[1] / "tensors.safetensors", "0.back.decode"
    tensors = load_file(file)
    value = tensors[name]
    changed = {
        "missing": {},
        "more": {name: value, "0.back.linear": value.clone()},
        "shape": {name: value[:, :5].contiguous()},
        "dtype": {name: value.half()},
        "nan": {name: value * float("nan")},
    }[change]
    del tensors[name]
    save_file({**tensors, **changed}, file)
    with pytest.raises(FormatError):
        cv.load_adapter(saved[1])
