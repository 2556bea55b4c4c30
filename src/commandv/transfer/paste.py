"""Pasting: carry a donor's adapter into a recipient by folding it through fitted converters.

With into(h) = h A + a (recipient -> donor) and back(d) = d B (donor -> recipient, differences), an intervention
act(h Rᵀ + b) W of the donor becomes act(h (R Aᵀ)ᵀ + b + R a) (W B), the same form in the recipient's space. Only the
2 · rank right-hand sides that matter are solved; no converter is formed or applied when the model runs. Converters that
are not affine do not fold: the intervention is wrapped in them (`commandv.adapters.carried`).

Source: arXiv 2506.19140, section 3, equations 3 to 5; folding, regularisation and separate rows are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter, Intervention
from commandv.adapters.carried import Carried
from commandv.errors import InputError
from commandv.profiles.profile import Profile, Rows
from commandv.transfer.bridge import HOLDOUT, Bridge, parallel
from commandv.transfer.convert import Converter, FactorStore, Fitter, Network, Ridge
from commandv.transfer.match import LayerChoice, LayerPair, Matcher, choose_layers, last_third, proportional


def paste(
    adapter: Adapter,
    donor: Profile,
    recipient: Profile,
    *,
    fit: Fitter = Ridge(),
    match: Matcher = proportional,
    layers: LayerChoice | str | Iterable[int] = last_third,
    scale: float = 1.0,
    read_rows: Rows = "end",
    write_rows: Rows | None = None,
    holdout: float = HOLDOUT,
    shuffle: int | None = None,
    store: FactorStore | None = None,
) -> Adapter:
    """Carry an adapter of the donor into the recipient.

    Several donor layers that meet in one recipient layer add up there.

    Args:
        adapter: the donor's adapter.
        donor: profile of the model the adapter is for.
        recipient: profile of the model to carry it into, over the same prompts.
        fit: how converters are fitted; `Pinv()` is the published way.
        match: which donor layer goes where.
        layers: recipient layers on which the pasted adapter may act; the default is the last third, where layers
            disturb each other least.
        scale: factor on the result's deltas.
        read_rows: rows for the reading converter (recipient -> donor).
        write_rows: rows for the writing converter (donor -> recipient); None takes text rows where both profiles
            have them, else last-token rows.
        holdout: share of the prompts kept from every fit, so that `fidelity` can be told on them.
        shuffle: a control: pair the rows wrongly, by a permutation with this seed.
        store: keeps factorisations for the next adapter over the same `Profile` objects.

    Returns:
        An adapter of the recipient.

    Raises:
        MismatchError: the adapter is not the donor profile's, or the profiles are of different prompts.
        InputError: too few shared rows, an empty layer choice, or rows that are not finite.
    """
    adapter.model.require(donor.model, f"adapter {adapter.name}")
    if not np.isfinite(scale):
        raise InputError(f"scale={scale}: expected a finite number")
    allowed = set(choose_layers(layers, recipient.n_layers))
    pairs = [pair for pair in match(donor, recipient, adapter.layers) if pair.recipient in allowed]
    if not pairs:
        raise InputError(
            f"adapter {adapter.name} acts on donor layers {adapter.layers}; none is matched to the chosen recipient "
            f"layers {sorted(allowed)}"
        )
    bridge = Bridge(donor, recipient, fit, read_rows, write_rows, holdout, shuffle, store)

    def carry(pair: LayerPair) -> tuple[tuple[Intervention, ...], dict[str, Any]]:
        carried, read_facts, write_facts = _carried(bridge, pair, adapter.interventions[pair.donor], scale)
        return carried, {"pair": list(pair), "read": read_facts, "write": write_facts}

    interventions: dict[int, tuple[Intervention, ...]] = {}
    facts = []
    for pair, (carried, fact) in zip(pairs, parallel(carry, pairs), strict=True):
        interventions[pair.recipient] = (*interventions.get(pair.recipient, ()), *carried)
        facts.append(fact)
    provenance = {
        "made_by": "paste",
        "donor": asdict(donor.model),
        "donor_adapter": {"name": adapter.name, **dict(adapter.provenance)},
        "prompts": donor.prompts,
        "link": bridge.settings(),
        "scale": scale,
        "layers": facts,
    }
    return Adapter(interventions, recipient.model, adapter.name, provenance, donor=adapter)


def _carried(
    bridge: Bridge, pair: LayerPair, many: tuple[Intervention, ...], scale: float
) -> tuple[tuple[Intervention, ...], dict[str, Any], dict[str, Any]]:
    """Return one layer's interventions in the recipient, and what the fits of reading and writing chose.

    Where nothing is read, as in a steering vector, an affine converter for reading is not fitted.
    """
    if not any(one.read.any() for one in many):
        back = bridge.back(pair)
        if not isinstance(back, Network):
            d_model = bridge.recipient.d_model
            constant = (fold(one, torch.zeros(one.rank, d_model), 0.0, scale * back.push(one.write)) for one in many)
            return tuple(constant), {}, back.facts
    into = bridge.into(pair)
    if isinstance(into, Network):
        back = bridge.back(pair)
        return _wrapped(many, into, back, scale), into.facts, back.facts
    pulled, read_facts = [into.pull(one.read) for one in many], into.facts
    del into  # frees its factorisation before the next is made
    back = bridge.back(pair)
    if isinstance(back, Network):
        return _wrapped(many, bridge.into(pair), back, scale), read_facts, back.facts
    folded = tuple(
        fold(one, read, shift, scale * back.push(one.write)) for one, (read, shift) in zip(many, pulled, strict=True)
    )
    return folded, read_facts, back.facts


def _wrapped(
    many: tuple[Intervention, ...], into: Converter | Network, back: Converter | Network, scale: float
) -> tuple[Carried, ...]:
    """Return interventions that do not fold, because a converter is not affine."""
    d_donor = many[0].d_model
    reads = Network.of(into, d_donor)
    writes = Network.of(back, reads.d_x)
    return tuple(Carried(one, reads, writes, scale) for one in many)


def fold(one: Intervention, read: Tensor, shift: Tensor | float, write: Tensor) -> Intervention:
    """Return the recipient's intervention with R' = R Aᵀ (`read`), b' = b + R a (`shift`) and W' = W B (`write`)."""
    return replace(one, read=read.float(), bias=(one.bias.double() + shift).float(), write=write.float())


def random_like(adapter: Adapter, seed: int) -> Adapter:
    """Return a control that reads the same and writes as much, in random directions.

    All that is written at a layer is turned by one random rotation, so that on every state the layer's delta has
    exactly the norm of the original's.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(n: int) -> Tensor:
        drawn = torch.linalg.qr(torch.randn(adapter.d_model, n, generator=generator, dtype=torch.float64))
        return drawn.Q * drawn.R.diagonal().sign()  # LAPACK's own signs favour half of the space

    def turn(many: tuple[Intervention, ...]) -> tuple[Intervention, ...]:
        if any(isinstance(one, Carried) for one in many):  # what it writes spans no few directions
            whole = uniform(adapter.d_model)
            return tuple(one.turned(whole) for one in many)
        writes = torch.cat([one.write for one in many]).double()
        shape = torch.linalg.qr(writes.T).R  # writes = shapeᵀ · orthonormal rows
        turned = (shape.T @ uniform(len(shape)).T).float().split([one.rank for one in many])
        return tuple(replace(one, write=write) for one, write in zip(many, turned, strict=True))

    interventions = {layer: turn(many) for layer, many in adapter.interventions.items()}
    return replace(adapter, interventions=interventions, name=f"random of the norm of {adapter.name}", donor=None)
