"""The controls beside every claim: what else could have produced the effect, made from the same material."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from commandv.adapter import Adapter, Intervention, steering_vector
from commandv.attaching import attach
from commandv.convert import FactorStore, Fitter, Pinv, Ridge
from commandv.errors import InputError
from commandv.generation import generate
from commandv.match import LayerChoice, Matcher, all_layers, nearest, proportional
from commandv.models import LM
from commandv.pasting import paste, random_like
from commandv.positions import Positions
from commandv.profiles import END, Profile
from commandv.prompts import Prompt, PromptSet
from commandv.steering import mean_states

BRIDGE_PROMPTS = 64  # profile prompts that the donor answers for the text bridge
BRIDGE_TOKENS = 16  # of each answer
BRIDGE_POSITIONS = Positions(generated=8)  # tokens of the answers whose states are compared


@dataclass(frozen=True)
class Material:
    """What the arms of one comparison are made of.

    Attributes:
        adapter: the donor's.
        donor: profile of the donor.
        recipient: profile of the recipient, over the same prompts.
        donor_lm: the donor itself; for the text bridge.
        recipient_lm: the recipient itself; for the text bridge.
        prompts: task-agnostic prompts, those of the profiles; for the text bridge.
        direct: an adapter that was trained on the recipient, or None when there is none to compare with.
        fit: of the pasted arm.
        match: of the pasted arm.
        layers: of the pasted arm, and of the controls that mirror it.
        published_layers: of the published method.
        seed: of random controls.
        store: keeps factorisations, and what the text bridge read, for all arms.
    """

    adapter: Adapter
    donor: Profile
    recipient: Profile
    donor_lm: LM
    recipient_lm: LM
    prompts: PromptSet
    direct: Adapter | None = None
    fit: Fitter = Ridge()
    match: Matcher = proportional
    layers: LayerChoice | str = "last_third"
    published_layers: LayerChoice | str = all_layers
    seed: int = 0
    store: FactorStore | None = None


def pasted(material: Material) -> Adapter:
    """Return the adapter as pasted; every control is made to be like it but for one thing."""
    return _paste(material)


def published(material: Material) -> Adapter:
    """Return the adapter pasted as published: pseudo-inverse, nearest layers, last-token rows, nothing held out."""
    return paste(
        material.adapter, material.donor, material.recipient, fit=Pinv(), match=nearest,
        layers=material.published_layers, write_rows="end", holdout=0, store=material.store,
    )  # fmt: skip


def random(material: Material) -> Adapter:
    """Return a control whose deltas have the pasted adapter's norm on every state, in random directions."""
    return random_like(_paste(material), material.seed)


def shuffled(material: Material) -> Adapter:
    """Return the adapter pasted through converters that were fitted on wrongly paired prompts."""
    return _paste(material, shuffle=material.seed)


def mean_ablation(material: Material) -> Adapter:
    """Return a control that replaces the state by its mean over the profile's last-token rows: h + (mean - h).

    It acts at the pasted adapter's layers and positions, and tells what destroying what is there does.
    """
    like, profile = _paste(material), material.recipient
    ends = torch.from_numpy(profile.keys[:, 1] == END)
    identity = torch.eye(profile.d_model)

    def replaced(layer: int) -> tuple[Intervention, ...]:
        mean = profile.layer(layer)[ends].double().mean(0).float()
        return (Intervention(identity, -mean, -identity, positions=_positions(like, layer)),)

    interventions = {layer: replaced(layer) for layer in like.layers}
    return Adapter(interventions, like.model, f"mean ablation where {like.name} acts")


def text_bridge(material: Material) -> Adapter:
    """Return what the donor's *texts* alone can carry: a steering vector native to the recipient.

    The donor answers task-agnostic prompts with and without its adapter; the recipient reads both; the difference of
    its mean states over the first tokens of the answers is added where the pasted adapter acts. Carrying activations
    is worth its while only where it beats this.
    """
    like = _paste(material)
    # The texts do not depend on layers, so that one pair of readings serves every setting that is tried.
    kept = material.store or FactorStore()
    difference = kept.get(("text bridge", material.adapter), lambda: _text_difference(material))
    interventions = {
        layer: tuple(replace(one, positions=_positions(like, layer)) for one in steering_vector(difference[layer]))
        for layer in like.layers
    }
    return Adapter(interventions, like.model, f"text bridge for {like.name}")


def _text_difference(material: Material) -> Tensor:
    """Return the mean state over the donor's answers with its adapter minus without, in the recipient."""
    prompts = material.prompts[:BRIDGE_PROMPTS]

    def answered() -> PromptSet:
        answers = generate(material.donor_lm, prompts, max_new_tokens=BRIDGE_TOKENS, batch_size=BRIDGE_PROMPTS)
        pairs = (Prompt(one, answer) for one, answer in zip(prompts.texts, answers, strict=True) if answer.strip())
        return PromptSet(tuple(pairs), "answers of the donor")

    without = answered()
    with attach(material.donor_lm, material.adapter):
        with_it = answered()
    states = [mean_states(material.recipient_lm, texts, BRIDGE_POSITIONS) for texts in (with_it, without)]
    return (states[0] - states[1]).float()


def direct(material: Material) -> Adapter:
    """Return the adapter that was trained on the recipient itself.

    Raises:
        InputError: there is none.
    """
    if material.direct is None:
        raise InputError("no adapter trained on the recipient is given; give one, or leave the direct arm out")
    return material.direct


def _paste(material: Material, shuffle: int | None = None) -> Adapter:
    return paste(
        material.adapter, material.donor, material.recipient, fit=material.fit, match=material.match,
        layers=material.layers, shuffle=shuffle, store=material.store,
    )  # fmt: skip


def _positions(adapter: Adapter, layer: int) -> Positions:
    return adapter.interventions[layer][0].positions


Maker = Callable[[Material], Adapter]

PASTED = "pasted"
CONTROLS: dict[str, Maker] = {
    "pinv": published,
    "random": random,
    "shuffled": shuffled,
    "mean-ablation": mean_ablation,
    "text-bridge": text_bridge,
    "direct": direct,
}
ARMS: dict[str, Maker] = {PASTED: pasted, **CONTROLS}


def arms_without(left_out: Collection[str]) -> dict[str, Maker]:
    """Return the arms but for the controls that are left out by name.

    Raises:
        InputError: a name that is no control.
    """
    unknown = set(left_out) - set(CONTROLS)
    if unknown:
        raise InputError(f"controls {sorted(unknown)} are unknown; expected some of {', '.join(CONTROLS)}")
    return {name: make for name, make in ARMS.items() if name not in left_out}
