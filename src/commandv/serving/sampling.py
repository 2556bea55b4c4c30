"""Choosing each row's next token as its request wants it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from commandv.errors import InputError

MOST_TOP = 20  # alternatives told beside a token
_NUCLEUS = 1024  # most likely tokens among which a nucleus is looked for, before the whole vocabulary is sorted


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token, as `commandv.generate` does; else logits are divided by it.
        top_p: sample among the fewest tokens that together have this probability.
        seed: of the request's own random numbers; None for fresh ones.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise InputError(f"temperature={self.temperature}: expected 0 to 2")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: expected more than 0, at most 1")

    def random(self) -> random.Random:
        """Return the numbers that a request draws from."""
        return random.Random(self.seed)


class Told(NamedTuple):
    """A chosen token with its log-probability before temperature and top_p, and the most likely ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def choose(logits: Tensor, how: Sequence[Sampling], draws: Sequence[random.Random]) -> list[int]:
    """Return the next token of each row.

    Args:
        logits: float32 [batch, vocabulary], finite but for ruled-out tokens.
        how: of each row.
        draws: of each row.
    """
    tokens = logits.argmax(-1).tolist()
    for i, token in _sampled(logits, [i for i, one in enumerate(how) if one.temperature > 0], how, draws):
        tokens[i] = token
    return tokens


def tell(logits: Tensor, token: int, n: int) -> Told:
    """Return what is told of a token chosen by logits [vocabulary], with `n` alternatives."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(n) if n else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Told(token, float(logprobs[token]), top)


def _sampled(
    logits: Tensor, rows: list[int], how: Sequence[Sampling], draws: Sequence[random.Random]
) -> list[tuple[int, int]]:
    if not rows:
        return []
    temperatures = torch.tensor([how[i].temperature for i in rows], device=logits.device)
    probabilities = (logits[rows] / temperatures[:, None]).softmax(-1)
    whole = [j for j, i in enumerate(rows) if how[i].top_p == 1]
    found = []
    if whole:
        sums = probabilities[whole].double().cumsum(-1)
        wanted = torch.tensor([draws[rows[j]].random() for j in whole], device=logits.device)[:, None] * sums[:, -1:]
        places = torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        found += [(rows[j], token) for j, token in zip(whole, places.tolist(), strict=True)]
    found += [
        (i, _nucleus(probabilities[j], how[i].top_p, draws[i].random())) for j, i in enumerate(rows) if how[i].top_p < 1
    ]
    return found


def _nucleus(probabilities: Tensor, top_p: float, draw: float) -> int:
    best = probabilities.topk(min(_NUCLEUS, len(probabilities)))
    if float(best.values.sum()) < top_p:
        best = probabilities.topk(len(probabilities))
    sums = best.values.double().cumsum(-1)
    inside = int((sums - best.values < top_p).sum())  # a token belongs while those before it fall short
    place = torch.searchsorted(sums[:inside], draw * sums[inside - 1], right=True)
    return int(best.indices[min(int(place), inside - 1)])
