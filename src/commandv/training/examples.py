"""Training examples as token ids, and the loss on their replies."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.models.encoding import Batch, Encoded, encode, last_logits, pad_replies, read_ahead
from commandv.models.lm import LM
from commandv.models.prefix import NOT_SHARED, Prefix, shared_prefix
from commandv.models.template import end_of_turn
from commandv.positions import EVERYWHERE, Positions
from commandv.prompts.sets import PromptSet, require_replies


class Example(NamedTuple):
    """Token ids of a prompt in the model's format and of its reply, which ends with the template's end of a turn."""

    prompt: list[int]
    response: list[int]

    @classmethod
    def of(cls, lm: LM, prompt: str, response: str, max_response: int) -> Example:
        """Encode a prompt and the first `max_response` tokens of its reply."""
        encoded = encode(lm, prompt, response)
        reply = encoded.ids[encoded.n_prompt :]
        end = end_of_turn(lm)
        ending = [] if end is None else [end]
        return cls(encoded.ids[: encoded.n_prompt], (reply + ending)[:max_response])


def read_examples(lm: LM, examples: PromptSet, max_response: int) -> list[Example]:
    """Encode all examples."""
    require_replies(examples)
    return [Example.of(lm, one.text, one.response, max_response) for one in examples]


def reply_loss(
    lm: LM,
    batch: Sequence[Example],
    adapter: Adapter | None = None,
    positions: Positions = EVERYWHERE,
    beginning: Prefix = NOT_SHARED,
) -> Tensor:
    """Return the mean cross-entropy of the replies' tokens, in nats.

    Logits are computed at labelled positions only. What comes before the first position that the adapter changes runs
    without gradients and is reused as a cache.

    Args:
        lm: the model.
        batch: examples.
        adapter: to attach meanwhile.
        positions: where it acts; without an adapter everything may be learning, and everything has gradients.
        beginning: what the prompts begin with, from `shared_beginning` for the same positions; it is not read again.
    """
    rows = [Encoded(one.prompt + one.response, len(one.prompt), []) for one in batch]
    padded, n_prompt = pad_replies(lm, rows, shared=beginning.length)
    ids, mask, places = padded
    # Left-padded prompts end in one column: before it lies what no intervention can have changed.
    untouched = 0 if positions.first or positions.everywhere else max(0, n_prompt - (positions.last or 1))
    past = _prefix(lm, padded, untouched, beginning)
    if past is None:  # nothing comes before, or the model keeps nothing to go on from
        untouched = 0
    here = slice(untouched, ids.shape[1] - 1)
    read = Batch(ids[:, here], mask[:, : here.stop], places[:, here])
    with attach(lm, adapter, n_prompt=n_prompt) if adapter else contextlib.nullcontext():
        logits = last_logits(lm, read, ids.shape[1] - n_prompt, past)
    labels = ids.masked_fill(mask == 0, -100)[:, n_prompt:]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(logits.device))


def shared_beginning(lm: LM, examples: Sequence[Example], positions: Positions) -> Prefix:
    """Return what all examples' prompts begin with, read once, as far as nothing acts there; see `shared_prefix`."""
    rows = [one.prompt + one.response for one in examples]
    return shared_prefix(lm, rows, [len(one.prompt) for one in examples], positions=[positions])


def _prefix(lm: LM, batch: Batch, stop: int, beginning: Prefix) -> Any:
    """Run the first columns without gradients, from where the shared ones end, and return their cache."""
    past = beginning.past(len(batch.input_ids))
    if stop == beginning.length:
        return past
    here = slice(beginning.length, stop)
    before = Batch(batch.input_ids[:, here], batch.attention_mask[:, :stop], batch.position_ids[:, here])
    with torch.no_grad():
        return read_ahead(lm, before, past)
