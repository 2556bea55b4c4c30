"""Carrying directions and probes into another model, as interventions through a link.

A direction is what an intervention with R = 0, b = 1 writes, and goes through back(Delta) = Delta B without a bias; a
probe is what an intervention with W = 0 reads, and goes through into(h) = h A + a with it. So both are carried as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter, Intervention, low_rank
from commandv.adapters.edit import require_numbers
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.models.layers import LayerChoice, all_layers
from commandv.steering.methods import Probe
from commandv.steering.reading import profile_stream
from commandv.transfer.link import Link
from commandv.transfer.match import LayerPair, Matcher, proportional

Rescale = Literal["norm share"]


@checked
def carry_directions(
    directions: Mapping[int, Tensor] | Tensor,
    link: Link,
    *,
    match: Matcher = proportional,
    layers: LayerChoice = all_layers,
    rescale: Rescale | None = None,
) -> dict[int, Tensor]:
    """Carry directions of the donor into the recipient: v B, through the writing converter and without its bias.

    A steering adapter as a whole goes through `paste`; this is for what is made of directions in the recipient itself:
    an ablation of the carried subspace (`from_directions(..., kind="ablate")` makes it orthonormal), a clamp, a sweep
    of lengths. A shrinking fit such as ridge makes vectors shorter than the difference they stand for.

    Args:
        directions: donor layer -> [d_model] or, for a subspace, [n, d_model]; or all layers, [n_layers, d_model].
        link: the two models. Best are `write_rows` like those where the direction was read: `"end"` for last prompt
            tokens, `"text"` (profiled with `places="words"`) for means over a text.
        match: which donor layer goes where; of several that meet in one recipient layer the lowest is taken.
        layers: recipient layers that are wanted.
        rescale: `"norm share"` gives each the length that is the same share of the typical norm of the stream (at last
            prompt tokens) in the recipient as in the donor; None leaves the length that comes out.

    Returns:
        Recipient layer -> float32, in the shape that went in.

    Raises:
        InputError: no layer is matched to a wanted one, an unknown `rescale`, a direction of zeros to be rescaled, or a
            fit that is not affine: what it makes of a direction depends on the state, so paste the adapter itself.
        MismatchError: directions of another width.
    """
    if rescale not in (None, "norm share"):
        raise InputError(f"rescale={rescale!r}: expected 'norm share' or None")
    if isinstance(directions, Tensor) and directions.ndim != 2:
        raise InputError(f"directions of shape {tuple(directions.shape)}: expected all layers', [n_layers, d_model]")
    given = dict(enumerate(directions)) if isinstance(directions, Tensor) else dict(directions)
    for layer, one in given.items():
        if one.ndim not in (1, 2) or not one.numel():
            raise InputError(f"the direction of layer {layer} has shape {tuple(one.shape)}, expected [d_model]")
        require_numbers(one, f"the direction of layer {layer}")
    writes = {layer: v.float().reshape(-1, v.shape[-1]) for layer, v in given.items()}
    carried = _carried(
        {layer: Intervention(torch.zeros_like(rows), torch.ones(len(rows)), rows) for layer, rows in writes.items()},
        link,
        match,
        layers,
    )
    out = {}
    for pair, one in carried.items():
        rows = one.write
        if rescale is not None:
            before, after = writes[pair.donor].norm(dim=1, keepdim=True), rows.norm(dim=1, keepdim=True)
            if not before.all() or not after.all():
                raise InputError(f"the direction at donor layer {pair.donor} is zero; it has no length to keep")
            typical = [profile_stream(one, n).norm for one, n in zip((link.donor, link.recipient), pair, strict=True)]
            rows = rows / after * before * (typical[1] / typical[0])
        out[pair.recipient] = rows.reshape(*given[pair.donor].shape[:-1], -1)
    return out


@checked
def carry_probes(
    probes: Mapping[int, Probe], link: Link, *, match: Matcher = proportional, layers: LayerChoice = all_layers
) -> dict[int, Probe]:
    """Carry probes of the donor into the recipient: w A ᵀ and b + w · a, through the reading converter.

    Args:
        probes: donor layer -> probe.
        link: the two models. Best are `read_rows` like those where the probe reads: `"end"` for last prompt tokens,
            `"text"` (profiled with `places="words"`) for means over a text.
        match: which donor layer goes where; of several that meet in one recipient layer the lowest is taken.
        layers: recipient layers that are wanted.

    Returns:
        Recipient layer -> probe.

    Raises:
        InputError: no layer is matched to a wanted one, or a fit that is not affine.
        MismatchError: probes of another width.
    """
    carried = _carried(
        {
            layer: Intervention(
                one.weight.float()[None], torch.tensor([one.bias]).float(), torch.zeros(1, len(one.weight))
            )
            for layer, one in probes.items()
        },
        link,
        match,
        layers,
    )
    return {
        pair.recipient: replace(probes[pair.donor], weight=one.read[0], bias=float(one.bias[0]), layer=pair.recipient)
        for pair, one in carried.items()
    }


def _carried(
    interventions: Mapping[int, Intervention], link: Link, match: Matcher, layers: LayerChoice
) -> dict[LayerPair, Intervention]:
    """Carry one intervention per layer, so that no two meet, and return them by layer pair."""
    one = Adapter({layer: (made,) for layer, made in interventions.items()}, link.donor.model, "directions")
    pairs: dict[int, LayerPair] = {}
    for pair in link.layer_pairs(one.layers, match=match, allowed=layers):
        pairs.setdefault(pair.recipient, pair)
    passages = link.carry(one.interventions, [pair for _, pair in sorted(pairs.items())])
    return {pair: low_rank(passage.edits[0], "a direction") for pair, passage in passages.items()}
