"""Steering vectors from what a model's own states tell apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from commandv.errors import InputError
from commandv.generation import batches
from commandv.models import LM, encode, pad_replies
from commandv.positions import Positions
from commandv.profiles import read_rows
from commandv.prompts import PromptSet


def states(
    lm: LM, prompts: PromptSet, positions: Positions, *, batch_size: int = 16
) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
    """Yield the residual stream at chosen tokens of prompts and their replies, batch after batch, of every layer.

    Args:
        lm: the model, with whatever is attached.
        prompts: read in the model's own format; a reply follows its prompt at once.
        positions: which tokens; `gN` are the first N of the reply.
        batch_size: sequences per forward pass.

    Yields:
        (the number of the prompt that each row belongs to, layer -> bfloat16 [rows, d_model]).
    """
    encoded = [encode(lm, one.text, one.response) for one in prompts]
    for members in batches([len(one.ids) for one in encoded], batch_size):
        batch, n_prompt = pad_replies(lm, [encoded[i] for i in members])
        real = batch.attention_mask.bool()
        chosen = positions.select(real[:, :n_prompt], 0, real.shape[1]) & real
        rows, columns = chosen.nonzero(as_tuple=True)
        if len(rows):
            yield [members[row] for row in rows.tolist()], read_rows(lm, batch, (rows, columns))


def mean_states(lm: LM, prompts: PromptSet, positions: Positions, *, batch_size: int = 16) -> Tensor:
    """Return the mean over prompts of the state at chosen tokens, float64 [n_layers, d_model].

    Raises:
        InputError: no token is at these positions (`gN` of prompts without replies).
    """
    total = torch.zeros(lm.n_layers, lm.d_model, dtype=torch.float64)
    count = 0
    for owners, layers in states(lm, prompts, positions, batch_size=batch_size):
        count += len(owners)
        for layer, rows in layers.items():
            total[layer] += rows.double().sum(0)
    if not count:
        raise InputError(f"{prompts.name}: no token at positions {positions}; `gN` needs prompts with replies")
    return total / count
