"""Carrying directions and probes into another model, as adapters: `paste` does the carrying.

A direction is what an intervention with R = 0, b = 1 writes, and goes through back(Delta) = Delta B without a bias; a
probe is what an intervention with W = 0 reads, and goes through into(h) = h A + a with it. So both are pasted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter, Intervention
from commandv.errors import InputError
from commandv.profiles.profile import Profile, Rows
from commandv.steering.methods import Probe
from commandv.steering.reading import profile_stream
from commandv.transfer.bridge import HOLDOUT
from commandv.transfer.convert import FactorStore, Fitter, Ridge
from commandv.transfer.match import LayerChoice, LayerPair, Matcher, all_layers, choose_layers, proportional
from commandv.transfer.paste import paste

Rescale = Literal["norm share"]


def carry_directions(
    directions: Mapping[int, Tensor] | Tensor,
    donor: Profile,
    recipient: Profile,
    *,
    fit: Fitter = Ridge(),
    match: Matcher = proportional,
    layers: LayerChoice | str | Iterable[int] = all_layers,
    rescale: Rescale | None = None,
    write_rows: Rows | None = None,
    holdout: float = HOLDOUT,
    shuffle: int | None = None,
    store: FactorStore | None = None,
) -> dict[int, Tensor]:
    """Carry directions of the donor into the recipient: v B, through the writing converter and without its bias.

    A steering adapter as a whole goes through `paste`; this is for what is made of directions in the recipient itself:
    an ablation of the carried subspace (`from_directions(..., kind="ablate")` makes it orthonormal), a clamp, a sweep
    of lengths. A shrinking fit such as ridge makes vectors shorter than the difference they stand for.

    Args:
        directions: donor layer -> [d_model] or, for a subspace, [n, d_model]; or all layers, [n_layers, d_model].
        donor: profile of the model they are of.
        recipient: profile of the model to carry them into, over the same prompts.
        fit: how converters are fitted.
        match: which donor layer goes where; of several that meet in one recipient layer the lowest is taken.
        layers: recipient layers that are wanted.
        rescale: `"norm share"` gives each the length that is the same share of the typical norm of the stream (at last
            prompt tokens) in the recipient as in the donor; None leaves the length that comes out.
        write_rows: rows for the writing converter: best those where the direction was read, `"end"` for last prompt
            tokens and `"text"` (profiled with `places="words"`) for means over a text. None as in `paste`.
        holdout: as in `paste`.
        shuffle: as in `paste`.
        store: as in `paste`.

    Returns:
        Recipient layer -> float32, in the shape that went in.

    Raises:
        InputError: no layer is matched to a wanted one, an unknown `rescale`, a direction of zeros to be rescaled, or a
            fit that is not affine: what it makes of a direction depends on the state, so paste the adapter itself.
        MismatchError: profiles of different prompts.
    """
    if rescale not in (None, "norm share"):
        raise InputError(f"rescale={rescale!r}: expected 'norm share' or None")
    given = dict(enumerate(directions)) if isinstance(directions, Tensor) else dict(directions)
    writes = {layer: v.float().reshape(-1, v.shape[-1]) for layer, v in given.items()}
    carried = _paste(
        {
            layer: Intervention(torch.zeros_like(rows), torch.ones(len(rows)), rows)
            for layer, rows in writes.items()
        },
        donor, recipient, fit, match, layers, write_rows, holdout, shuffle, store,
    )  # fmt: skip
    out = {}
    for pair, one in carried.items():
        rows = one.write
        if rescale is not None:
            before, after = writes[pair.donor].norm(dim=1, keepdim=True), rows.norm(dim=1, keepdim=True)
            if not before.all() or not after.all():
                raise InputError(f"the direction at donor layer {pair.donor} is zero; it has no length to keep")
            grown = profile_stream(recipient, pair.recipient).norm / profile_stream(donor, pair.donor).norm
            rows = rows / after * before * grown
        out[pair.recipient] = rows.reshape(*given[pair.donor].shape[:-1], -1)
    return out


def carry_probes(
    probes: Mapping[int, Probe],
    donor: Profile,
    recipient: Profile,
    *,
    fit: Fitter = Ridge(),
    match: Matcher = proportional,
    layers: LayerChoice | str | Iterable[int] = all_layers,
    read_rows: Rows = "end",
    holdout: float = HOLDOUT,
    shuffle: int | None = None,
    store: FactorStore | None = None,
) -> dict[int, Probe]:
    """Carry probes of the donor into the recipient: w A ᵀ and b + w · a, through the reading converter.

    Args:
        probes: donor layer -> probe.
        donor: profile of the model they read.
        recipient: profile of the model to carry them into, over the same prompts.
        fit: how converters are fitted.
        match: which donor layer goes where; of several that meet in one recipient layer the lowest is taken.
        layers: recipient layers that are wanted.
        read_rows: rows for the reading converter: best those where the probe reads, `"end"` for last prompt tokens and
            `"text"` (profiled with `places="words"`) for means over a text.
        holdout: as in `paste`.
        shuffle: as in `paste`.
        store: as in `paste`.

    Returns:
        Recipient layer -> probe.

    Raises:
        InputError: no layer is matched to a wanted one, or a fit that is not affine.
        MismatchError: profiles of different prompts.
    """
    carried = _paste(
        {
            layer: Intervention(
                one.weight.float()[None], torch.tensor([one.bias]).float(), torch.zeros(1, len(one.weight))
            )
            for layer, one in probes.items()
        },
        donor, recipient, fit, match, layers, read_rows, holdout, shuffle, store,
    )  # fmt: skip
    return {
        pair.recipient: replace(probes[pair.donor], weight=one.read[0], bias=float(one.bias[0]), layer=pair.recipient)
        for pair, one in carried.items()
    }


def _paste(
    interventions: Mapping[int, Intervention],
    donor: Profile,
    recipient: Profile,
    fit: Fitter,
    match: Matcher,
    layers: LayerChoice | str | Iterable[int],
    rows: Rows | None,
    holdout: float,
    shuffle: int | None,
    store: FactorStore | None,
) -> dict[LayerPair, Intervention]:
    """Paste one intervention per layer, so that no two meet, and return them by layer pair."""
    adapter = Adapter({layer: (one,) for layer, one in interventions.items()}, donor.model, "directions")
    wanted = set(choose_layers(layers, recipient.n_layers))
    pairs: dict[int, LayerPair] = {}
    for pair in match(donor, recipient, adapter.layers):
        if pair.recipient in wanted:
            pairs.setdefault(pair.recipient, pair)
    if not pairs:
        raise InputError(
            f"directions of donor layers {adapter.layers}: none is matched to the recipient layers {sorted(wanted)}"
        )
    pasted = paste(
        adapter, donor, recipient, fit=fit, match=lambda *_: list(pairs.values()), layers=list(pairs),
        read_rows=rows or "end", write_rows=rows, holdout=holdout, shuffle=shuffle, store=store,
    )  # fmt: skip
    return {pair: pasted.interventions[layer][0] for layer, pair in sorted(pairs.items())}
