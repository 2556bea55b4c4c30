"""The short forms of a link that is used once, and the random control."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.edit import Edit
from commandv.arguments import checked
from commandv.models.layers import AUTO_LAYERS, LayerChoice, all_layers
from commandv.profiles.profile import Profile, Rows
from commandv.transfer.convert.fitters import AnyFitter, Pinv, Ridge
from commandv.transfer.link import HOLDOUT, Link
from commandv.transfer.match import Matcher, nearest, proportional


@checked
def paste(
    adapter: Adapter,
    donor: Profile,
    recipient: Profile,
    *,
    fit: AnyFitter = Ridge(),
    match: Matcher = proportional,
    layers: LayerChoice = AUTO_LAYERS,
    scale: float = 1.0,
    read_rows: Rows = "end",
    write_rows: Rows | None = None,
    holdout: float = HOLDOUT,
    shuffle: int | None = None,
) -> Adapter:
    """Carry an adapter of the donor into the recipient.

    Several donor layers that meet in one recipient layer add up there. For more than one use of the same pair of
    profiles make a `link`: it fits once.

    Args:
        adapter: the donor's adapter.
        donor: profile of the model the adapter is for.
        recipient: profile of the model to carry it into, over the same prompts.
        fit: how converters are fitted; `Pinv()` is the published way.
        match: which donor layer goes where.
        layers: recipient layers on which the pasted adapter may act; `"auto"` is the last third, where layers disturb
            each other least, and all of them for an adapter that has nothing there (steering of middle layers).
        scale: factor on the result's deltas.
        read_rows: as in `link`, and so are the next three.

    Returns:
        An adapter of the recipient.

    Raises:
        MismatchError: the adapter is not the donor profile's, or the profiles are of different prompts.
        InputError: too few shared rows, rows that are all the same or not finite, or an empty layer choice.
    """
    once = Link(
        donor,
        recipient,
        fit=fit,
        read_rows=read_rows,
        write_rows=write_rows,
        holdout=holdout,
        shuffle=shuffle,
        kept=None,
    )
    return once.paste(adapter, match=match, layers=layers, scale=scale)


def as_published(link: Link) -> Link:
    """Return the link of the published method: pseudo-inverse, last-token rows on both sides, nothing held out."""
    return replace(link, fit=Pinv(), read_rows="end", write_rows="end", holdout=0.0, shuffle=None)


@checked
def published(adapter: Adapter, donor: Profile, recipient: Profile) -> Adapter:
    """Carry an adapter exactly as published, for comparisons: the one meaning of "as published" in all tables.

    Float32's tolerance in the pseudo-inverse (`Pinv`), all prompts' last-token rows, the released code's map to the
    nearest layer, every layer, scale 1.

    Args:
        adapter: the donor's adapter.
        donor: profile of the model the adapter is for.
        recipient: profile of the model to carry it into, over the same prompts.

    Raises:
        InputError: as in `paste`.
        MismatchError: as in `paste`.

    Source: arXiv 2506.19140, section 3, and its released code.
    """
    link = as_published(Link(donor, recipient, write_rows="end", kept=None))
    return link.paste(adapter, match=nearest, layers=all_layers)


@checked
def random_like(adapter: Adapter, seed: int, *, within: Profile | None = None) -> Adapter:
    """Return a control that reads the same and writes as much, in random directions.

    All that is written at a layer is turned by one random rotation, so that on every state the layer's delta has
    exactly the norm of the original's.

    Args:
        adapter: what to be like.
        seed: of the directions.
        within: draw them as the activations of this profile of the same model vary, instead of evenly from the whole
            space, most of which a model never visits.

    Raises:
        MismatchError: a profile of another model.
    """
    if within is not None:
        adapter.model.require(within.model, f"adapter {adapter.name}")
    generator = torch.Generator().manual_seed(seed)

    def drawn(layer: int, n: int) -> Tensor:
        if within is None:
            wanted = torch.randn(adapter.d_model, n, generator=generator, dtype=torch.float64)
        else:
            rows = within.layer(layer).double()
            wanted = (rows - rows.mean(0)).T @ torch.randn(len(rows), n, generator=generator, dtype=torch.float64)
        made = torch.linalg.qr(wanted)
        return made.Q * made.R.diagonal().sign()  # LAPACK's own signs favour half of the space

    def turn(layer: int, many: tuple[Edit, ...]) -> tuple[Edit, ...]:
        # One turn of all that is written at a layer, by an orthonormal basis of it and as many random directions.
        basis = torch.linalg.qr(torch.cat([one.writes for one in many]).double().T).Q
        onto = drawn(layer, basis.shape[1])
        return tuple(one.turned(lambda rows: (rows.double() @ basis @ onto.T).to(rows.dtype)) for one in many)

    interventions = {layer: turn(layer, many) for layer, many in adapter.interventions.items()}
    return replace(adapter, interventions=interventions, name=f"random of the norm of {adapter.name}")
