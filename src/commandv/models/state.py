"""What a model is at this moment: weights, prompt format, tokenizer, configuration; and what nobody can vouch for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import xxhash

from commandv.errors import InputError
from commandv.models.identity import hashed
from commandv.models.live import attached, foreign_hooks
from commandv.models.lm import LM
from commandv.models.template import MARK, render
from commandv.storage.files import digest

log = logging.getLogger(__name__)


class Identity(NamedTuple):
    """What a model is at this moment."""

    # hash of all that decides what it computes: every byte of the weights, configuration, tokenizer, and a conversation
    # as its template renders it (with this day's date, where it writes one)
    key: str
    doubts: tuple[str, ...]  # what it does that the key does not tell; what is made meanwhile is not the model's own
    attached: bool  # an adapter of ours is attached


def identity(lm: LM) -> Identity:
    """Return what a model is; its weights are read anew, whatever torch counted."""
    weights = hashed(lm.model, again=True).exact
    doubts = list(_doubts(lm))
    if not weights and not lm.revision:
        doubts.append("its weights cannot be read (offloaded, or in tensors of another library)")
    config = {
        name: value
        for name, value in lm.model.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }
    tuners = [
        [name, str(one.active_adapters), one.disable_adapters, str(one.merged_adapters), str(one.scaling)]
        for name, one in lm.model.named_modules()
        if hasattr(one, "disable_adapters") and hasattr(one, "merged_adapters") and hasattr(one, "scaling")
    ]
    asked = render(lm, [{"role": "user", "content": MARK}])
    parts = [weights or lm.revision, repr(sorted(config.items(), key=str)), tuners, asked, lm.template, lm.chat]
    return Identity(digest(parts, _tokenizer_hash(lm.tokenizer)), tuple(doubts), bool(attached(lm)))


def _tokenizer_hash(tokenizer: Any) -> str:
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    state = tokenizer.backend_tokenizer.to_str().encode()
    return digest(xxhash.xxh3_128(state).hexdigest(), special)


def _doubts(lm: LM) -> Iterator[str]:
    if hooked := foreign_hooks(lm):
        yield f"hooks that others have put on it (on {hooked[0]})"
    replaced = [
        name for name, one in lm.model.named_modules() if "forward" in vars(one) and not hasattr(one, "_hf_hook")
    ]
    if replaced:
        yield f"the forward of {replaced[0] or 'the model'} has been replaced"


def require_own(lm: LM, doing: str) -> None:
    """Refuse a model with an adapter attached before something is done with it; say what else is not its own."""
    if attached(lm):
        raise InputError(f"an adapter is attached to {lm.id}; detach it before {doing}")
    for doubt in _doubts(lm):
        log.warning("%s: %s, which takes part in %s", lm.id, doubt, doing)
