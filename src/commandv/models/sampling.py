"""Sampling answers, prompt by prompt, from a seed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import transformers

from commandv.errors import InputError

_STEP = 1_000_003  # between the seeds of prompts


class Sampled(transformers.LogitsProcessor):
    """Makes the likeliest token of a greedy step a sampled one: argmax(log p / T + Gumbel noise), p cut to its top.

    A prompt's noise depends on the seed and the prompt's number alone, not on the batch it is answered in.

    Source: the Gumbel-max trick; nucleus sampling, Holtzman et al. 2020 (arXiv 1904.09751).
    """

    def __init__(self, temperature: float, top_p: float, seed: int, numbers: Iterable[int]) -> None:
        self._temperature = temperature
        self._top = transformers.TopPLogitsWarper(top_p) if top_p < 1 else None
        self._generators = [torch.Generator().manual_seed(seed + _STEP * number) for number in numbers]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores [batch, vocabulary] of the next token, with noise."""
        scaled = scores.float() / self._temperature
        if self._top is not None:
            scaled = self._top(input_ids, scaled)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=one) for one in self._generators])
        tiny = torch.finfo(torch.float32).tiny
        exponential = (-torch.log(uniform.clamp(min=tiny))).clamp(min=tiny)
        return scaled - torch.log(exponential).to(scaled.device)


def require_sampling(temperature: float, top_p: float) -> None:
    """Raise `InputError` unless a temperature and a top-p can be sampled with."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature={temperature}: expected 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: expected above 0, and at most 1")
