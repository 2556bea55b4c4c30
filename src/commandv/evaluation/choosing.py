"""Choosing the layer and the strength of a steering adapter by what it does and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from commandv.adapters.adapter import Adapter
from commandv.errors import InputError
from commandv.evaluation.calibration import calibrate
from commandv.evaluation.tasks import Task, measure
from commandv.models.layers import LayerChoice, choose_layers
from commandv.models.load import LM
from commandv.prompts.sets import PromptSet

DEPTH = 0.8  # share of the depth beyond which a layer is too near to the output to be a choice
BUDGET = 0.1  # nats per token


class Tried(NamedTuple):
    """One layer and strength.

    Attributes:
        layer: the layer.
        strength: factor on the adapter's deltas.
        value: effect: what the task's judge finds on the development split.
        kl: cost: drift on benign text, nats per token.
        side: side effect: what the side task's judge finds on its development split; None where there is no side task
            or the cost alone was too much.
    """

    layer: int
    strength: float
    value: float
    kl: float
    side: float | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """The whole sweep and what was chosen.

    Attributes:
        tried: every layer and strength.
        chosen: the best within the budgets; the cheapest when none is.
        within_budget: whether any was.
        adapter: the adapter with the chosen layer and strength.
    """

    tried: tuple[Tried, ...]
    chosen: Tried
    within_budget: bool
    adapter: Adapter


def choose_layer(
    lm: LM,
    adapter: Adapter,
    task: Task,
    *,
    layers: LayerChoice | str | Iterable[int] | None = None,
    strengths: Sequence[float] = (1.0,),
    budget: float | None = BUDGET,
    side_task: Task | None = None,
    side_budget: float = 0.0,
    depth: float = DEPTH,
    passages: PromptSet | None = None,
    limit: int | None = None,
    batch_size: int = 64,
) -> Choice:
    """Choose one layer and a strength on the development split: the best effect under a budget of side effects.

    As Arditi et al. choose a refusal direction (arXiv 2406.11717, appendix C): layers beyond 80 % of the depth and
    those that change benign text by more than a budget of KL are left aside, then the effect decides. Departures:
    effect and side effect are judged answers instead of the refusal token's probability; strengths are swept as well.

    Args:
        lm: the model, with nothing attached.
        adapter: `steer(..., layers="all_layers")` or carried directions; each of its layers is tried alone.
        task: the effect; its test split is never touched.
        layers: the layers to try. Default: all of the adapter's.
        strengths: factors on the adapter's deltas.
        budget: most drift allowed, nats per token; None for no limit.
        side_task: what must stay as it is or get better, for example over-refusal.
        side_budget: how much worse it may get than in the unmodified model.
        depth: share of the layers, from the first, that may be chosen.
        passages: text on which drift is measured. Default: `builtin:drift`.
        limit: use the first so many development prompts.
        batch_size: prompts per batch.

    Raises:
        InputError: no layer or strength to try, or a depth that is no share.
    """
    if not 0 < depth <= 1:
        raise InputError(f"depth={depth}: expected a share above 0, at most 1")
    wanted = adapter.layers if layers is None else choose_layers(layers, lm.n_layers)
    allowed = [layer for layer in adapter.layers if layer in wanted and layer < depth * lm.n_layers]
    if not allowed:
        raise InputError(
            f"{adapter.name}: acts on layers {adapter.layers}; none of them is among {wanted} and in the first "
            f"{depth:.0%} of {lm.n_layers} layers"
        )
    swept = calibrate(
        lm, task, lambda layer: adapter.on_layers([int(layer)]), layers=[str(layer) for layer in allowed],
        scales=strengths, budget=budget, passages=passages, limit=limit, batch_size=batch_size,
    )  # fmt: skip
    tried = [Tried(int(one.layers), one.scale, one.value, one.kl) for one in swept.tried]
    affordable = [one for one in tried if budget is None or one.kl <= budget]
    if side_task is not None:
        sides = _sides(lm, adapter, side_task, affordable, limit, batch_size)
        tried = [one._replace(side=sides.get((one.layer, one.strength))) for one in tried]
        plain = measure(lm, side_task, split="dev", limit=limit, batch_size=batch_size).score().value
        toward = 1 if side_task.success == "more" else -1
        affordable = [one for one in tried if one.side is not None and toward * (plain - one.side) <= side_budget]
    sign = 1 if task.success == "more" else -1
    if affordable:
        chosen = max(affordable, key=lambda one: (sign * one.value, -one.kl))
    else:
        chosen = min(tried, key=lambda one: one.kl)
    final = adapter.on_layers([chosen.layer]).scaled(chosen.strength)
    return Choice(tuple(tried), chosen, bool(affordable), final)


def _sides(
    lm: LM, adapter: Adapter, task: Task, tried: Sequence[Tried], limit: int | None, batch_size: int
) -> dict[tuple[int, float], float]:
    """Return what the side task's judge finds for each layer and strength."""
    found = {}
    for one in tried:
        alone = adapter.on_layers([one.layer])
        outcome = measure(lm, task, alone, scale=one.strength, split="dev", limit=limit, batch_size=batch_size)
        found[one.layer, one.strength] = outcome.score().value
    return found
