"""Measuring arms on one model: every arm on the same prompts and the same passages, effect and price together."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.arguments import checked
from commandv.evaluation.arms import Made
from commandv.evaluation.outcomes import Outcome, answered, judged
from commandv.evaluation.price import MEASURES, prices, reply_log_probs
from commandv.evaluation.scores import Score, geometric_mean, mean
from commandv.evaluation.tasks import Task
from commandv.evaluation.tuning import Setting, Tuned, tune
from commandv.models.lm import LM
from commandv.prompts.sets import PromptSet, load_prompts


@dataclass(frozen=True, eq=False)
class Measured:
    """What one arm did.

    Attributes:
        outcomes: task -> labels, loops, lengths and, where the task keeps them, answers.
        price: measure -> passage by passage; see `prices`.
        seconds: wall clock of measuring.
    """

    outcomes: dict[str, Outcome]
    price: dict[str, list[float]]
    seconds: float


@checked
class Meter:
    """Measures arms on one model with nothing attached; what the unmodified model predicts is read once."""

    def __init__(
        self,
        lm: LM,
        tasks: Sequence[Task],
        *,
        passages: PromptSet | None = None,
        limit: int | None = None,
        batch_size: int = 64,
    ) -> None:
        """Prepare; nothing is run yet.

        Args:
            lm: the model.
            tasks: what is asked, the behaviour's own task first, then side effects.
            passages: benign text on which the price is measured. Default: `builtin:drift`.
            limit: use the first so many test prompts.
            batch_size: prompts per batch.
        """
        self.lm, self.tasks, self.limit, self.batch_size = lm, list(tasks), limit, batch_size
        self.passages = load_prompts("builtin:drift") if passages is None else passages

    @functools.cached_property
    def reference(self) -> list[Tensor]:
        """What the unmodified model predicts along the passages."""
        return reply_log_probs(self.lm, self.passages)

    def on(self, tasks: Sequence[Task]) -> Meter:
        """Return a meter of the same model for other tasks."""
        if [task.name for task in tasks] == [task.name for task in self.tasks]:
            return self
        return Meter(self.lm, tasks, passages=self.passages, limit=self.limit, batch_size=self.batch_size)

    def measured(self, made: Made, scale: float = 1.0) -> Measured:
        """Measure an arm on the test split of every task, and its price."""
        began, adapter = time.monotonic(), made.adapter
        outcomes: dict[str, Outcome] = {}
        answers: dict[tuple[str, int], list[str]] = {}  # tasks that ask the same are asked once
        for task in self.tasks:
            key = (task.test.hash, task.max_new_tokens)
            if key not in answers:
                answers[key] = answered(
                    self.lm, task, adapter, scale=scale, limit=self.limit, turns=made.turns, batch_size=self.batch_size
                )
            outcomes[task.name] = judged(task, answers[key])
        changed = None
        if adapter is not None or made.turns:
            changed = reply_log_probs(self.lm, self.passages, adapter, scale=scale, turns=made.turns)
        price = prices(self.lm, self.passages, self.reference, changed)
        return Measured(outcomes, price, round(time.monotonic() - began, 1))

    def tuned(
        self,
        make: Callable[[Setting], Adapter],
        settings: Sequence[Setting],
        *,
        budget: float | None = None,
        limit: int | None = None,
    ) -> Tuned:
        """Choose a setting on the development split of the first task; see `tune`."""
        return tune(
            self.lm, self.tasks[0], make, settings, budget=budget, passages=self.passages, reference=self.reference,
            limit=limit, batch_size=self.batch_size,
        )  # fmt: skip


@checked
def price_scores(price: dict[str, list[float]]) -> dict[str, Score]:
    """Return a price with 95 % intervals over passages: means of KL, geometric means of perplexities.

    Args:
        price: as in `Measured.price`, or averaged over seeds: the same passages in every seed are no new evidence.
    """
    found = {}
    for measure in MEASURES:
        values = [one for one in price.get(measure, []) if one == one]
        if values and measure.startswith("kl"):
            found[measure] = mean(measure, values, "nats per token")
        elif values:
            found[measure] = geometric_mean(measure, values, "perplexity")
    return found
