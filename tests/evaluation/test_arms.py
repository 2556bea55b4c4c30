"""Arms on tiny models: contracts over every entry of the table, and what single ones must do."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

import commandv as cv
import tiny
from commandv.errors import InputError
from commandv.evaluation import arms
from commandv.evaluation.arms import ARMS, arms_without, make_arm
from commandv.evaluation.material import DirectionMaterial, Material
from commandv.evaluation.tuning import Setting
from commandv.models.encoding import encode
from commandv.profiles.profile import END
from commandv.prompts.sets import Prompt, PromptSet
from commandv.steering import mean_states, states

PROMPTS = PromptSet(tuple(Prompt(f"What is {n} and {m}?") for n in range(8) for m in range(5)), "sums")
PASSAGES = PromptSet(tuple(Prompt(f"Say {n}", "The river runs\nand the fox sleeps.") for n in range(3)), "passages")


@pytest.fixture(scope="module")
def material():
    donor, recipient = tiny.tiny_lm(seed=1, id="donor"), tiny.tiny_lm("gpt_neox", seed=2, id="recipient")
    profiles = [cv.profile(lm, PROMPTS, text=PASSAGES, cache=False) for lm in (donor, recipient)]
    return Material(
        adapter=tiny.random_adapter(donor, layers=(0, 1, 2, 3), seed=3),
        link=cv.link(*profiles),
        donor_lm=donor,
        recipient_lm=recipient,
        prompts=PROMPTS,
        asked=PROMPTS[:12],
        direct=tiny.random_adapter(recipient, layers=(2,), seed=4),
        setting=Setting("last_half"),
        seed=5,
    )


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Training on the donor's answers in one quick epoch; random models' answers may loop."""
    monkeypatch.setattr(arms, "PRACTICE_SETTINGS", cv.TrainSettings(epochs=1, max_response=3, batch_size=4))
    monkeypatch.setattr("commandv.evaluation.material.ANSWER_TOKENS", 4)
    monkeypatch.setattr("commandv.transfer.distil.demonstrate.loops", lambda text: False)


# -- the table: every entry -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_answers(material, name):
    made = make_arm(name, material)
    assert made.adapter is None or not made.turns
    with attached(material, made):
        answers = cv.generate(material.recipient_lm, ["What is tea?"], max_new_tokens=2, turns=made.turns)
    assert len(answers) == 1
    assert made.cost.seconds >= 0
    assert bool(made.turns) == (made.cost.tokens > 0)
    assert bool(made.cost.epochs) == (name == "donor-answers")
    assert ARMS[name].about


def attached(material, made):
    if made.adapter is None:
        return contextlib.nullcontext()
    made.adapter.model.require(material.recipient_lm.ref, "made")
    return cv.attach(material.recipient_lm, made.adapter)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_says_what_it_needs(material, name):
    for need in ARMS[name].needs:
        with pytest.raises(InputError, match=f"arm {name} needs {need}.*leave {name} out"):
            make_arm(name, dataclasses.replace(material, **{need: None}))


def test_unknown_arms_are_refused(material):
    with pytest.raises(InputError, match="expected one of unmodified, pasted"):
        make_arm("luck", material)


# -- single arms ------------------------------------------------------------------------------------------------------


def adapter(name, material):
    return make_arm(name, material).adapter


MIRRORS = ["random", "random-in-span", "shuffled", "mean-ablation", "text-bridge"]


@pytest.mark.parametrize("name", MIRRORS)
def test_controls_act_where_the_pasted_adapter_acts(material, name):
    pasted, made = adapter("pasted", material), adapter(name, material)
    assert made.layers == pasted.layers
    for layer in pasted.layers:
        here, there = made.interventions[layer], pasted.interventions[layer]
        assert {one.positions for one in here} == {one.positions for one in there}


@pytest.mark.parametrize("name", ["published", "random", "random-in-span", "shuffled"])
def test_controls_differ_from_the_pasted_adapter(material, name):
    pasted = adapter("pasted", material).interventions[3][0]
    assert not torch.allclose(adapter(name, material).interventions[3][0].write, pasted.write)


