"""The controls beside every claim: what else could have produced the effect, made from the same material."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from operator import methodcaller

from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.adapters.kinds import steering_vector
from commandv.errors import InputError
from commandv.evaluation.material import Material
from commandv.models.generation import generate
from commandv.positions import Positions
from commandv.prompts.sets import Prompt, PromptSet
from commandv.steering import mean_states
from commandv.transfer.convert import Pinv

BRIDGE_PROMPTS = 64  # profile prompts that the donor answers for the text bridge
BRIDGE_TOKENS = 16  # of each answer
BRIDGE_POSITIONS = Positions(generated=8)  # tokens of the answers whose states are compared


def published(material: Material) -> Adapter:
    """Return the adapter pasted as published: pseudo-inverse, nearest layers, last-token rows, nothing held out."""
    return material.pasted(
        fit=Pinv(), match=material.published_match, layers=material.published_layers, write_rows="end", holdout=0
    )


def shuffled(material: Material) -> Adapter:
    """Return the adapter pasted through converters that were fitted on wrongly paired prompts."""
    return material.pasted(shuffle=material.seed)


def text_bridge(material: Material) -> Adapter:
    """Return what the donor's *texts* alone can carry: a steering vector native to the recipient.

    The donor answers task-agnostic prompts with and without its adapter; the recipient reads both; the difference of
    its mean states over the first tokens of the answers is added where the pasted adapter acts. Carrying activations
    is worth its while only where it beats this.
    """
    like = material.pasted()
    # The texts do not depend on layers, so that one pair of readings serves every setting that is tried.
    difference = material.kept.get(("text bridge", material.adapter), lambda: _text_difference(material))
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


def _positions(adapter: Adapter, layer: int) -> Positions:
    return adapter.interventions[layer][0].positions


Maker = Callable[[Material], Adapter]

PASTED = "pasted"
CONTROLS: dict[str, Maker] = {
    "pinv": published,
    "random": methodcaller("random"),
    "shuffled": shuffled,
    "mean-ablation": methodcaller("mean_ablation"),
    "text-bridge": text_bridge,
    "direct": methodcaller("own"),
}
ARMS: dict[str, Maker] = {PASTED: methodcaller("pasted"), **CONTROLS}


def arms_without(left_out: Collection[str]) -> dict[str, Maker]:
    """Return the arms but for the controls that are left out by name.

    Raises:
        InputError: a name that is no control.
    """
    unknown = set(left_out) - set(CONTROLS)
    if unknown:
        raise InputError(f"controls {sorted(unknown)} are unknown; expected some of {', '.join(CONTROLS)}")
    return {name: make for name, make in ARMS.items() if name not in left_out}
