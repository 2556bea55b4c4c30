"""Choosing the strength: scale and layers by what they do and what they cost on the development split."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.errors import InputError
from commandv.evaluation.price import drift, reply_log_probs
from commandv.evaluation.tasks import Task, measure
from commandv.models.load import LM
from commandv.prompts.sets import PromptSet, load_prompts

SCALES = (0.5, 0.75, 1.0, 1.25)


class Setting(NamedTuple):
    """One setting that was tried.

    Attributes:
        layers: a layer choice by name.
        scale: factor on the deltas.
        value: share or mean of what the task's judge finds, on the development split.
        kl: drift on benign text, nats per token.
    """

    layers: str
    scale: float
    value: float
    kl: float


@dataclass(frozen=True)
class Calibration:
    """The whole curve and the setting that was chosen.

    Attributes:
        tried: every setting, by layers, then by scale.
        chosen: the best one within the budget; the cheapest one when none is.
        within_budget: whether any was.
    """

    tried: tuple[Setting, ...]
    chosen: Setting
    within_budget: bool

    def monotone(self, layers: str) -> bool:
        """True when along the scales of one layer choice the effect only ever rises, or only ever falls."""
        values = [one.value for one in self.tried if one.layers == layers]
        steps = [b - a for a, b in itertools.pairwise(values)]
        return all(step >= 0 for step in steps) or all(step <= 0 for step in steps)


def calibrate(
    lm: LM,
    task: Task,
    make: Callable[[str], Adapter],
    *,
    layers: Sequence[str] = ("last_third",),
    scales: Sequence[float] = SCALES,
    budget: float | None = None,
    passages: PromptSet | None = None,
    reference: list[Tensor] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
) -> Calibration:
    """Try every layer choice and scale on the development split; the best within a budget of drift wins.

    Of settings that are equally good the cheaper one wins. The test split is never touched.

    Args:
        lm: the recipient, with nothing attached.
        task: whose development split is used.
        make: returns the adapter for a layer choice.
        layers: layer choices by name.
        scales: factors on the deltas.
        budget: most drift allowed, nats per token (KL to the unmodified model); None for no limit.
        passages: text on which drift is measured. Default: `builtin:drift`.
        reference: `reply_log_probs` of the unmodified model on these, to spare computing it again.
        limit: use the first so many development prompts.
        batch_size: prompts per batch.

    Raises:
        InputError: nothing to try.
    """
    if not layers or not scales:
        raise InputError("calibrate: expected at least one layer choice and one scale")
    text = load_prompts("builtin:drift") if passages is None else passages
    plain = reply_log_probs(lm, text) if reference is None else reference
    tried = []
    for choice in layers:
        adapter = make(choice)
        for scale in sorted(scales):
            found = measure(lm, task, adapter, scale=scale, split="dev", limit=limit, batch_size=batch_size)
            cost = drift(lm, text, adapter, scale=scale, reference=plain)
            tried.append(Setting(choice, scale, found.score().value, cost.value))
    affordable = [one for one in tried if budget is None or one.kl <= budget]
    sign = 1 if task.success == "more" else -1
    if affordable:
        chosen = max(affordable, key=lambda one: (sign * one.value, -one.kl))
    else:
        chosen = min(tried, key=lambda one: one.kl)
    return Calibration(tuple(tried), chosen, bool(affordable))
