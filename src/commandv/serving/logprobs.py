"""What is told of a chosen token beside its text."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MOST_TOP = 20  # alternatives told beside a token


class Told(NamedTuple):
    """A chosen token with its log-probability before temperature and top_p, and the most likely ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def tell(logits: Tensor, token: int, n: int) -> Told:
    """Return what is told of a token chosen by logits [vocabulary], with `n` alternatives."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(n) if n else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Told(token, float(logprobs[token]), top)