def test_as_published_means_one_thing_whatever_the_setting(material):
    """Pseudo-inverse, last-token rows, nothing held out, the nearest layers, all of them."""
    donor, recipient = material.link.donor, material.link.recipient
    expected = cv.paste(
        material.adapter, donor, recipient, fit=cv.Pinv(), match=cv.nearest, layers=cv.all_layers, write_rows="end",
        holdout=0,
    )  # fmt: skip
    odd = dataclasses.replace(
        material, setting=Setting("last_third", 0.5, "both"), link=cv.link(donor, recipient, holdout=0.3)
    )
    for made in (
        adapter("published", material),
        adapter("published", odd),
        cv.published(material.adapter, donor, recipient),
    ):
        assert made.layers == expected.layers == [0, 1, 2, 3]
        for layer in made.layers:
            torch.testing.assert_close(made.interventions[layer][0].write, expected.interventions[layer][0].write)
            torch.testing.assert_close(made.interventions[layer][0].read, expected.interventions[layer][0].read)


@pytest.mark.parametrize("name", ["random", "random-in-span"])
def test_random_arms_keep_the_norm_on_every_state(material, name):
    pasted, made = adapter("pasted", material), adapter(name, material)
    h = torch.randn(7, material.recipient_lm.d_model)
    for layer in pasted.layers:
        ours, theirs = (sum(one.delta(h) for one in a.interventions[layer]) for a in (made, pasted))
        torch.testing.assert_close(ours.norm(dim=1), theirs.norm(dim=1), rtol=1e-3, atol=1e-5)


def test_random_in_span_writes_only_what_the_recipients_activations_vary_in(material):
    flat = material.link.recipient.first(5)  # five prompts and their texts span less than the whole
    pasted = adapter("pasted", material)
    made = cv.random_like(pasted, 0, within=flat)
    rows = flat.layer(3).double()
    rows = rows - rows.mean(0)
    _, s, v = torch.linalg.svd(rows, full_matrices=False)
    inside = v[s > 1e-6 * s[0]]
    written = made.interventions[3][0].write.double()
    torch.testing.assert_close(written @ inside.T @ inside, written, rtol=1e-4, atol=1e-6)


def test_the_strength_of_rows_goes_into_the_link(material):
    rows = dataclasses.replace(material, setting=Setting("last_half", 1.0, "end"))
    assert rows.linked().write_rows == "end"
    assert not torch.allclose(rows.pasted().interventions[3][0].write, material.pasted().interventions[3][0].write)


def test_few_shot_shows_the_donors_answers_and_costs_tokens(material):
    made = make_arm("few-shot", material)
    with cv.attach(material.donor_lm, material.adapter):
        told = dict(zip(PROMPTS.texts, cv.generate(material.donor_lm, PROMPTS, max_new_tokens=4), strict=True))
    assert len(made.turns) == arms.DEMONSTRATIONS
    assert all(told[asked] == answer for asked, answer in made.turns)
    lm = material.recipient_lm
    longer = len(encode(lm, PROMPTS.texts[0], turns=made.turns).ids) - len(encode(lm, PROMPTS.texts[0]).ids)
    assert made.cost.tokens == pytest.approx(longer, abs=1)


def test_the_donor_answers_once_for_all_arms_that_learn_from_it(material, monkeypatch):
    asked = []
    original = cv.generate
    fresh = dataclasses.replace(material, link=cv.link(material.link.donor, material.link.recipient))
    monkeypatch.setattr(
        "commandv.transfer.distil.demonstrate.generate",
        lambda *args, **options: asked.append(1) or original(*args, **options),
    )
    make_arm("few-shot", fresh)
    make_arm("donor-answers", dataclasses.replace(fresh, setting=Setting("all_layers")))
    assert len(asked) == 1


def test_without_a_link_the_adapter_is_the_recipients_own(lm):
    own = tiny.random_adapter(lm, layers=(1,))
    material = Material(adapter=own, recipient_lm=lm)
    assert make_arm("pasted", material).adapter is own
    assert make_arm("random", material).adapter.layers == [1]
    with pytest.raises(InputError, match="needs link"):
        make_arm("published", material)


def test_mean_ablation_leaves_the_mean_whatever_was_there(material):
    one = adapter("mean-ablation", material).interventions[3][0]
    h = torch.randn(5, material.recipient_lm.d_model)
    profile = material.link.recipient
    ends = torch.from_numpy(profile.keys[:, 1] == END)
    mean = profile.layer(3)[ends].float().mean(0)
    torch.testing.assert_close(h + one.delta(h), mean.expand(5, -1), atol=1e-5, rtol=1e-5)


