"""Choosing next tokens: the likeliest ones, or samples from a seed, each row of a batch in its own way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from commandv.errors import InputError, require_seed

_NUCLEUS = 1024  # most likely tokens among which a nucleus is looked for, before the whole vocabulary is sorted
_STEP = 1_000_003  # between the seeds of prompts


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        InputError: a temperature outside 0 to 2, a top-p outside 0 to 1, or a seed that is none.
    """

    temperature: float = 0.0  # 0 takes the most likely token; else logits are divided by it
    top_p: float = 1.0  # sample among the fewest tokens that together have this probability
    seed: int | None = None  # of the random numbers; None for fresh ones

    def __post_init__(self) -> None:
        if self.seed is not None:
            require_seed(self.seed)
        if not 0 <= self.temperature <= 2:
            raise InputError(f"temperature={self.temperature}: expected 0 to 2")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: expected more than 0, at most 1")

    def random(self, number: int = 0) -> random.Random:
        """Return the numbers that one of several prompts draws from, a number a token, whatever its batch."""
        return random.Random(None if self.seed is None else self.seed + _STEP * number)


def choose(logits: Tensor, how: Sequence[Sampling], draws: Sequence[random.Random]) -> list[int]:
    """Return the next token of each row of logits, float32 [batch, vocabulary], finite but for ruled-out tokens.

    Source: nucleus sampling, Holtzman et al. 2020 (arXiv 1904.09751).
    """
    tokens = logits.argmax(-1).tolist()
    for i, token in _sampled(logits, [i for i, one in enumerate(how) if one.temperature > 0], how, draws):
        tokens[i] = token
    return tokens


class Sampled(transformers.LogitsProcessor):
    """Leaves of each step's tokens the one that `choose` samples, so that greedy decoding takes it."""

    def __init__(self, how: Sampling, numbers: Sequence[int]) -> None:
        self._how, self._draws = [how] * len(numbers), [how.random(number) for number in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [batch, vocabulary] of which all but the chosen ones are minus infinity."""
        tokens = torch.tensor(choose(scores.float(), self._how, self._draws), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


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
