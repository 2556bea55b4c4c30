"""Deterministic batched generation for measurement."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from commandv.errors import InputError
from commandv.models.encoding import Turns, encode, pad, pad_token
from commandv.models.finite import Finite
from commandv.models.identity import evaluating
from commandv.models.load import LM
from commandv.models.prefix import shared_prefix
from commandv.models.template import PLAIN_STOP, stop_tokens
from commandv.prompts.sets import PromptSet, as_prompts


def generate(
    lm: LM,
    prompts: PromptSet | Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    max_length: int | None = None,
    turns: Turns = (),
) -> list[str]:
    """Answer each prompt greedily; the model's own sampling settings are left aside.

    Args:
        lm: the model, with whatever is attached to it.
        prompts: user turns.
        max_new_tokens: longest answer in tokens.
        batch_size: prompts per batch; prompts of similar length go together.
        max_length: cut longer prompts at their beginning to so many tokens; see `commandv.models.encoding.encode`.
        turns: earlier turns of the conversation in which each prompt is asked.

    Returns:
        The answers in the order of the prompts, without special tokens; a plain-format answer ends where the model
        starts a new question.

    Raises:
        ModelError: NaN or infinity in the model's states, with the layer and the prompt's number.
        InputError: a prompt that is empty, or longer than the context.
    """
    texts = as_prompts(prompts).texts
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}, batch_size={batch_size}: expected 1 or more")
    rows = [encode(lm, text, max_length=max_length, turns=turns).ids for text in texts]
    longest = max(map(len, rows)) + max_new_tokens
    if lm.context_length is not None and longest > lm.context_length:
        raise InputError(
            f"the longest prompt and {max_new_tokens} new tokens make {longest}, the context of {lm.id} is "
            f"{lm.context_length}; ask for fewer new tokens, or pass max_length= to keep the prompts' ends"
        )
    answers = [""] * len(rows)
    prefix = shared_prefix(lm, rows, [len(row) for row in rows], new_tokens=max_new_tokens)
    for members in batches([len(row) for row in rows], batch_size):
        batch = pad(lm, [rows[i] for i in members], shared=prefix.length)
        with torch.inference_mode(), greedy(lm, max_new_tokens) as config:
            out = lm.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                past_key_values=prefix.past(len(members)),
                generation_config=config,
                logits_processor=[Finite(lm, [i + 1 for i in members], [rows[i] for i in members])],
            )
        for i, ids in zip(members, out[:, batch.input_ids.shape[1] :], strict=True):
            text = lm.tokenizer.decode(ids, skip_special_tokens=True)
            answers[i] = text if lm.chat else text.split(PLAIN_STOP)[0].strip()
    return answers


@contextlib.contextmanager
def greedy(lm: LM, max_new_tokens: int) -> Iterator[Any]:
    """Yield a greedy generation configuration while the model's own one is set aside and dropout is off.

    It must be: transformers fills what a configuration leaves open (repetition penalty, beams, suppressed tokens ...)
    from the model's own.
    """
    import transformers

    own = lm.model.generation_config
    config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_tokens(lm) or None,
        pad_token_id=pad_token(lm),
        bos_token_id=own.bos_token_id,
    )
    lm.model.generation_config = config
    try:
        with evaluating(lm):
            yield config
    finally:
        lm.model.generation_config = own


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest first, so that rows of one batch are of similar length."""
    order: Iterable[int] = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    order = list(order)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
