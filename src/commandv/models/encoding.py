"""Prompts and replies as a model takes them: formatted, tokenised, padded, run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import nn

from commandv.arguments import checked
from commandv.errors import InputError, require_positive
from commandv.models.lm import LM
from commandv.models.running import own_pass
from commandv.models.template import MARK, render, stop_tokens
from commandv.prompts.sets import require_text

Turns: TypeAlias = Sequence[tuple[str, str]]
"""Earlier turns of a conversation: (what the user said, what was answered)."""


class Encoded(NamedTuple):
    """A formatted prompt as token ids."""

    ids: list[int]  # token ids, with the tokenizer's own beginning (one BOS, mostly)
    n_prompt: int  # how many of them belong to the prompt (template included); the rest is the reply
    # for each token the offset in the *text* (reply if there is one, else the user's words) of the character after its
    # last one; -1 for tokens outside the text
    text_ends: list[int]


def opening(lm: LM) -> list[int]:
    """Return the tokens that the tokenizer itself puts before a text (BOS, mostly), which the model expects there."""
    whole = list(lm.tokenizer("a").input_ids)
    bare = list(lm.tokenizer("a", add_special_tokens=False).input_ids)
    return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare), [])


def pad_token(lm: LM) -> int:
    """Return a token to pad with that the model has an embedding for; what it says is masked."""
    known = lm.model.get_input_embeddings().weight.shape[0]
    wanted = [lm.tokenizer.pad_token_id, *stop_tokens(lm)]
    return next((one for one in wanted if one is not None and one < known), 0)


def format_prompt(lm: LM, prompt: str, turns: Turns = ()) -> str:
    """Return the text that the model sees for one user turn after earlier ones, up to where its reply starts."""
    if not prompt.strip():
        raise InputError("an empty prompt; give it a text")
    if turns and not lm.chat:  # the plain format is one question and its answer, again and again
        before = (f"{format_prompt(lm, asked)}{answer.strip()}\n" for asked, answer in turns)
        return "".join(before) + format_prompt(lm, prompt)
    both = ("user", "assistant")
    earlier = [{"role": role, "content": text} for turn in turns for role, text in zip(both, turn, strict=True)]
    return render(lm, [*earlier, {"role": "user", "content": prompt}])


def encode_conversation(lm: LM, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """Return a conversation as token ids, formatted as a prompt is; a last turn of the assistant begins the reply."""
    if not turns:
        raise InputError("a conversation without messages")
    ids, _ = _tokens(lm, render(lm, turns, begun=turns[-1]["role"] == "assistant"))
    return [*_missing_opening(lm, ids), *ids]


@checked
def encode(lm: LM, prompt: str, response: str = "", *, max_length: int | None = None, turns: Turns = ()) -> Encoded:
    """Format and tokenise one prompt (and the reply to it), with one BOS.

    A prompt that is too long loses its *beginning*; the template around it and the prompt's end stay, so that the
    last prompt token is what the model answers from.

    Args:
        lm: the model.
        prompt: the user's words.
        response: the reply, which follows at once.
        max_length: longest result in tokens, at most the model's context. Default: the context, and a longer prompt
            is an error.
        turns: earlier turns, which count as part of the prompt's template.

    Raises:
        InputError: empty prompt, a prompt longer than the context, or a `max_length` too small for the template.
    """
    require_positive(max_length=max_length)
    encoded = _encode(lm, prompt, response, turns)
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
        shorter = _encode(lm, prompt[offsets[drop][0] :].lstrip(), response, turns)
        if len(shorter.ids) <= limit:
            return shorter
        drop += len(shorter.ids) - limit
    raise InputError(f"a max_length of {limit} leaves no room for the prompt beside the template and the reply")


def _encode(lm: LM, prompt: str, response: str, turns: Turns) -> Encoded:
    before = format_prompt(lm, prompt, turns)
    ids, offsets = _tokens(lm, before)
    n_prompt = len(ids)
    if response:
        more, places = _reply(lm, before, ids, response)
        ids, offsets = [*ids, *more], [*[(0, 0)] * n_prompt, *places]
    text = response or prompt.strip()
    start = 0 if response else _text_start(lm, before, text, turns)
    stop = start + len(text)
    inside = start >= 0  # a template that rewrites the user's words leaves no text to index
    ends = [end - start if inside and start < end <= stop else -1 for _, end in offsets]
    missing = _missing_opening(lm, ids)
    ids, ends = [*missing, *ids], [*[-1] * len(missing), *ends]
    known = lm.model.get_input_embeddings().weight.shape[0]
    if not ids:
        raise InputError(f"{lm.id}: its prompt format makes no token of {prompt[:40]!r}; use template='plain'")
    if max(ids) >= known:
        raise InputError(
            f"the tokenizer of {lm.id} makes token {max(ids)} ({lm.tokenizer.decode([max(ids)])!r}) of {prompt[:40]!r} "
            f"..., the model has embeddings for {known} tokens; resize the model's, or use its own tokenizer"
        )
    return Encoded(ids, n_prompt + len(missing), ends)


def _tokens(lm: LM, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    require_text(text)
    found = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found.input_ids), list(found["offset_mapping"])


def _reply(lm: LM, before: str, asked: list[int], reply: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens of a reply, and their places in it, such that its prompt keeps the tokens of generation.

    A reply that starts with a line break would merge with one at the prompt's end: it is then tokenised by itself,
    behind a special token, which keeps tokenizers from making a beginning of it.
    """
    ids, offsets = _tokens(lm, before + reply)
    n, start = len(asked), len(before)
    if ids[:n] != asked:
        special = lm.tokenizer.added_tokens_decoder.items()
        wall = next((key for key, one in special if one.special and not (one.lstrip or one.rstrip)), None)
        lead = "" if wall is None else lm.tokenizer.added_tokens_decoder[wall].content
        ids, offsets = _tokens(lm, lead + reply)
        n, start = ids[:1].count(wall) if wall is not None else 0, len(lead)
        if lead and not n:
            (ids, offsets), start = _tokens(lm, reply), 0
    return ids[n:], [(begin - start, end - start) for begin, end in offsets[n:]]


