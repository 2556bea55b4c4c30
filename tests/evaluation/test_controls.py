"""Controls and calibration on tiny models."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import commandv as cv
import tiny
from commandv.errors import InputError
from commandv.evaluation import ByText, Task, controls
from commandv.evaluation.calibration import calibrate
from commandv.evaluation.controls import ARMS, CONTROLS, arms_without
from commandv.evaluation.material import DirectionMaterial, Material
from commandv.profiles.profile import END
from commandv.prompts.sets import Prompt, PromptSet
from commandv.steering import mean_states, states
from commandv.transfer.convert.kept import Kept

PROMPTS = PromptSet(tuple(Prompt(f"What is {n} and {m}?") for n in range(8) for m in range(5)), "sums")
PASSAGES = PromptSet(tuple(Prompt(f"Say {n}", "The river runs\nand the fox sleeps.") for n in range(3)), "passages")


@pytest.fixture(scope="module")
def material():
    donor, recipient = tiny.tiny_lm(seed=1, id="donor"), tiny.tiny_lm("gpt_neox", seed=2, id="recipient")
    profiles = [cv.profile(lm, PROMPTS, text=PASSAGES, cache=False) for lm in (donor, recipient)]
    adapter = tiny.random_adapter(donor, layers=(0, 1, 2, 3), seed=3)
    direct = tiny.random_adapter(recipient, layers=(2,), seed=4)
    return Material(
        adapter=adapter,
        donor=profiles[0],
        recipient=profiles[1],
        donor_lm=donor,
        recipient_lm=recipient,
        prompts=PROMPTS,
        direct=direct,
        layers="last_half",
        seed=5,
    )


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_an_adapter_of_the_recipient(material, name):
    made = ARMS[name](material)
    made.model.require(material.recipient.model, name)
    with cv.attach(material.recipient_lm, made):
        cv.generate(material.recipient_lm, ["What is tea?"], max_new_tokens=2)


@pytest.mark.parametrize("name", [name for name in ARMS if name not in ("pinv", "direct")])
def test_controls_act_where_the_pasted_adapter_acts(material, name):
    pasted, made = ARMS["pasted"](material), ARMS[name](material)
    assert made.layers == pasted.layers
    for layer in pasted.layers:
        here, there = made.interventions[layer], pasted.interventions[layer]
        assert {one.positions for one in here} == {one.positions for one in there}


def test_controls_differ_from_the_pasted_adapter(material):
    pasted = ARMS["pasted"](material).interventions[3][0]
    for name in set(CONTROLS) - {"direct", "mean-ablation", "text-bridge"}:
        assert not torch.allclose(ARMS[name](material).interventions[3][0].write, pasted.write)


def test_mean_ablation_leaves_the_mean_whatever_was_there(material):
    one = ARMS["mean-ablation"](material).interventions[3][0]
    h = torch.randn(5, material.recipient.d_model)
    ends = torch.from_numpy(material.recipient.keys[:, 1] == END)
    mean = material.recipient.layer(3)[ends].float().mean(0)
    torch.testing.assert_close(h + one.delta(h), mean.expand(5, -1), atol=1e-5, rtol=1e-5)


def test_text_bridge_of_an_adapter_that_does_nothing_is_nothing(material):
    idle = material.adapter.scaled(0.0)
    bridge = ARMS["text-bridge"](dataclasses.replace(material, adapter=idle))
    assert all(not one.write.any() for many in bridge.interventions.values() for one in many)


def test_text_bridge_reads_the_texts_once_for_all_settings(material, monkeypatch):
    asked = []
    original = controls.generate
    monkeypatch.setattr(controls, "generate", lambda *args, **options: asked.append(1) or original(*args, **options))
    shared = dataclasses.replace(material, kept=Kept())
    made = [ARMS["text-bridge"](dataclasses.replace(shared, layers=layers)) for layers in ("last_half", "all_layers")]
    assert len(asked) == 2  # without the adapter and with it
    assert torch.equal(made[0].interventions[3][0].write, made[1].interventions[3][0].write)


def test_direct_needs_an_adapter(material):
    with pytest.raises(InputError, match="leave the direct arm out"):
        ARMS["direct"](dataclasses.replace(material, direct=None))


def test_controls_are_left_out_only_by_name():
    assert set(arms_without(["pinv"])) == set(ARMS) - {"pinv"}
    with pytest.raises(InputError, match="'pasted'"):
        arms_without(["pasted"])


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["l1", "f2+l2", "g3", "all"])
def test_mean_states_are_those_of_each_prompt_alone(positions):
    lm, where = tiny.tiny_lm(), cv.Positions.parse(positions)
    prompts = PromptSet(tuple(Prompt("tea " * n, "Boil water " * n) for n in (1, 3, 6)))
    alone = [mean_states(lm, PromptSet((one,)), where) for one in prompts]
    counts = [sum(len(owners) for owners, _ in states(lm, PromptSet((one,)), where)) for one in prompts]
    weighted = sum(n * one for n, one in zip(counts, alone, strict=True)) / sum(counts)
    torch.testing.assert_close(mean_states(lm, prompts, where, batch_size=3), weighted, atol=2e-2, rtol=2e-2)


def test_reply_positions_without_replies_are_refused(lm):
    with pytest.raises(InputError, match="needs prompts with replies"):
        mean_states(lm, PROMPTS[:2], cv.Positions.parse("g2"))


# -- calibration ------------------------------------------------------------------------------------------------------


@pytest.fixture
def loud(lm):
    """A task whose judge counts the answer's characters, and an adapter that changes answers."""
    judge = ByText("length", len, "characters")  # type: ignore[arg-type]
    task = Task("length", PROMPTS[:6], PROMPTS[6:12], judge, max_new_tokens=4)
    return lm, task, tiny.random_adapter(lm, layers=(1, 2), size=3.0)


