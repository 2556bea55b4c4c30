"""Choosing where and how strongly something acts, by what it does and what it costs on the development split."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.evaluation.outcomes import Outcome, measure
from commandv.evaluation.price import drift, reply_log_probs
from commandv.evaluation.tasks import Task
from commandv.models.layers import LayerChoice, choose_layers
from commandv.models.lm import LM
from commandv.profiles.profile import Rows
from commandv.prompts.sets import PromptSet, load_prompts

SCALES = (0.5, 0.75, 1.0, 1.25)
DEPTH = 0.8  # share of the depth beyond which a layer is too near to the output to be a choice
BUDGET = 0.1  # nats per token


@checked
@dataclass(frozen=True)
class Setting:
    """Where and how strongly something acts.

    Attributes:
        layers: a layer choice in words; see `choose_layers`.
        scale: factor on the deltas.
        rows: of the writing converters; None for those of the link.
    """

    layers: str = "last_third"
    scale: float = 1.0
    rows: Rows | None = None


class Tried(NamedTuple):
    """One setting on the development split.

    Attributes:
        setting: what was tried.
        value: effect: share or mean of what the task's judge finds.
        kl: price: drift on benign text, nats per token.
        side: side effect: what the side task's judge finds; None where there is no side task, or the price alone was
            too much.
        loops: share of the answers that loop; None where it was not looked at.
    """

    setting: Setting
    value: float
    kl: float
    side: float | None = None
    loops: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return setting, effect, price and loops as plain values."""
        where = {"layers": self.setting.layers, "scale": self.setting.scale}
        return {**where, "value": self.value, "kl": self.kl, "loops": self.loops}


@dataclass(frozen=True, eq=False)
class Tuned:
    """The whole sweep and what was chosen.

    Attributes:
        tried: every setting.
        chosen: the best within the budgets; the cheapest when none is.
        within_budget: whether any was.
        affordable: those within the budgets.
    """

    tried: tuple[Tried, ...]
    chosen: Tried
    within_budget: bool
    affordable: tuple[Tried, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, eq=False)
class Choice(Tuned):
    """A sweep over single layers, and the adapter at the chosen layer and strength."""

    adapter: Adapter


@checked
def grid(
    layers: Iterable[str], scales: Iterable[float] = SCALES, rows: Iterable[Rows | None] = (None,)
) -> list[Setting]:
    """Return every combination, the weaker first."""
    return [Setting(*one) for one in itertools.product(layers, sorted(scales), rows)]


@checked
def tune(
    lm: LM,
    task: Task,
    make: Callable[[Setting], Adapter],
    settings: Sequence[Setting],
    *,
    budget: float | None = None,
    most_loops: float | None = None,
    side_task: Task | None = None,
    side_budget: float = 0.0,
    passages: PromptSet | None = None,
    reference: list[Tensor] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
) -> Tuned:
    """Try settings on the development split; the best effect within the budgets of price and side effect wins.

    Of settings that are equally good the cheaper one wins. The test split is never touched.

    Args:
        lm: the recipient, with nothing attached.
        task: the effect.
        make: returns the adapter for a setting, of which it leaves the scale aside.
        settings: what to try; see `grid`.
        budget: most drift allowed, nats per token (KL to the unmodified model); None for no limit.
        most_loops: largest share of answers that may loop; None for no limit.
        side_task: what must stay as it is or get better, for example over-refusal.
        side_budget: how much worse it may get than in the unmodified model.
        passages: text on which drift is measured. Default: `builtin:drift`.
        reference: `reply_log_probs` of the unmodified model on these, to spare computing it again.
        limit: use the first so many development prompts.
        batch_size: prompts per batch.

    Raises:
        InputError: nothing to try.
    """
    if not settings:
        raise InputError("tune: no settings; expected at least one layer choice and one scale")
    text = load_prompts("builtin:drift") if passages is None else passages
    plain = reply_log_probs(lm, text) if reference is None else reference
    tried = [
        attempt(lm, task, make(one), one, passages=text, reference=plain, limit=limit, batch_size=batch_size)[0]
        for one in settings
    ]
    if side_task is None:
        return choose(tried, task.success, budget=budget, most_loops=most_loops)

    def side(setting: Setting | None = None) -> float:
        adapter, scale = (None, 1.0) if setting is None else (make(setting), setting.scale)
        found = measure(lm, side_task, adapter, scale=scale, split="dev", limit=limit, batch_size=batch_size)
        return found.score().value

    affordable = choose(tried, task.success, budget=budget, most_loops=most_loops).affordable
    sides = {one.setting: side(one.setting) for one in affordable}
    tried = [one._replace(side=sides.get(one.setting)) for one in tried]
    plain_side, toward = side(), 1 if side_task.success == "more" else -1
    harmless = {setting for setting, value in sides.items() if toward * (plain_side - value) <= side_budget}
    return choose(tried, task.success, [one for one in tried if one.setting in harmless])


def attempt(
    lm: LM,
    task: Task,
    adapter: Adapter,
    setting: Setting,
    *,
    passages: PromptSet,
    reference: list[Tensor],
    limit: int | None = None,
    batch_size: int = 64,
) -> tuple[Tried, Outcome]:
    """Try one setting on the development split: effect, loops and price; arguments as in `tune`."""
    found = measure(lm, task, adapter, scale=setting.scale, split="dev", limit=limit, batch_size=batch_size)
    price = drift(lm, passages, adapter, scale=setting.scale, reference=reference).value
    return Tried(setting, found.score().value, price, loops=found.loop_rate().value), found


def choose(
    tried: Sequence[Tried],
    success: Literal["more", "less"],
    affordable: Sequence[Tried] | None = None,
    *,
    budget: float | None = None,
    most_loops: float | None = None,
) -> Tuned:
    """Choose among settings that were tried: the best within the budgets, of equally good ones the cheapest.

    `affordable` are those within the budgets, where that is known already; budgets as in `tune`.
    """
    if affordable is None:
        affordable = [
            one
            for one in tried
            if (budget is None or one.kl <= budget) and (most_loops is None or (one.loops or 0.0) <= most_loops)
        ]
    sign = 1 if success == "more" else -1
    if affordable:
        chosen = max(affordable, key=lambda one: (sign * one.value, -one.kl))
    else:
        chosen = min(tried, key=lambda one: one.kl)
    return Tuned(tuple(tried), chosen, bool(affordable), affordable=tuple(affordable))


@checked
def choose_layer(
    lm: LM,
    adapter: Adapter,
    task: Task,
    *,
    layers: LayerChoice | None = None,
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
        budget: as in `tune`, and so are the next two.
        depth: share of the layers, from the first, that may be chosen.
        passages: as in `tune`, and so are the next two.

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
    found = tune(
        lm, task, lambda one: adapter.on_layers([int(one.layers)]), grid(map(str, allowed), strengths), budget=budget,
        side_task=side_task, side_budget=side_budget, passages=passages, limit=limit, batch_size=batch_size,
    )  # fmt: skip
    setting = found.chosen.setting
    final = adapter.on_layers([int(setting.layers)]).scaled(setting.scale)
    return Choice(found.tried, found.chosen, found.within_budget, final, affordable=found.affordable)
