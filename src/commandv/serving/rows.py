"""Keys and values of a batch whose rows come and go.

Rows end in the last column and are padded at their left, as `generate` pads them, so that a row's tokens lie next to
each other whatever the others do: windows of attention and distances counted in columns are right. The batch is as wide
as its longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from commandv.errors import ModelError
from commandv.models.lm import LM

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def require_rows(lm: LM, cache: Any) -> None:
    """Raise `ModelError` unless rows can join and leave what a model keeps of the tokens that it has read."""
    config = lm.model.config.get_text_config(decoder=True)
    kept = type(cache) is DynamicCache and all(type(one) in _LAYERS for one in cache.layers)
    if lm.recurrent or not kept or getattr(config, "attention_chunk_size", None):
        raise ModelError(
            f"{lm.id}: requests share a batch, which they join and leave; this model keeps something other than keys "
            "and values, or attends in chunks, so that they cannot. Use commandv generate, one set of prompts at a time"
        )


def join(old: DynamicCache | None, old_mask: Tensor | None, new: DynamicCache, new_mask: Tensor) -> Tensor:
    """Add the rows of one cache below those of another.

    Args:
        old: what the rows of `old_mask` [rows, columns] have read; None for none. Its tensors go into the result.
        old_mask: 1 at real tokens.
        new: the cache of the rows that join; it holds all of them afterwards.
        new_mask: their mask.

    Returns:
        The mask of all rows.
    """
    if old is None or old_mask is None:
        return new_mask
    width = max(old_mask.shape[1], new_mask.shape[1])
    for above, below in zip(_layers(old), _layers(new), strict=True):
        if below.is_initialized:
            kept = _kept(below, width)
            below.keys = torch.cat([_widened(above.keys, kept), _widened(below.keys, kept)])
            below.values = torch.cat([_widened(above.values, kept), _widened(below.values, kept)])
            _set_width(below, width)
    return torch.cat([nn.functional.pad(one, (width - one.shape[1], 0)) for one in (old_mask, new_mask)])


def keep(cache: DynamicCache, mask: Tensor, rows: Sequence[int]) -> Tensor:
    """Drop all but some rows, and the columns that none of the rest needs; returns the rest's mask."""
    chosen = torch.tensor(rows, device=mask.device)
    mask = mask[chosen]
    mask = mask[:, int(mask.any(0).int().argmax()) :]
    width = mask.shape[1]
    for layer in _layers(cache):
        if layer.is_initialized:
            at, kept = chosen.to(layer.keys.device), _kept(layer, width)
            layer.keys, layer.values = (one[:, :, -kept:].index_select(0, at) for one in (layer.keys, layer.values))
            _set_width(layer, width)
    return mask


def _layers(cache: DynamicCache) -> list[Any]:
    return cache.layers  # of the kinds in _LAYERS: `require_rows` has looked


def _kept(layer: Any, width: int) -> int:
    """Return how many columns a layer keeps of so many that ran."""
    return min(width, layer.sliding_window - 1) if layer.is_sliding else width


def _set_width(layer: Any, width: int) -> None:
    if layer.is_sliding:
        layer.cumulative_length = width


def _widened(states: Tensor, width: int) -> Tensor:
    return nn.functional.pad(states, (0, 0, width - states.shape[2], 0))