def _missing_opening(lm: LM, ids: list[int]) -> list[int]:
    """Return the tokenizer's own beginning, unless the template has written it."""
    first = opening(lm)
    return [] if ids[:1] == first[:1] else first


def _text_start(lm: LM, formatted: str, text: str, turns: Turns) -> int:
    """Return where the user's words begin in a formatted prompt, -1 when the template rewrites them.

    A marked prompt tells it, because words like "user" or "Answer" are in the templates too.
    """
    head = format_prompt(lm, MARK, turns).find(MARK)
    return formatted.find(text, head) if head >= 0 else -1


class Batch(NamedTuple):
    """Token ids with their attention mask and position ids, each [batch, sequence], on the model's device."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def pad(lm: LM, rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "left", *, shared: int = 0) -> Batch:
    """Pad rows of token ids to one length; positions count from each row's first real token.

    The `shared` tokens that all rows begin with stay in the first columns, before the padding.
    """
    width = max(len(row) for row in rows)
    if side == "left" and lm.recurrent and any(len(row) < width for row in rows):
        raise InputError(
            f"{lm.id} is a recurrent model, which would read padding at the left; run prompts of one length together, "
            "or one at a time (batch_size=1)"
        )
    ids = torch.full((len(rows), width), pad_token(lm), dtype=torch.long)
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
    with own_pass(lm):
        return lm.model(**inputs).logits[:, -n:]


def run_blocks(lm: LM, batch: Batch, past: Any = None) -> None:
    """Run the model without its head on a padded batch, for hooks on the blocks; `past` as in `model_inputs`."""
    with own_pass(lm):
        lm.owner(**model_inputs(lm.owner, batch, use_cache=past is not None, past=past))


def read_ahead(lm: LM, batch: Batch, past: Any = None) -> Any:
    """Return the cache of a batch's tokens, for passes that go on from there; None of a model that keeps none.

    `past` as in `model_inputs`.
    """
    with own_pass(lm):
        output = lm.owner(**model_inputs(lm.owner, batch, use_cache=True, past=past))
    return getattr(output, "past_key_values", None)
