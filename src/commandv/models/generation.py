"""Batched generation: greedy, as measuring needs it, or sampled from a seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from commandv.arguments import checked
from commandv.errors import InputError, require_positive
from commandv.models.encoding import Turns, encode, pad, pad_token
from commandv.models.finite import Finite
from commandv.models.live import attached
from commandv.models.lm import LM
from commandv.models.prefix import shared_prefix
from commandv.models.running import own_pass
from commandv.models.sampling import Sampled, Sampling
from commandv.models.template import PLAIN_STOP, stop_tokens
from commandv.prompts.sets import PromptSet, as_prompts


@checked
def generate(
    lm: LM,
    prompts: PromptSet | Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    max_length: int | None = None,
    turns: Turns = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Answer each prompt, greedily unless told otherwise; the model's own sampling settings are left aside.

    Args:
        lm: the model, with whatever is attached to it.
        prompts: user turns.
        max_new_tokens: longest answer in tokens.
        batch_size: prompts per batch; prompts of similar length go together.
        max_length: cut longer prompts at their beginning to so many tokens; see `commandv.models.encoding.encode`.
        turns: earlier turns of the conversation in which each prompt is asked.
        temperature: 0 takes the likeliest token; above it, up to 2, tokens are sampled, from p^(1 / temperature).
        top_p: sample among the fewest tokens that have so much probability together.
        seed: of sampling; the same seed, prompts and settings give the same answers, whatever the batches.

    Returns:
        The answers in the order of the prompts, without special tokens; a plain-format answer ends where the model
        starts a new question.

    Raises:
        ModelError: NaN or infinity in the model's states, with the layer and the prompt's number.
        InputError: a prompt that is empty, or longer than the context; a temperature or top-p out of range.
    """
    texts = as_prompts(prompts).texts
    sampling = Sampling(temperature, top_p, seed)
    require_positive(max_new_tokens=max_new_tokens, batch_size=batch_size)
    rows = [encode(lm, text, max_length=max_length, turns=turns).ids for text in texts]
    longest = max(map(len, rows)) + max_new_tokens
    if lm.context_length is not None and longest > lm.context_length:
        raise InputError(
            f"the longest prompt and {max_new_tokens} new tokens make {longest}, the context of {lm.id} is "
            f"{lm.context_length}; ask for fewer new tokens, or pass max_length= to keep the prompts' ends"
        )
    answers, lengths = [""] * len(rows), [len(row) for row in rows]
    config = greedy(lm, max_new_tokens)
    stops = set(stop_tokens(lm))
    # Where tokens stand is known of keys and values, and of a recurrent state it is not.
    config.use_cache = not (lm.recurrent and attached(lm))
    with torch.inference_mode(), own_pass(lm):
        prefix = shared_prefix(lm, rows, lengths, new_tokens=max_new_tokens)
        for members in batches(lengths, batch_size, alike=lengths if lm.recurrent else None):
            batch = pad(lm, [rows[i] for i in members], shared=prefix.length)
            out = lm.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                past_key_values=prefix.past(len(members)),
                generation_config=config,
                logits_processor=[
                    Finite(lm, [i + 1 for i in members], [rows[i] for i in members]),
                    *([Sampled(sampling, members)] if temperature else []),
                ],
            )
            for i, ids in zip(members, out[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                end = next((place for place, id in enumerate(ids) if id in stops), len(ids))  # then comes padding
                text = lm.tokenizer.decode(ids[:end], skip_special_tokens=True)
                answers[i] = text if lm.chat else text.split(PLAIN_STOP)[0].strip()
    return answers


class _Settings(transformers.GenerationConfig):
    """Generation settings that the model's own ones do not fill up.

    transformers copies into a configuration whatever it leaves open from the model's own (repetition penalty, beams,
    suppressed tokens ...), which is the one update of it that may add entries.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        if allow_custom_entries:
            return {}
        return super().update(defaults_only=defaults_only, **kwargs)


def greedy(lm: LM, max_new_tokens: int) -> transformers.GenerationConfig:
    """Return a greedy generation configuration that leaves the model's own one aside, which is not changed."""
    return _Settings(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_tokens(lm) or None,
        pad_token_id=pad_token(lm),
        bos_token_id=lm.tokenizer.bos_token_id,
    )


def batches(lengths: Sequence[int], batch_size: int, *, alike: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Yield batches of indices, longest first, so that rows of one batch are of similar length.

    Rows of one batch share their value of `alike`: lengths, where nothing may be padded.
    """
    require_positive(batch_size=batch_size)
    kinds = alike or [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda i: (-kinds[i], -lengths[i]))
    for _, same in itertools.groupby(order, key=lambda i: kinds[i]):
        run = list(same)
        for start in range(0, len(run), batch_size):
            yield run[start : start + batch_size]
