"""Fidelity: how well converters do on the prompts that were kept from their fit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from commandv.adapters.adapter import ACTIVATIONS, Adapter, Intervention
from commandv.errors import InputError, MismatchError
from commandv.profiles.profile import Profile
from commandv.transfer.bridge import Bridge, parallel
from commandv.transfer.convert import Converter, Network
from commandv.transfer.match import LayerPair


class Fidelity(NamedTuple):
    """How well one layer pair's converters work on prompts they have not seen; 1 is perfect, 0 as good as the mean.

    Attributes:
        donor: donor layer.
        recipient: recipient layer.
        n: held-out rows of the reading side.
        read_r2: standardised R² of the reading converter (recipient -> donor), averaged over dimensions.
        write_r2: the same of the writing converter (donor -> recipient).
        read_cosine: mean cosine of centred, standardised rows, predicted against true.
        write_cosine: the same of the writing converter.
        cycle_error: ||back(into(x)) - x||² / ||x||² of centred, standardised recipient rows; says little alone.
        adapter_read_r2: R² of exactly what the adapter reads, h Rᵀ.
        adapter_write_r2: R² along exactly the directions it writes, h W'ᵀ; through a writing converter that is not
            affine, along the mean over held-out states of what a step of typical length along each direction becomes.
    """

    donor: int
    recipient: int
    n: int
    read_r2: float
    write_r2: float
    read_cosine: float
    write_cosine: float
    cycle_error: float
    adapter_read_r2: float
    adapter_write_r2: float


def fidelity(
    pasted: Adapter, donor: Profile, recipient: Profile, *, donor_adapter: Adapter | None = None
) -> list[Fidelity]:
    """Measure a pasted adapter's converters on the prompts that they were not fitted on, per layer pair.

    Args:
        pasted: a result of `paste`.
        donor: the profiles it was pasted with.
        recipient: likewise.
        donor_adapter: the adapter that was pasted; needed for one that was loaded from disk.

    Raises:
        InputError: not a pasted adapter, nothing held out, or the donor's adapter is not at hand.
        MismatchError: other profiles than those it was pasted with.
    """
    original = donor_adapter or pasted.donor
    if pasted.provenance.get("made_by") != "paste" or original is None:
        raise InputError("fidelity is told of a pasted adapter; after loading one, give donor_adapter= as well")
    original.model.require(donor.model, f"the donor's adapter {original.name}")
    pasted.model.require(recipient.model, f"pasted adapter {pasted.name}")
    if donor.prompts != pasted.provenance["prompts"]:
        raise MismatchError(
            f"{pasted.name} was pasted with profiles of prompts {pasted.provenance['prompts']}, got {donor.prompts}; "
            "profile the same prompt sets again"
        )
    bridge = Bridge.again(donor, recipient, pasted.provenance["link"])
    if not bridge.holdout:
        raise InputError("the adapter was pasted with holdout=0: no prompts are left to measure on")
    pairs = [LayerPair(*fact["pair"]) for fact in pasted.provenance["layers"]]
    held_out = min(len(bridge.rows(side, pairs[0], held_out=True)[0]) for side in bridge.sides)
    if held_out < 2:
        raise InputError(
            f"holdout={bridge.holdout} keeps {held_out} rows from the fit, expected at least 2 to measure on; "
            "profile more prompts or paste with a larger holdout"
        )

    def measure(pair: LayerPair) -> Fidelity:
        into, back = bridge.into(pair), bridge.back(pair)
        y, x = (one.double() for one in bridge.rows("read", pair, held_out=True)[:2])
        y_text, x_text = (one.double() for one in bridge.rows("write", pair, held_out=True)[:2])
        read, write = into(x), back(y_text)
        cycled, keep = back(read), varying(x)
        centred = ((x - x.mean(0)) / x.std(0))[:, keep]
        error = ((cycled - cycled.mean(0)) / x.std(0))[:, keep] - centred
        many = original.interventions[pair.donor]
        reads = torch.cat([one.read for one in many]).double()
        into_directions = torch.cat([written(back, one, y_text) for one in many]).T
        return Fidelity(
            pair.donor,
            pair.recipient,
            len(x),
            r2(read, y),
            r2(write, x_text),
            cosine(read, y),
            cosine(write, x_text),
            float(error.square().sum() / centred.square().sum()),
            r2(read @ reads.T, y @ reads.T),
            r2(write @ into_directions, x_text @ into_directions),
        )

    return parallel(measure, pairs)


def written(back: Converter | Network, one: Intervention, states: Tensor) -> Tensor:
    """Return the directions [rank, d_y] that an intervention writes through a converter; lengths do not matter.

    Through a map that is not affine, W_k becomes the mean over states y of back(y + c_k W_k) - back(y), with c_k the
    root mean square over these states of act(y Rᵀ + b)_k, which is how far the intervention steps.

    Args:
        back: donor -> recipient.
        one: the donor's intervention.
        states: of the donor, [n, d_x] float64.
    """
    if not isinstance(back, Network):
        return back.push(one.write.double())
    coefficients = ACTIVATIONS[one.activation](states @ one.read.double().T + one.bias.double())
    steps = coefficients.square().mean(0).sqrt()[:, None] * one.write.double()
    before = back(states)
    return torch.stack([(back(states + step) - before).mean(0) for step in steps])


def varying(true: Tensor) -> Tensor:
    """Mark the columns of rows [n, d] that vary; the others have no scale to measure an error by."""
    variance = true.var(0, correction=0)
    return variance > 1e-12 * variance.max()


def r2(predicted: Tensor, true: Tensor) -> float:
    """Standardised R²: 1 - mean over varying dimensions of squared error over variance; rows [n, d]; NaN if none."""
    keep = varying(true)
    error, variance = (predicted - true).square().mean(0)[keep], true.var(0, correction=0)[keep]
    return float(1 - (error / variance).mean()) if keep.any() else float("nan")


def cosine(predicted: Tensor, true: Tensor) -> float:
    """Mean cosine of rows [n, d] after centring by the true mean and dividing by the true standard deviation."""
    keep = varying(true)
    mean, scale = true.mean(0), true.std(0)
    a, b = (((rows - mean) / scale)[:, keep] for rows in (predicted, true))
    return float(torch.nn.functional.cosine_similarity(a, b).mean())
