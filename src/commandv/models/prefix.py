"""The beginning that all prompts of a call share, such as a template's system turn: run once, not once a prompt."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicLayer

from commandv.models.encoding import Batch, read_ahead
from commandv.models.live import attached, attached_positions, foreign_hooks, prompts_of
from commandv.models.lm import LM
from commandv.positions import Positions

WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # what configurations call the reach of attention
WORTHWHILE = 8  # tokens; a shorter beginning is not worth a pass of its own


@dataclass(frozen=True)
class Prefix:
    """Tokens that all rows begin with, and what the model keeps of them."""

    length: int = 0  # in tokens; 0 where nothing is shared, or where it may not be
    cache: Any = None  # the model's keys and values of these tokens, for one row

    def past(self, n: int) -> Any:
        """Return a cache of `n` rows to go on from; None without a prefix."""
        if not self.length:
            return None
        cache = copy.deepcopy(self.cache)  # what goes on from a cache changes it
        cache.batch_repeat_interleave(n)
        return cache

    def rest(self, batch: Batch) -> Batch:
        """Return a padded batch without the prefix's columns; the mask keeps them, as caches want it."""
        return Batch(batch.input_ids[:, self.length :], batch.attention_mask, batch.position_ids[:, self.length :])


NOT_SHARED = Prefix()


def shared_prefix(
    lm: LM,
    rows: Sequence[Sequence[int]],
    prompts: Sequence[int],
    *,
    new_tokens: int | None = None,
    positions: Collection[Positions] = (),
    alike: bool = False,
) -> Prefix:
    """Run the tokens that all rows begin with; going on from there gives what whole rows give, up to rounding.

    Nothing is shared where that could not be so: an adapter acts at the beginning, or is attached and no `generate`
    will tell it where the prompt ends; other hooks are on the model, and nobody knows what they do with a pass over a
    beginning; the model keeps something other than keys and values, or looks back over fewer tokens than there are.

    Args:
        lm: the model.
        rows: token ids.
        prompts: how many tokens of each row are its prompt; its last one is never in the prefix.
        new_tokens: that `generate` will add; None where something else goes on from here.
        positions: where an adapter acts that will be attached.
        alike: prompts of one batch will have one length, so that no padding stands between the beginning and the rest.
    """
    acting = {*positions, *attached_positions(lm)}
    untold = new_tokens is None and attached(lm)
    if len(rows) < 2 or untold or any(one.first or one.everywhere for one in acting):
        return NOT_SHARED
    longest = max(prompts) + max(len(row) - n for row, n in zip(rows, prompts, strict=True)) + (new_tokens or 0)
    spared = max([1, *(one.last for one in acting)])
    length = min(_common(rows), min(prompts) - spared)
    if length < WORTHWHILE or lm.recurrent or foreign_hooks(lm) or not (alike or _sees_over_gaps(lm, longest)):
        return NOT_SHARED
    ids = torch.tensor([list(rows[0][:length])], device=lm.device)
    begun = Batch(ids, torch.ones_like(ids), torch.arange(length, device=lm.device)[None])
    with torch.inference_mode(), prompts_of(lm, min(prompts)):
        cache = read_ahead(lm, begun)
    plain = type(cache) is transformers.DynamicCache and all(isinstance(one, DynamicLayer) for one in cache.layers)
    return Prefix(length, cache) if plain else NOT_SHARED


def _sees_over_gaps(lm: LM, longest: int) -> bool:
    """True when padding between a beginning and the rest, of so many columns together, changes nothing.

    Not so where the distance of two tokens is counted in columns: in windows and chunks of attention, and where nobody
    can tell the model its tokens' positions (ALiBi). Nor where a state goes through every column.
    """
    if "position_ids" not in inspect.signature(lm.owner.forward).parameters:
        return False
    config = lm.model.config.get_text_config(decoder=True)
    sizes = [getattr(config, name, None) for name in WINDOWS]
    return all(size is None or longest <= size for size in sizes)


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with."""
    low, high = min(map(list, rows)), max(map(list, rows))  # whatever lies between shares what these two share
    return next((i for i, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
