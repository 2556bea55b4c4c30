"""Conversations of chat messages as a model's prompt tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from commandv.errors import InputError
from commandv.models.encoding import encode, encode_conversation
from commandv.models.lm import LM
from commandv.models.template import PLAIN_STOP


def conversation_ids(lm: LM, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Return the prompt's tokens of a conversation, as `commandv.generate` would have them.

    Args:
        lm: the model; the plain format takes questions and answers by turns, and no system prompt.
        messages: `{"role": ..., "content": ...}` each.
    """
    if not messages or not messages[-1]["content"].strip():
        raise InputError("an empty prompt; the last message needs a text")
    if lm.chat:
        return tuple(encode_conversation(lm, messages))
    roles = [one["role"] for one in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise InputError(
            f"{lm.id} is asked in the plain format, which holds user and assistant messages by turns, the user's first "
            f"and last; got {', '.join(roles)[:200]}. A system prompt needs a model with a chat template"
        )
    texts = [one["content"] for one in messages]
    turns = list(zip(texts[:-1:2], texts[1::2], strict=True))
    return tuple(encode(lm, texts[-1], turns=turns).ids)


def plain_stops(lm: LM) -> tuple[str, ...]:
    """Return the texts before which an answer in the model's prompt format ends."""
    return () if lm.chat else (PLAIN_STOP,)
