"""Interventions carried through converters that are not affine: what they add, attached to a model, and in files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import commandv as cv
from commandv.adapters.adapter import Adapter, Intervention
from commandv.adapters.carried import Carried
from commandv.adapters.kinds import steering_vector
from commandv.adapters.network import Network
from commandv.cli.inspection import describe
from commandv.errors import FormatError, InputError, MismatchError
from commandv.interop.control_vectors import write_control_vector
from commandv.models.encoding import pad
from commandv.models.identity import ModelRef
from commandv.positions import Positions
from commandv.profiles.work import read_rows
from commandv.transfer.convert.fitters import Ridge
from commandv.transfer.convert.fourier import FourierRidge
from commandv.transfer.fidelity import written
from commandv.transfer.match import LayerPair
from commandv.transfer.paste import paste, random_like
from made_up import adapter_of, both
from rows import D_X, D_Y, normal, planted
from stored import data_file, replace_part
from tiny import random_adapter, tiny_lm


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
    net = ridge.network()
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
    with pytest.raises(InputError, match="carrying needs read, bias and write"):
        cv.link(*both()).carry({4: (one,)}, [LayerPair(4, 6)])
    with pytest.raises(InputError, match="scale=nan"):
        one.scaled(float("nan"))


def test_what_needs_matrices_says_that_there_are_none(tmp_path):
    one = carried(6)
    assert not {"read", "bias", "write"} & set(dir(one))
    adapter = Adapter({1: (one,)}, ModelRef("m", "r", 6, 4))
    with pytest.raises(InputError, match="affine fitter"):
        write_control_vector(adapter, tmp_path / "out.gguf")


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


def test_directions_written_through_a_map_are_those_pushed_where_it_is_affine():
    donor, recipient = both()
    ridge, one = Ridge()(donor.layer(4), recipient.layer(6)), adapter_of(4).interventions[4][0]
    states = donor.layer(4).double()
    pushed, through = written(ridge, one, states), written(ridge.network(), one, states)
    assert torch.cosine_similarity(pushed, through).min() > 1 - 1e-5


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
        ("interventions.0.kind", "affine", "interventions.0.carried: Extra"),
        ("interventions.0.kind", "kernel", "unknown kind 'kernel'"),
        ("interventions.1.kind", "carried", "interventions.1.carried: Field required"),
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
    name = "0.back.decode"
    tensors = load_file(data_file(saved[1]))
    value = tensors[name]
    changed = {
        "missing": {},
        "more": {name: value, "0.back.linear": value.clone()},
        "shape": {name: value[:, :5].contiguous()},
        "dtype": {name: value.half()},
        "nan": {name: value * float("nan")},
    }[change]
    del tensors[name]
    replace_part(saved[1], {**tensors, **changed})
    with pytest.raises(FormatError):
        cv.load_adapter(saved[1])
