"""Mappers: a donor's state at one layer becomes a recipient's, bias included; and the controls of one.

Pasting carries what an adapter changes, a difference, and so drops the converter's bias. A mapper carries the state
itself, y = back(x), which can then stand in for the recipient's own.

Source: arXiv 2503.04429, where the map is an autoencoder or affine; here it is any fitter. The rotation is ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commandv.arguments import checked
from commandv.errors import InputError, MismatchError
from commandv.models.identity import ModelRef
from commandv.models.lm import LM
from commandv.profiles.profile import END, Profile
from commandv.prompts.sets import PromptSet
from commandv.transfer.link import HOLDOUT, Link, held_out_prompts
from commandv.transfer.match import LayerPair

MAPPED, SHUFFLED, MEAN_ABLATION, ROTATED = "mapped", "shuffled pairs", "mean-ablation", "random rotation"


@checked
@dataclass(frozen=True, eq=False)
class Mapper:
    """Gives states for a recipient's layer from the donor's states at the same places of a text.

    Attributes:
        donor: the model whose states it reads.
        recipient: the model that it gives states for.
        pair: the layer it reads in the donor and the one it is for in the recipient.
        convert: (donor states float64 [n, d_donor], bool [n] that marks last prompt tokens) -> [n, d_recipient].
        facts: how it was fitted and what the fit chose.
    """

    donor: ModelRef
    recipient: ModelRef
    pair: LayerPair
    convert: Callable[[Tensor, Tensor], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def __call__(self, states: Tensor, is_end: Tensor) -> Tensor:
        """Return states of the recipient, float32 [n, d_recipient], on the CPU.

        Args:
            states: of the donor, [n, d_donor].
            is_end: bool [n], True for last prompt tokens.

        Raises:
            MismatchError: states of another width.
        """
        if states.shape[-1] != self.donor.d_model:
            raise MismatchError(
                f"mapper of {self.donor.id or 'a model'}: expected states of width {self.donor.d_model}, got "
                f"{states.shape[-1]}; they are of another model"
            )
        return self.convert(states.double().cpu(), is_end.cpu()).float()

    def require(self, donor: LM, recipient: LM) -> None:
        """Check that it is for these two models.

        Raises:
            MismatchError: it was fitted on another pair of models.
            InputError: a layer that its model does not have.
        """
        self.donor.require(donor.ref, "mapper, of the donor")
        self.recipient.require(recipient.ref, "mapper, of the recipient")
        for layer, lm in zip(self.pair, (donor, recipient), strict=True):
            if not 0 <= layer < lm.n_layers:
                raise InputError(f"layer {layer} of {lm.id}: expected one of 0 .. {lm.n_layers - 1}")


@checked
def fit_mapper(link: Link, pair: LayerPair | tuple[int, int]) -> Mapper:
    """Return a mapper of one layer pair: the link's converter for writing, with its bias.

    Args:
        link: the two models. For the states of every token of a text, `write_rows="both"` over profiles with
            `places="words"`; `unseen` returns the prompts that it keeps from its fits.
        pair: (donor layer, recipient layer).

    Raises:
        InputError: a layer that is not in the profile, or too few shared rows.
    """
    pair = LayerPair(*pair)
    back = link.back(pair)
    facts = {**link.settings(), "prompts": link.donor.prompts, "chosen": dict(back.facts)}
    dense = back.dense()
    return Mapper(link.donor.model, link.recipient.model, pair, lambda states, _: dense(states), facts)


@checked
def mapper_arms(link: Link, pair: LayerPair | tuple[int, int], *, seed: int = 0) -> dict[str, Mapper]:
    """Return a mapper and its controls; arguments as in `fit_mapper`, `seed` is that of the random controls.

    Returns:
        mapped, the mapper; shuffled pairs, one fitted on wrongly paired rows; mean-ablation, the recipient's mean
        state whatever the donor's; random rotation, m + (y - m) Q for mapped states y, mean state m and a random
        orthogonal Q, which is as far from the mean as y. The mean is that of the recipient's profile without the
        held-out prompts: over last prompt tokens for those, over text rows for all others.

    Raises:
        InputError: a layer that is not in the profile, or too few shared rows.
    """
    pair, recipient = LayerPair(*pair), link.recipient
    mapped, shuffled = fit_mapper(link, pair), fit_mapper(replace(link, shuffle=seed), pair)
    mean = _means(recipient, pair.recipient, link.holdout)
    drawn = torch.randn(
        recipient.d_model, recipient.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    turn, triangle = torch.linalg.qr(drawn)
    turn = turn * triangle.diagonal().sign()  # LAPACK's own signs favour half of the rotations

    def rotate(states: Tensor, is_end: Tensor) -> Tensor:
        centre = mean(states, is_end)
        return centre + (mapped.convert(states, is_end) - centre) @ turn

    def control(convert: Callable[[Tensor, Tensor], Tensor], what: str) -> Mapper:
        return Mapper(link.donor.model, recipient.model, pair, convert, {"control": what, "seed": seed})

    return {
        MAPPED: mapped,
        SHUFFLED: shuffled,
        MEAN_ABLATION: control(mean, MEAN_ABLATION),
        ROTATED: control(rotate, ROTATED),
    }


@checked
def layer_pair(text: str, donor_layers: int, recipient_layers: int) -> LayerPair:
    """Read a layer pair, "9:15", or a donor layer, "9", whose recipient layer is proportional (floor) to it.

    Raises:
        InputError: anything else, or a layer that its model does not have.
    """
    numbers = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    if not numbers:
        raise InputError(f"layer {text!r}: expected a donor layer like 9, or donor and recipient layer like 9:15")
    first = int(numbers[1])
    pair = LayerPair(first, int(numbers[2]) if numbers[2] else first * recipient_layers // donor_layers)
    for layer, depth, role in zip(pair, (donor_layers, recipient_layers), ("donor", "recipient"), strict=True):
        if layer >= depth:
            raise InputError(f"layer {layer} of the {role}: expected one of 0 .. {depth - 1}")
    return pair


@checked
def unseen(
    prompts: PromptSet, text: PromptSet | None = None, *, holdout: float = HOLDOUT
) -> tuple[PromptSet, PromptSet | None]:
    """Return the prompts and passages of a profile that no fit with this `holdout` sees.

    Args:
        prompts: what the profiles were made of.
        text: likewise; None if they have no text rows.
        holdout: as in the fit.

    Raises:
        InputError: too few prompts for any to be held out.
    """
    n_text = 0 if text is None else len(text)
    held = held_out_prompts(np.arange(len(prompts) + n_text), holdout)

    def kept_from(one: PromptSet, marks: np.ndarray) -> PromptSet:
        kept = tuple(item for item, mark in zip(one, marks, strict=True) if mark)
        return PromptSet(kept, f"{one.name}, held out")

    passages = None if text is None else kept_from(text, held[len(prompts) :])
    return kept_from(prompts, held[: len(prompts)]), passages


def _means(profile: Profile, layer: int, holdout: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that gives a profile's mean state at last prompt tokens and elsewhere."""
    fitted, is_end = ~held_out_prompts(profile.keys[:, 0], holdout), profile.keys[:, 1] == END
    rows = profile.layer(layer)

    def mean(mark: np.ndarray) -> Tensor:
        return rows[torch.from_numpy(mark)].double().mean(0)

    kinds = [fitted & is_end, fitted & ~is_end]
    end, text = (mean(kind if kind.any() else fitted) for kind in kinds)
    return lambda _, marks: torch.where(marks[:, None], end, text)
