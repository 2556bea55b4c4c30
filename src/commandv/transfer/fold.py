"""Carrying interventions through two converters: folded where both are affine, wrapped in them where one is not.

With into(h) = h A + a (recipient -> donor) and back(d) = d B (donor -> recipient, differences), an intervention
act(h Rᵀ + b) W of the donor becomes act(h (R Aᵀ)ᵀ + b + R a) (W B), the same form in the recipient's space. Only the
2 · rank right-hand sides that matter are solved; no converter is formed or applied when the model runs.

Source: arXiv 2506.19140, section 3, equations 3 to 5; folding, regularisation and separate rows are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commandv.adapters.adapter import Intervention
from commandv.adapters.carried import Carried
from commandv.adapters.edit import Edit
from commandv.errors import InputError
from commandv.transfer.convert.linear import Converter


class Passage(NamedTuple):
    """One layer's interventions in the recipient, and what the fits of reading and writing chose."""

    edits: tuple[Edit, ...]
    read: dict[str, Any]
    write: dict[str, Any]


def carried(
    many: Sequence[Intervention], into: Callable[[], Converter], back: Callable[[], Converter], d_model: int
) -> Passage:
    """Return the donor's interventions of a layer in the recipient, of width `d_model`.

    `into` fits recipient -> donor, `back` donor -> recipient. Where nothing is read, as in a steering vector, an affine
    converter for reading is not fitted.
    """
    through = None
    pulled: list[tuple[Tensor, Tensor] | None]
    if any(one.read.any() for one in many):
        reading = into()
        pulled, read_facts = [reading.pull(one.read) for one in many], dict(reading.facts)
        if None in pulled:
            through = reading.network()
        del reading  # frees its factorisation before the next is made
    else:
        pulled, read_facts = [(torch.zeros(one.rank, d_model), torch.zeros(one.rank)) for one in many], {}
    writing = back()
    pushed = [writing.push(one.write) for one in many]
    folded = [
        fold(one, *half, write)
        for one, half, write in zip(many, pulled, pushed, strict=True)
        if half is not None and write is not None
    ]
    if len(folded) == len(many):
        if not any(one.write.any() for one in folded) and any(one.write.any() for one in many):
            raise InputError(
                "everything that the adapter writes comes out as zero: the fit found no relation between the models' "
                "rows; profile more, and different, prompts"
            )
        return Passage(tuple(folded), read_facts, dict(writing.facts))
    if through is None:
        reading = into()
        through, read_facts = reading.network(), dict(reading.facts)
    out = writing.network()
    return Passage(tuple(Carried(one, through, out) for one in many), read_facts, dict(writing.facts))


def fold(one: Intervention, read: Tensor, shift: Tensor | float, write: Tensor) -> Intervention:
    """Return the recipient's intervention with R' = R Aᵀ (`read`), b' = b + R a (`shift`) and W' = W B (`write`)."""
    return replace(one, read=read.float(), bias=(one.bias.double() + shift).float(), write=write.float())