def test_calibration_never_reads_the_test_split(loud, monkeypatch):
    lm, task, adapter = loud
    monkeypatch.setattr(Task, "prompts", lambda self, split: self.dev if split == "dev" else pytest.fail("test split"))
    calibrate(lm, task, lambda layers: adapter, scales=(1.0,), passages=PASSAGES)


def test_calibration_takes_the_best_within_the_budget(loud):
    lm, task, adapter = loud
    free = calibrate(lm, task, lambda layers: adapter, scales=(0.25, 1.0, 2.0), passages=PASSAGES)
    assert [one.scale for one in free.tried] == [0.25, 1.0, 2.0]
    assert free.chosen.value == max(one.value for one in free.tried)
    assert [one.kl for one in free.tried] == sorted(one.kl for one in free.tried)
    budget = (free.tried[0].kl + free.tried[1].kl) / 2
    tight = calibrate(lm, task, lambda layers: adapter, scales=(0.25, 1.0, 2.0), budget=budget, passages=PASSAGES)
    assert tight.chosen.scale == 0.25
    assert tight.within_budget
    broke = calibrate(lm, task, lambda layers: adapter, scales=(1.0, 2.0), budget=1e-9, passages=PASSAGES)
    assert broke.chosen.scale == 1.0
    assert not broke.within_budget


def test_less_is_success_where_the_task_says_so(loud):
    lm, task, adapter = loud
    fewer = dataclasses.replace(task, success="less")
    found = calibrate(lm, fewer, lambda layers: adapter, scales=(0.25, 1.0, 2.0), passages=PASSAGES)
    assert found.chosen.value == min(one.value for one in found.tried)


# -- directions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["add", "ablate"])
def directed(request, material):
    """Material of directions: two layers of the recipient, each with the donor's own and the recipient's own."""
    donor, recipient = material.donor, material.recipient
    drawn = torch.Generator().manual_seed(0)
    ours = torch.randn(donor.n_layers, donor.d_model, generator=drawn, dtype=torch.float64)
    native = torch.randn(recipient.n_layers, recipient.d_model, generator=drawn, dtype=torch.float64)
    given = {field.name: getattr(material, field.name) for field in dataclasses.fields(material)}
    for name in ("match", "published_match"):
        del given[name]
    return DirectionMaterial(**given, directions=ours, native=native, kind=request.param, strength=-1.0)


def span(one) -> torch.Tensor:
    return torch.nn.functional.normalize(one.write[0], dim=0)


@pytest.mark.parametrize("name", [name for name in ARMS if name != "text-bridge"])
def test_every_arm_applies_one_direction_per_layer_in_the_same_way(directed, name):
    made, pasted = ARMS[name](directed), ARMS["pasted"](directed)
    made.model.require(directed.recipient.model, name)
    assert set(made.layers) >= set(pasted.layers)
    for layer in pasted.layers:
        (one,), (like,) = made.interventions[layer], pasted.interventions[layer]
        assert one.rank == 1
        assert one.positions.everywhere
        if name in ("random", "shuffled"):
            assert abs(float(span(one) @ span(like))) < 0.95
        if name == "random":
            torch.testing.assert_close(one.write.norm(), like.write.norm())
        if name == "mean-ablation":
            assert abs(float(span(one) @ span(like))) > 0.999
            assert one.read.any()


def test_the_own_arm_has_the_recipients_directions(directed):
    for layer, (one,) in ARMS["direct"](directed).interventions.items():
        expected = torch.nn.functional.normalize(directed.native[layer].float(), dim=0)
        assert abs(float(span(one) @ expected)) > 0.9999
    rows = directed.fidelity()
    assert [row["recipient"] for row in rows] == ARMS["pasted"](directed).layers
    assert all(abs(row["native_cosine"]) <= 1 for row in rows)
    same = dataclasses.replace(directed, native=_as_native(directed))
    assert all(row["native_cosine"] > 0.9999 for row in same.fidelity())


def _as_native(directed) -> torch.Tensor:
    """Return the carried directions as if they were the recipient's own."""
    found = torch.ones_like(directed.native)
    for layer, (one,) in ARMS["pasted"](dataclasses.replace(directed, kind="add", strength=1.0)).interventions.items():
        found[layer] = one.write[0]
    return found
