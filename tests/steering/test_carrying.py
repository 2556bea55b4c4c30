"""Directions and probes of one tiny model, carried into another."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import commandv as cv
import tiny
from commandv.errors import InputError, MismatchError
from commandv.prompts.sets import PromptSet
from commandv.steering import prompt_states
from commandv.transfer.convert.linear import Dense
from contrasts import CONTRAST, cosines, prompts
from experiments.organisms.siblings import rotated

MANY = prompts("How do I {}?", 60)
TEXTS = PromptSet((*MANY.prompts, *prompts("Never, ever {}!", 60), *prompts("Why {}, then?", 60)), "texts")


@dataclasses.dataclass(frozen=True)
class Identity:
    """The fit of a model to itself."""

    name = "identity"

    def __call__(self, x, y, **_):
        return Dense(torch.eye(x.shape[1]), torch.zeros(x.shape[1], dtype=torch.float64))


@pytest.fixture(scope="module")
def siblings():
    donor = tiny.tiny_lm(seed=3)
    recipient = rotated(donor, 48)
    return donor, recipient, *(cv.profile(lm, TEXTS, cache=False, text=None) for lm in (donor, recipient))


def test_the_identity_carries_directions_and_probes_unchanged(siblings):
    lm, _, donor, _ = siblings
    found = cv.directions(lm, CONTRAST)
    for rescale in (None, "norm share"):
        carried = cv.carry_directions(found, cv.link(donor, donor, fit=Identity()), rescale=rescale)
        assert list(carried) == list(range(lm.n_layers))
        for layer, v in carried.items():
            torch.testing.assert_close(v, found[layer].float())
    probes = cv.probes(lm, CONTRAST, layers=[1, 3])
    for layer, one in cv.carry_probes(probes, cv.link(donor, donor, fit=Identity())).items():
        torch.testing.assert_close(one.weight, probes[layer].weight.float())
        assert one.bias == pytest.approx(probes[layer].bias, rel=1e-5)


def test_a_rotated_sibling_gets_its_native_directions(siblings):
    lm, sibling, donor, recipient = siblings
    native = cv.directions(sibling, CONTRAST)
    carried = cv.carry_directions(cv.directions(lm, CONTRAST), cv.link(donor, recipient))
    assert cosines(torch.stack([carried[n] for n in range(4)]), native).min() > 0.99


def test_the_norm_share_is_kept_whatever_the_fit_shrinks(siblings):
    lm, sibling, donor, recipient = siblings
    found = cv.directions(lm, CONTRAST)
    strong = cv.Ridge(strength=10.0)
    link = cv.link(donor, recipient, fit=strong)
    shrunk = cv.carry_directions(found, link)
    kept = cv.carry_directions(found, link, rescale="norm share")
    for layer in range(4):
        assert shrunk[layer].norm() < 0.9 * found[layer].norm()
        # A rotation keeps norms, so that the same share is the same length.
        assert float(kept[layer].norm()) == pytest.approx(float(found[layer].norm()), rel=0.02)
        assert cosines(kept[layer], shrunk[layer]) > 0.9999
    assert sibling.d_model == len(kept[0])


def test_an_ablation_carries_its_subspace(siblings):
    _, sibling, donor, recipient = siblings
    plane = {1: torch.randn(2, donor.d_model, generator=torch.Generator().manual_seed(0))}
    carried = cv.carry_directions(plane, cv.link(donor, recipient))
    assert carried[1].shape == (2, 48)
    (one,) = cv.from_directions(carried, sibling.ref, kind="ablate").interventions[1]
    torch.testing.assert_close(one.read @ one.read.T, torch.eye(2), atol=1e-5, rtol=0)
    h = torch.randn(5, 48)
    assert ((h + one.delta(h)) @ carried[1].T).abs().max() < 1e-4


def test_clamp_and_relative_strength_go_by_a_profile_after_carrying(siblings):
    lm, sibling, donor, recipient = siblings
    carried = cv.carry_directions(cv.directions(lm, CONTRAST), cv.link(donor, recipient), layers=[2])
    assert list(carried) == [2]
    for kind, relative in (("clamp", True), ("mean-ablate", False), ("add", True)):
        adapter = cv.from_directions(carried, sibling.ref, kind=kind, relative=relative, typical=recipient)
        with cv.attach(sibling, adapter):
            cv.generate(sibling, ["How do I drink tea?"], max_new_tokens=2)


def test_a_probe_reads_the_sibling_as_well_as_the_donor(siblings):
    lm, sibling, donor, recipient = siblings
    other = cv.Contrast(prompts("Why {}, then?", 40), prompts("Why {} again, then?", 40), paired=True)
    held_out = [prompts(pattern, 60)[40:] for pattern in ("Why {}, then?", "Why {} again, then?")]
    probes = cv.probes(lm, other, positions="l4", layers=[1, 2])
    carried = cv.carry_probes(probes, cv.link(donor, recipient))
    places = cv.Positions.parse("l4")
    there = [prompt_states(sibling, side, places) for side in held_out]
    here = [prompt_states(lm, side, places) for side in held_out]
    for layer in (1, 2):
        native = cv.auc(probes[layer], *(side[layer] for side in here))
        assert carried[layer].layer == layer
        assert cv.auc(carried[layer], *(side[layer] for side in there)) > native - 0.03


def test_a_probe_is_carried_by_the_rows_that_are_asked_for(siblings):
    lm, sibling, *_ = siblings
    donor, recipient = (cv.profile(one, MANY, text=TEXTS, places="words", cache=False) for one in (lm, sibling))
    ends = torch.from_numpy(recipient.keys[:, 1] < 0)
    noise = torch.randn(len(recipient), 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    blurred = dataclasses.replace(
        recipient,
        activations={n: torch.where(ends[:, None], noise, rows) for n, rows in recipient.activations.items()},
    )
    probes = cv.probes(lm, CONTRAST, layers=[2])
    by_words, as_before = (
        cv.carry_probes(probes, cv.link(donor, one, read_rows="text"))[2].weight for one in (recipient, blurred)
    )
    torch.testing.assert_close(by_words, as_before)
    by_ends, changed = (cv.carry_probes(probes, cv.link(donor, one))[2].weight for one in (recipient, blurred))
    assert cosines(by_ends, changed) < 0.9


def test_of_donor_layers_that_meet_one_is_taken(siblings):
    _, _, donor, _ = siblings
    shallow = cv.profile(tiny.tiny_lm(seed=5, num_hidden_layers=2, id="shallow"), TEXTS, cache=False, text=None)
    vectors = torch.eye(donor.d_model)[:4]
    carried = cv.carry_directions(vectors, cv.link(donor, shallow))
    assert list(carried) == [0, 1]
    only = cv.carry_directions({0: vectors[0], 2: vectors[2]}, cv.link(donor, shallow))
    for layer in carried:
        torch.testing.assert_close(carried[layer], only[layer])


def test_what_cannot_be_carried_is_refused(siblings):
    lm, _, donor, recipient = siblings
    v, link = {3: torch.ones(donor.d_model)}, cv.link(donor, recipient)
    with pytest.raises(InputError, match="none is matched"):
        cv.carry_directions(v, link, layers=[0])
    with pytest.raises(InputError, match="has no length to keep"):
        cv.carry_directions({3: torch.zeros(donor.d_model)}, link, rescale="norm share")
    with pytest.raises(InputError, match="expected one of 'norm share'"):
        cv.carry_directions(v, link, rescale="twice")
    with pytest.raises(MismatchError):
        cv.link(donor, cv.profile(lm, MANY, cache=False, text=None))
