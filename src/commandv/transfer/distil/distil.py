"""Distilling demonstrations into an adapter of a recipient: forward passes and closed forms only."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace

import torch

from commandv.adapters.adapter import Adapter
from commandv.arguments import checked
from commandv.errors import InputError, require_seed
from commandv.models.lm import LM
from commandv.models.state import require_own
from commandv.transfer.distil.context import FEWEST, MANY, Context
from commandv.transfer.distil.demonstrations import Demonstrations
from commandv.transfer.distil.vocabulary import Answers, Vocabulary

Method = Context | Vocabulary | Answers
METHODS: dict[str, type[Method]] = {one.name: one for one in (Context, Vocabulary, Answers)}
AUTO = "auto"
RANK, RANK_OF_MANY = 16, 64

log = logging.getLogger(__name__)


@checked
def distil(
    recipient: LM,
    demonstrations: Demonstrations,
    *,
    by: str | Method = AUTO,
    rank: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Adapter:
    """Make a native adapter of the recipient that behaves as the demonstrations do.

    `"auto"` takes the context: into a base model, one without a chat template, that of many strong demonstrations
    (`Context(tokens=24, sets=2, size=16, strongest=True)`), as far as it is known what the adapter changes. It takes
    the vocabulary where there are fewer than eight demonstrations, or the recipient is recurrent.

    Args:
        recipient: the model, with nothing attached; its weights do not change.
        demonstrations: of the behaviour.
        by: `"context"`, `"vocabulary"`, `"answers"`, `"auto"`, or one of the methods with settings of its own, as
            `Context(tokens=10, sets=6, least=1.0)`.
        rank: of each fit. Default: 16, and 64 where `"auto"` takes many demonstrations; or the recipient's width.
        seed: of the sets of demonstrations, of the prompts that are held out and of the places used.
        batch_size: prompts per forward pass.

    Returns:
        The adapter, acting at the last prompt token and the first generated ones (l1+gk).

    Raises:
        InputError: an unknown method, too few demonstrations, contexts that do not fit, tokenizers that share too few
            tokens or have a head for the vocabulary, or something attached to the recipient.
    """
    require_own(recipient, "distilling")
    require_seed(seed)
    if batch_size < 1 or (rank is not None and not 1 <= rank <= recipient.d_model):
        raise InputError(f"rank={rank}, batch_size={batch_size}: expected 1 or more, a rank up to {recipient.d_model}")
    if isinstance(by, str) and by not in (AUTO, *METHODS):
        raise InputError(f"by={by!r}: expected one of {', '.join((AUTO, *METHODS))}")
    if by == AUTO:
        method = choose(recipient, demonstrations)
        log.info("%s into %s by %s", demonstrations.name, recipient.id, method)
    else:
        method = METHODS[by]() if isinstance(by, str) else by
    rank = rank or min(RANK_OF_MANY if method == MANY else RANK, recipient.d_model)
    with torch.inference_mode():
        made, facts = method(recipient, demonstrations, rank=rank, seed=seed, batch_size=batch_size)
    provenance = {
        "made_by": "distil",
        "by": method.name,
        "settings": asdict(method) | {"rank": rank, "seed": seed},
        "demonstrations": {"hash": demonstrations.hash, "n": len(demonstrations), "donor": demonstrations.donor.id},
        **facts,
    }
    # Tensors made in inference mode could not take part in a training later.
    own = {
        layer: tuple(
            replace(one, read=one.read.clone(), bias=one.bias.clone(), write=one.write.clone()) for one in many
        )
        for layer, many in made.items()
    }
    return Adapter(own, recipient.ref, demonstrations.name, provenance)


def choose(recipient: LM, demonstrations: Demonstrations) -> Method:
    """Return the method that `"auto"` takes; see `distil`."""
    if recipient.recurrent or len(demonstrations) < FEWEST:
        return Vocabulary()
    return Context() if recipient.chat or demonstrations.changes is None else MANY
