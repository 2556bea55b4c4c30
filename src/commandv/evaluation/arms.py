"""Arms: the ways of answering that a comparison sets beside each other, each defined here and nowhere else.

A claim has to beat the strongest arm that costs as little. So an arm says how it is made from one `Material`, what it
needs of it, what it costs to make and at every request, and whether its strength is chosen on development prompts.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import random
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.adapters.kinds import steering_vector
from commandv.arguments import checked
from commandv.errors import InputError, require_known
from commandv.evaluation.material import ANSWER_TOKENS, Material
from commandv.models.encoding import Turns, encode
from commandv.models.generation import generate
from commandv.models.lm import LM
from commandv.positions import Positions
from commandv.prompts.sets import Prompt, PromptSet
from commandv.steering import mean_states
from commandv.training.train import DiReFT, TrainSettings, train
from commandv.transfer.distil.distil import distil

BRIDGE_PROMPTS = 64  # profile prompts that the donor answers for the text bridge
BRIDGE_TOKENS = 16  # of each answer
BRIDGE_POSITIONS = Positions(generated=8)  # tokens of the answers whose states are compared
DEMONSTRATIONS = 4  # answers of the donor in the few-shot prompt
# What a practitioner would do with the donor's answers: a ReFT that acts along the whole answer.
PRACTICE = DiReFT(rank=8, layers="last_half", positions=f"l1+g{ANSWER_TOKENS}")
PRACTICE_SETTINGS = TrainSettings(epochs=3, max_response=ANSWER_TOKENS)
PRACTICE_RATES, TRIED = (4e-3, 1e-3, 2.5e-4), 64  # one rate does not suit all models; answers on which they are tried

log = logging.getLogger(__name__)

UNMODIFIED, PASTED, DIRECT, RANDOM = "unmodified", "pasted", "direct", "random"
IN_SPAN, SHUFFLED, FEW_SHOT = "random-in-span", "shuffled", "few-shot"
AUTO = "auto"


class Cost(NamedTuple):
    """What it took to make an arm, and takes to use it.

    Attributes:
        seconds: wall clock of making it, from profiles and adapters that are there.
        tokens: that it adds to every request.
        memory: peak of the process while it was made, in bytes (of the accelerator where there is one); None where
            the system does not tell.
        epochs: of training; 0 where nothing was trained.
    """

    seconds: float = 0.0
    tokens: float = 0.0
    memory: int | None = None
    epochs: int = 0


@dataclass(frozen=True, eq=False)
class Made:
    """An arm that is ready to answer: the recipient with an adapter, after earlier turns, or as it is."""

    adapter: Adapter | None = None
    turns: Turns = ()
    cost: Cost = Cost()


@dataclass(frozen=True)
class Arm:
    """One way of answering.

    Attributes:
        make: makes it from a comparison's material, at the layers of its setting.
        about: what it is, for tables.
        by: what a behaviour is carried by, for an arm that is a method of carrying; empty for all others.
        needs: attributes of `Material` that may be missing and are needed.
        strength: `"tuned"`: its scale and layers are chosen on development prompts; `"mirrored"`: those of the pasted
            arm; `"full"`: it has none to choose.
        epochs: of training that making it takes.
    """

    make: Callable[[Material], Adapter | list[tuple[str, str]] | None]
    about: str
    by: str = ""
    needs: frozenset[str] = field(default=frozenset())
    strength: Literal["tuned", "mirrored", "full"] = "full"
    epochs: int = 0


@checked
def make_arm(name: str, material: Material) -> Made:
    """Make an arm, and tell what that took.

    Raises:
        InputError: an unknown name, or the material lacks what the arm needs.
    """
    require_known("arm", name, ARMS)
    arm = ARMS[name]
    if lacking := material.lacks(arm.needs):
        raise InputError(
            f"arm {name} needs {', '.join(lacking)}, which the comparison lacks; give it, or leave {name} out"
        )
    began = time.monotonic()
    with _memory(material.recipient_lm) as peak:
        made = arm.make(material)
    cost = Cost(round(time.monotonic() - began, 2), memory=peak(), epochs=arm.epochs)
    if made is None or isinstance(made, Adapter):
        return Made(made, cost=cost)
    return Made(turns=tuple(made), cost=cost._replace(tokens=_added(material, made)))


def arms_without(left_out: Collection[str]) -> dict[str, Arm]:
    """Return the arms but for those that are left out by name."""
    if wrong := [name for name in left_out if name not in ARMS or name in (UNMODIFIED, PASTED)]:
        others = ", ".join(name for name in ARMS if name not in (UNMODIFIED, PASTED))
        raise InputError(f"arms {wrong} cannot be left out; expected some of {others}")
    return {name: arm for name, arm in ARMS.items() if name not in left_out}


def methods(by: str) -> list[str]:
    """Return the arms that are the methods named, in the order of the table.

    `by` is `"auto"` for all that need no training, or one or several of `METHODS`, separated by commas.
    """
    wanted = [one.strip() for one in by.split(",")]
    if unknown := [one for one in wanted if one != AUTO and one not in METHODS]:
        raise InputError(f"by={unknown[0]!r}: expected {AUTO}, or some of {', '.join(METHODS)}, separated by commas")
    free = [name for name in METHODS.values() if not ARMS[name].epochs] if AUTO in wanted else []
    return [arm for name, arm in METHODS.items() if arm in free or name in wanted]


# -- how they are made ------------------------------------------------------------------------------------------------


def few_shot(material: Material) -> list[tuple[str, str]]:
    """Return some of the donor's answers, drawn with the seed, as the earlier turns of a conversation."""
    answers = material.donors_answers().prompts
    drawn = random.Random(material.seed).sample(answers, min(DEMONSTRATIONS, len(answers)))
    return [(one.text, one.response) for one in drawn]


