"""Fidelity: how well converters do on the prompts that were kept from their fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from commandv.adapters.adapter import ACTIVATIONS, Intervention
from commandv.transfer.convert.linear import Converter
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


def layer_fidelity(
    pair: LayerPair,
    into: Converter,
    back: Converter,
    *,
    read: tuple[Tensor, Tensor],
    write: tuple[Tensor, Tensor],
    many: Sequence[Intervention],
) -> Fidelity:
    """Measure one layer pair's converters, `into` the donor and `back`, for what is carried through them.

    `read` and `write` are unseen (donor rows, recipient rows) of either side.
    """
    y, x = (one.double() for one in read)
    y_text, x_text = (one.double() for one in write)
    seen, out = into(x), back(y_text)
    cycled, keep = back(seen), varying(x)
    centred = ((x - x.mean(0)) / x.std(0))[:, keep]
    error = ((cycled - cycled.mean(0)) / x.std(0))[:, keep] - centred
    reads = torch.cat([one.read for one in many]).double()
    directions = torch.cat([written(back, one, y_text) for one in many]).T
    return Fidelity(
        *pair,
        len(x),
        r2(seen, y),
        r2(out, x_text),
        cosine(seen, y),
        cosine(out, x_text),
        float(error.square().sum() / centred.square().sum()),
        r2(seen @ reads.T, y @ reads.T),
        r2(out @ directions, x_text @ directions),
    )


def written(back: Converter, one: Intervention, states: Tensor) -> Tensor:
    """Return the directions [rank, d_y] that an intervention writes through a converter; lengths do not matter.

    Each row of W is stepped along by the root mean square over the donor's states [n, d_x] of act(y Rᵀ + b), which is
    how far the intervention steps; where the converter is affine that decides nothing.
    """
    coefficients = ACTIVATIONS[one.activation](states @ one.read.double().T + one.bias.double())
    return back.steps(coefficients.square().mean(0).sqrt()[:, None] * one.write.double(), states)


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
