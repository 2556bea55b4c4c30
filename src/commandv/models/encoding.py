"""Prompts and replies as a model takes them: formatted, tokenised, padded, run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from commandv.errors import InputError
from commandv.models.load import LM, PLAIN_FORMAT

_MARK = "commandv-prompt-begins-here"


class Encoded(NamedTuple):
    """A formatted prompt as token ids.

    Attributes:
        ids: token ids, with one BOS where the model uses one.
        n_prompt: how many of them belong to the prompt (template included); the rest is the reply.
        text_ends: for each token the offset in the *text* (reply if there is one, else the user's words) of the
            character after its last one; -1 for tokens outside the text.
    """

    ids: list[int]
    n_prompt: int
    text_ends: list[int]


def uses_bos(lm: LM) -> bool:
    """True when the tokenizer itself starts a text with BOS, so that the model expects one."""
    bos = lm.tokenizer.bos_token_id
    return bos is not None and lm.tokenizer("a").input_ids[:1] == [bos]


def format_prompt(lm: LM, prompt: str) -> str:
    """Return the text that the model sees for one user turn, up to where its reply starts.

    Raises:
        InputError: the prompt is empty.
    """
    if not prompt.strip():
        raise InputError("an empty prompt; give it a text")
    if not lm.chat:
        return PLAIN_FORMAT.format(prompt)
    turn = [{"role": "user", "content": prompt}]
    return lm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def encode(lm: LM, prompt: str, response: str = "", *, max_length: int | None = None) -> Encoded:
    """Format and tokenise one prompt (and the reply to it), with one BOS.

    A prompt that is too long loses its *beginning*; the template around it and the prompt's end stay, so that the
    last prompt token is what the model answers from.

    Args:
        lm: the model.
        prompt: the user's words.
        response: the reply, which follows at once.
        max_length: longest result in tokens, at most the model's context. Default: the context, and a longer prompt
            is an error.

    Raises:
        InputError: empty prompt, a prompt longer than the context, or a `max_length` too small for the template.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length={max_length}: expected 1 or more")
    encoded = _encode(lm, prompt, response)
    limit = min((n for n in (max_length, lm.context_length) if n is not None), default=None)
    if limit is None or len(encoded.ids) <= limit:
        return encoded
    if max_length is None:
        raise InputError(
            f"a prompt of {len(encoded.ids)} tokens ({prompt[:40]!r} ...) is longer than the context of {lm.id} "
            f"({limit} tokens); shorten it, or pass max_length= to keep its end"
        )
    offsets = lm.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    drop = len(encoded.ids) - limit
    while drop < len(offsets):
        shorter = _encode(lm, prompt[offsets[drop][0] :].lstrip(), response)
        if len(shorter.ids) <= limit:
            return shorter
        drop += len(shorter.ids) - limit
    raise InputError(f"a max_length of {limit} leaves no room for the prompt beside the template and the reply")


def _encode(lm: LM, prompt: str, response: str) -> Encoded:
    before = format_prompt(lm, prompt)
    tokens = lm.tokenizer(before + response, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(tokens.input_ids), list(tokens["offset_mapping"])
    text = response or prompt.strip()
    start = len(before) if response else _text_start(lm, before, text)
    stop = start + len(text)
    inside = start >= 0  # a template that rewrites the user's words leaves no text to index
    ends = [end - start if inside and start < end <= stop else -1 for _, end in offsets]
    n_prompt = sum(1 for begin, end in offsets if end <= len(before)) if response else len(ids)
    if uses_bos(lm) and ids[:1] != [lm.tokenizer.bos_token_id]:
        ids, ends, n_prompt = [lm.tokenizer.bos_token_id, *ids], [-1, *ends], n_prompt + 1
    return Encoded(ids, n_prompt, ends)


def _text_start(lm: LM, formatted: str, text: str) -> int:
    """Return where the user's words begin in a formatted prompt, -1 when the template rewrites them.

    A marked prompt tells it, because words like "user" or "Answer" are in the templates too.
    """
    head = format_prompt(lm, _MARK).find(_MARK)
    return formatted.find(text, head) if head >= 0 else -1


class Batch(NamedTuple):
    """Token ids with their attention mask and position ids, each [batch, sequence], on the model's device."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def pad(lm: LM, rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "left", *, shared: int = 0) -> Batch:
    """Pad rows of token ids to one length; positions count from each row's first real token.

    Args:
        lm: the model.
        rows: token ids.
        side: where the padding goes.
        shared: so many tokens that all rows begin with stay in the first columns, before the padding.
    """
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), lm.tokenizer.pad_token_id or 0, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row) + shared, width) if side == "left" else slice(shared, len(row))
        ids[i, place] = torch.tensor(row[shared:], dtype=torch.long)
        mask[i, place] = 1
    ids[:, :shared] = torch.tensor(rows[0][:shared], dtype=torch.long)
    mask[:, :shared] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(ids.to(lm.device), mask.to(lm.device), positions.to(lm.device))


def pad_replies(lm: LM, rows: Sequence[Encoded], *, shared: int = 0) -> tuple[Batch, int]:
    """Pad prompts at their left and replies at their right, so that every reply starts in one column.

    Returns:
        (the batch, the number of prompt columns); `shared` as in `pad`.
    """
    prompts = pad(lm, [one.ids[: one.n_prompt] for one in rows], "left", shared=shared)
    replies = pad(lm, [one.ids[one.n_prompt :] for one in rows], "right")
    mask = torch.cat([prompts.attention_mask, replies.attention_mask], 1)
    ids = torch.cat([prompts.input_ids, replies.input_ids], 1)
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0)), prompts.input_ids.shape[1]


def model_inputs(
    module: nn.Module, batch: Batch, *, keep: int | None = None, use_cache: bool = False, past: Any = None
) -> dict[str, Any]:
    """Return the keyword arguments with which a module's forward reads a batch; architectures differ in what they take.

    Args:
        module: a model, or its part without the head.
        batch: what to read.
        keep: compute the logits of the last so many tokens only, where the model can; None for all.
        use_cache: whether to return a cache.
        past: a cache to go on from.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": use_cache
    }  # fmt: skip
    known = inspect.signature(module.forward).parameters
    if "position_ids" in known:
        inputs["position_ids"] = batch.position_ids
    if keep is not None and "logits_to_keep" in known:
        inputs["logits_to_keep"] = keep
    if past is not None:
        inputs["past_key_values"] = past
    return inputs


def last_logits(lm: LM, batch: Batch, n: int, past: Any = None) -> torch.Tensor:
    """Return the logits [batch, n, vocabulary] after each of a batch's last `n` tokens; `past` as in `model_inputs`."""
    inputs = model_inputs(lm.model, batch, keep=n, use_cache=past is not None, past=past)
    return lm.model(**inputs).logits[:, -n:]


def run_blocks(lm: LM, batch: Batch, past: Any = None) -> None:
    """Run the model without its head on a padded batch, for hooks on the blocks; `past` as in `model_inputs`."""
    lm.owner(**model_inputs(lm.owner, batch, use_cache=past is not None, past=past))