def distilled(material: Material, by: str) -> Adapter:
    """Return an adapter of the recipient that was fitted, without training, to what the donor says."""
    return distil(material.recipient_lm, material.demonstrations(), by=by, seed=material.seed)


def trained_on_answers(material: Material) -> Adapter:
    """Return an adapter that the recipient was trained to on the donor's answers."""
    answers = material.donors_answers()
    return practised(material.recipient_lm, answers, seed=material.seed, name=material.adapter.name)


def practised(lm: LM, answers: PromptSet, *, seed: int, name: str) -> Adapter:
    """Train a model on answers at the learning rate that leaves the least held-out loss after an epoch of some."""
    settings = replace(PRACTICE_SETTINGS, seed=seed)

    def loss(rate: float) -> float:
        short = replace(settings, epochs=1, learning_rate=rate)
        try:
            tried = train(lm, answers[:TRIED], PRACTICE, short, name=f"{name}, rate {rate:g}")
        except InputError as error:  # the loss is no number
            log.info("%s", error)
            return math.inf
        losses = tried.provenance["held_out_loss"]
        return float(losses[-1]) if losses else math.inf  # of a few answers none is held out: the first rate, then

    return train(lm, answers, PRACTICE, replace(settings, learning_rate=min(PRACTICE_RATES, key=loss)), name=name)


def text_bridge(material: Material) -> Adapter:
    """Return what the donor's *texts* alone can carry: a steering vector native to the recipient.

    The donor answers task-agnostic prompts with and without its adapter; the recipient reads both; the difference of
    its mean states over the first tokens of the answers is added where the pasted adapter acts. Carrying activations
    is worth its while only where it beats this.
    """
    like = material.pasted()
    # The texts do not depend on layers, so that one pair of readings serves every setting that is tried.
    difference = material.kept(("text bridge", material.adapter), lambda: _text_difference(material))
    interventions = {
        layer: tuple(one.at(like.interventions[layer][0].positions) for one in steering_vector(difference[layer]))
        for layer in like.layers
    }
    return Adapter(interventions, like.model, f"text bridge for {like.name}")


