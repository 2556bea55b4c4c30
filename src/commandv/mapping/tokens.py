"""Which token of a donor belongs to which token of a recipient, for one text in two vocabularies and prompt formats.

A recipient's token takes the donor's token that ends at the same character, or else the last one that ends before it,
which has not read more than the recipient's has. Where both models make the same tokens of a prompt, each takes its
own like. The last prompt tokens, from which replies are begun, are each other's. All other tokens of the prompt
format, BOS among them, take none, and neither do tokens of the text that end before the donor's first one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from commandv.arguments import checked
from commandv.errors import InputError
from commandv.models.encoding import Encoded, encode
from commandv.models.lm import LM
from commandv.prompts.sets import Prompt


class Places(NamedTuple):
    """Paired tokens of one text."""

    ids: list[int]  # the recipient's tokens
    donor_ids: list[int]  # the donor's
    start: int  # the column of the recipient's first token of the text
    columns: np.ndarray  # of the recipient's tokens that have a counterpart, int64 [k]
    partners: np.ndarray  # the columns of their counterparts, [k]
    exact: np.ndarray  # bool [k], the counterpart ends at the same character; else before it
    is_end: np.ndarray  # bool [k], the last prompt token
    n_text: int  # tokens of the text, with and without a counterpart, last prompt token not counted


class Pairing(NamedTuple):
    """Which tokens of some texts have a counterpart; last prompt tokens, which always have one, do not count.

    Attributes:
        exact: share whose counterpart ends at the same character.
        earlier: share whose counterpart ends before.
        kept: share without one; their states stay.
        n: tokens.
    """

    exact: float
    earlier: float
    kept: float
    n: int


def place(donor: LM, recipient: LM, one: Prompt, until: int | None = None) -> Places:
    """Pair the tokens of a user turn, and of the reply to it if there is one, each model using its own prompt format.

    With `until`, stop after so many of the recipient's tokens of the text, before the last prompt token.
    """
    whole = until is None
    theirs, ours = (_marked(lm, one, whole) for lm in (donor, recipient))
    ends = np.array(ours.text_ends)
    if theirs.ids == ours.ids:
        columns = partners = np.flatnonzero(ends >= 0)
        exact = np.ones(len(columns), bool)
    else:
        columns, partners, exact = pair_tokens(theirs.text_ends, ours.text_ends)
    in_text = np.flatnonzero(ends >= 0)[:until]
    inside = columns <= in_text.max(initial=-1)
    columns, partners, exact = columns[inside], partners[inside], exact[inside]
    if not len(columns):
        raise InputError(
            f"the text {one.text[:40]!r} ...: no token of {recipient.id} has a counterpart in {donor.id}. Expected "
            "prompt formats that keep the user's words; load the models with template='plain', or leave the text out"
        )
    is_end = (columns == ours.n_prompt - 1) & whole
    stop = len(ours.ids) if whole else int(in_text[-1]) + 1
    last = int(partners[-1]) + 1
    return Places(
        ours.ids[:stop], theirs.ids[:last], int(in_text[0]), columns, partners, exact, is_end, len(in_text) - whole
    )


def _marked(lm: LM, one: Prompt, whole: bool) -> Encoded:
    """Return a text's tokens; where one ends is counted through the user's words, prompt's end and reply."""
    prompt = encode(lm, one.text)
    if not whole:
        return prompt
    end = len(one.text) + 1
    ends = [*prompt.text_ends[:-1], end]
    if not one.response:
        return prompt._replace(text_ends=ends)
    both = encode(lm, one.text, one.response)
    if both.ids[: both.n_prompt] != prompt.ids:
        raise InputError(
            f"{lm.id} joins the end of its prompt format and the reply {one.response[:40]!r} in one token; expected a "
            "reply that begins with a letter or a digit"
        )
    return both._replace(text_ends=ends + [stop if stop < 0 else stop + end for stop in both.text_ends[len(ends) :]])


@checked
def pair_tokens(donor: Sequence[int], recipient: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pair tokens by the characters at which they end.

    Args:
        donor: for each of the donor's tokens where it ends, -1 outside the text.
        recipient: likewise.

    Returns:
        (columns of the recipient's tokens that have a counterpart, the donor's columns, bool: ends at the same
        character), each [pairs].
    """
    columns, partners = (np.flatnonzero(np.array(one) >= 0) for one in (recipient, donor))
    ends, theirs = np.array(recipient)[columns], np.array(donor)[partners]
    # Of tokens that share the bytes of one character, only the last has read it.
    whole = np.append(ends[1:] > ends[:-1], True)[: len(ends)]
    found = np.searchsorted(theirs, np.where(whole, ends, ends - 1), side="right") - 1
    keep = found >= 0
    exact = whole[keep] & (theirs[found[keep]] == ends[keep])
    return columns[keep], partners[found[keep]], exact