def test_text_bridge_of_an_adapter_that_does_nothing_is_nothing(material):
    bridge = adapter("text-bridge", dataclasses.replace(material, adapter=material.adapter.scaled(0.0)))
    assert all(not one.write.any() for many in bridge.interventions.values() for one in many)


def test_text_bridge_reads_the_texts_once_for_all_settings(material, monkeypatch):
    asked = []
    original = arms.generate
    monkeypatch.setattr(arms, "generate", lambda *args, **options: asked.append(1) or original(*args, **options))
    fresh = dataclasses.replace(material, link=cv.link(material.link.donor, material.link.recipient))
    made = [
        adapter("text-bridge", dataclasses.replace(fresh, setting=Setting(layers)))
        for layers in ("last_half", "all_layers")
    ]
    assert len(asked) == 2  # without the adapter and with it
    assert torch.equal(made[0].interventions[3][0].write, made[1].interventions[3][0].write)


def test_of_a_few_answers_none_is_held_out_and_the_usual_rate_is_taken(material):
    few = PromptSet(tuple(Prompt(one, "Say yes.") for one in PROMPTS.texts[:2]), "few")
    made = arms.practised(material.recipient_lm, few, seed=0, name="few")
    assert made.provenance["held_out_loss"] == []
    assert made.provenance["settings"]["learning_rate"] == cv.TrainSettings().learning_rate


def test_arms_are_left_out_only_by_name():
    assert set(arms_without(["published"])) == set(ARMS) - {"published"}
    for name in ("pasted", "unmodified", "luck"):
        with pytest.raises(InputError, match=f"'{name}'"):
            arms_without([name])


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


# -- directions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["add", "ablate"])
def directed(request, material):
    """Material of directions: two layers of the recipient, each with the donor's own and the recipient's own."""
    donor, recipient = material.link.donor, material.link.recipient
    drawn = torch.Generator().manual_seed(0)
    ours = torch.randn(donor.n_layers, donor.d_model, generator=drawn, dtype=torch.float64)
    native = torch.randn(recipient.n_layers, recipient.d_model, generator=drawn, dtype=torch.float64)
    given = {field.name: getattr(material, field.name) for field in dataclasses.fields(material)}
    del given["match"]
    return DirectionMaterial(**given, directions=ours, native=native, kind=request.param, strength=-1.0)


def span(one) -> torch.Tensor:
    return torch.nn.functional.normalize(one.write[0], dim=0)


@pytest.mark.parametrize("name", ["pasted", "published", "random", "random-in-span", "shuffled", "mean-ablation"])
def test_every_arm_applies_one_direction_per_layer_in_the_same_way(directed, name):
    made, pasted = adapter(name, directed), adapter("pasted", directed)
    made.model.require(directed.recipient_lm.ref, name)
    assert set(made.layers) >= set(pasted.layers)
    for layer in pasted.layers:
        (one,), (like,) = made.interventions[layer], pasted.interventions[layer]
        assert one.rank == 1
        assert one.positions.everywhere
        if name in ("random", "random-in-span", "shuffled"):
            assert abs(float(span(one) @ span(like))) < 0.95
        if name.startswith("random"):
            torch.testing.assert_close(one.write.norm(), like.write.norm())
        if name == "mean-ablation":
            assert abs(float(span(one) @ span(like))) > 0.999
            assert one.read.any()


def test_fidelity_of_directions_compares_them_with_the_recipients_own(directed):
    rows = directed.fidelity()
    assert [row["recipient"] for row in rows] == adapter("pasted", directed).layers
    assert all(abs(row["native_cosine"]) <= 1 for row in rows)
    same = dataclasses.replace(directed, native=_as_native(directed))
    assert all(row["native_cosine"] > 0.9999 for row in same.fidelity())


def _as_native(directed) -> torch.Tensor:
    """Return the carried directions as if they were the recipient's own."""
    found = torch.ones_like(directed.native)
    for layer, (one,) in adapter(
        "pasted", dataclasses.replace(directed, kind="add", strength=1.0)
    ).interventions.items():
        found[layer] = one.write[0]
    return found