def _text_difference(material: Material) -> Tensor:
    """Return the mean state over the donor's answers with its adapter minus without, in the recipient."""
    donor, prompts = material.donor_lm, material.prompts
    assert donor is not None
    assert prompts is not None
    prompts = prompts[:BRIDGE_PROMPTS]

    def answered() -> PromptSet:
        answers = generate(donor, prompts, max_new_tokens=BRIDGE_TOKENS, batch_size=BRIDGE_PROMPTS)
        pairs = (Prompt(one, answer) for one, answer in zip(prompts.texts, answers, strict=True) if answer.strip())
        return PromptSet(tuple(pairs), "answers of the donor")

    without = answered()
    with attach(donor, material.adapter):
        with_it = answered()
    states = [mean_states(material.recipient_lm, texts, BRIDGE_POSITIONS) for texts in (with_it, without)]
    return (states[0] - states[1]).float()


# -- what they cost ---------------------------------------------------------------------------------------------------


def _added(material: Material, turns: Turns) -> float:
    """Return the mean number of tokens that earlier turns add to a request."""
    lm, asked = material.recipient_lm, (material.asked or PromptSet((Prompt("Why?"),))).texts[:8]
    counts = [len(encode(lm, one, turns=turns).ids) - len(encode(lm, one).ids) for one in asked]
    return round(sum(counts) / len(counts), 1)


@contextlib.contextmanager
def _memory(lm: LM) -> Iterator[Callable[[], int | None]]:
    """Yield a function that tells the peak memory since then."""
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
        yield lambda: torch.cuda.max_memory_allocated(lm.device)
        return
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # Linux: the high-water mark starts anew
    except OSError:
        # Elsewhere there is only the peak of the process since it began.
        unit = 1 if sys.platform == "darwin" else 1024
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return

    def peak() -> int | None:
        found = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
        return None if found is None else int(found.split()[1]) * 1024

    yield peak


# -- the table --------------------------------------------------------------------------------------------------------

_LINK, _DONOR = frozenset({"link"}), frozenset({"donor_lm", "asked"})

ARMS: dict[str, Arm] = {
    UNMODIFIED: Arm(lambda _: None, "the recipient as it is"),
    PASTED: Arm(lambda one: one.pasted(), "carried by activations, the default", by="activations", strength="tuned"),
    "published": Arm(
        lambda one: one.published(),
        "carried as published: pseudo-inverse, last-token rows, nothing held out, nearest layers, all of them",
        needs=_LINK,
    ),
    RANDOM: Arm(lambda one: one.random(), "the pasted norm in random directions", strength="mirrored"),
    IN_SPAN: Arm(
        lambda one: one.random(in_span=True),
        "the pasted norm in random directions that the recipient's own activations take",
        needs=_LINK,
        strength="mirrored",
    ),
    SHUFFLED: Arm(
        lambda one: one.pasted(replace(one.linked(), shuffle=one.seed)),
        "the same fit on wrongly paired prompts",
        needs=_LINK,
        strength="mirrored",
    ),
    "mean-ablation": Arm(
        lambda one: one.mean_ablation(), "the state replaced by its mean where the paste acts", needs=_LINK
    ),
    "text-bridge": Arm(
        text_bridge,
        "the difference that the donor's texts make to the recipient's states",
        needs=frozenset({"donor_lm", "prompts"}),
        strength="tuned",
    ),
    FEW_SHOT: Arm(few_shot, f"{DEMONSTRATIONS} of the donor's answers as earlier turns", needs=_DONOR),
    **{
        by: Arm(functools.partial(distilled, by=by), about, by=by, needs=_DONOR)
        for by, about in {
            "context": "fitted to what the donor's answers as context change",
            "vocabulary": "fitted to what the adapter changes in the donor's words, through shared tokens",
            "answers": "fitted, without training, to the tokens of the donor's answers",
        }.items()
    },
    "donor-answers": Arm(
        trained_on_answers,
        "trained on the donor's answers",
        by="training",
        needs=_DONOR,
        epochs=PRACTICE_SETTINGS.epochs,
    ),
    DIRECT: Arm(lambda one: one.direct, "trained on the original data", needs=frozenset({"direct"})),
}

# Methods of carrying, those of the arms that are one: what `commandv transfer --by` takes -> the arm's name.
METHODS: dict[str, str] = {arm.by: name for name, arm in ARMS.items() if arm.by}
