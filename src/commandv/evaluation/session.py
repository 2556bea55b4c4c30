"""One model, one adapter, one task: the table of a study for a quick look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from commandv.adapters.adapter import Adapter
from commandv.cli.tables import comparison_table
from commandv.errors import FormatError
from commandv.evaluation.catalogue import load_task, require_outcome_place, write_outcome
from commandv.evaluation.controls import CONTROLS
from commandv.evaluation.judges import load_judge
from commandv.evaluation.price import drift, reply_log_probs
from commandv.evaluation.scores import Score
from commandv.evaluation.statistics import Comparison, compare, kappa
from commandv.evaluation.tasks import Outcome, Task, measure
from commandv.models.load import LM
from commandv.prompts.sets import load_prompts
from commandv.transfer.paste import random_like

UNMODIFIED, ADAPTED = "unmodified", "with the adapter"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        task: what was asked.
        rows: judge -> one comparison per arm.
        price: arm -> drift from the unmodified model, nats per token.
        loops: arm -> share of its answers that loop.
        agreement: (judge, judge, Cohen's kappa, n) of every two judges, over all arms; NaN where both only ever gave
            one label.
        notes: what a reader must know: controls that were left out.
    """

    task: Task
    rows: dict[str, list[Comparison]]
    price: dict[str, Score]
    loops: dict[str, Score]
    agreement: list[tuple[str, str, float, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tables(self) -> list[Table]:
        """Return a table per judge."""
        aim = "more is the aim" if self.task.success == "more" else "less is the aim"
        return [
            comparison_table(f"{self.task.name}, judged by {judge} ({aim})", rows, self.price, self.loops)
            for judge, rows in self.rows.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "task": self.task.name,
            "success": self.task.success,
            "judges": {judge: [_plain(row) for row in rows] for judge, rows in self.rows.items()},
            "price": {arm: score._asdict() for arm, score in self.price.items()},
            "loops": {arm: score._asdict() for arm, score in self.loops.items()},
            "agreement": [{"judges": [a, b], "kappa": value, "n": n} for a, b, value, n in self.agreement],
            "notes": self.notes,
        }


def evaluate(
    lm: LM,
    task: Task | str,
    adapter: Adapter | None = None,
    *,
    scale: float = 1.0,
    judges: Sequence[str] = (),
    controls: bool = True,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 64,
    out: Path | None = None,
) -> Evaluation:
    """Measure a task without and with an adapter, beside a random one of equal norm, and what each costs.

    Args:
        lm: the model, with nothing attached.
        task: a task, or its name as `load_task` takes it.
        adapter: to measure; without one only the unmodified model is.
        scale: factor on the adapter's deltas, and on its controls'.
        judges: specifications that `load_judge` takes, instead of the task's own judge.
        controls: False to leave out the random adapter of equal norm; the notes say so.
        seed: of the random control.
        limit: use the first so many test prompts.
        batch_size: prompts per batch.
        out: directory for a JSONL file per arm and judge: prompt, label and, where the task keeps them, answer.
    """
    asked = load_task(task) if isinstance(task, str) else task
    arms: dict[str, tuple[Adapter | None, float]] = {UNMODIFIED: (None, 1.0)}
    notes = [f"Prompts with {lm.format}."] if str(lm.format) else []
    if adapter is not None:
        arms[ADAPTED] = (adapter, scale)
        if not controls:
            notes.append("All controls were left out: without them a rate means little.")
        else:
            arms["random"] = (random_like(adapter, seed), scale)
            missing = ", ".join(name for name in CONTROLS if name != "random")
            notes.append(f"Left out, because they need the donor as well: {missing}. A study file runs them all.")
    panel = [load_judge(spec) for spec in judges] or [asked.judge]
    if out is not None and out.exists() and not out.is_dir():
        raise FormatError(f"{out}: a file, expected a directory or nothing; choose another place")
    files = {
        (name, judge.name): out / f"{_slug(name)}-{_slug(judge.name)}.jsonl"
        for name in arms
        for judge in panel
        if out is not None
    }
    for file in files.values():
        require_outcome_place(file)
    outcomes = {name: _judged(lm, asked, one, factor, panel, limit, batch_size) for name, (one, factor) in arms.items()}
    passages = load_prompts("builtin:drift")
    price = {}
    if adapter is not None:
        reference = reply_log_probs(lm, passages)
        price = {
            name: drift(lm, passages, one, scale=factor, reference=reference)
            for name, (one, factor) in arms.items()
            if one is not None
        }
    rows = {}
    for number, judge in enumerate(panel):
        labels = {name: [found[number].labels] for name, found in outcomes.items()}
        rows[judge.name] = compare(labels, judge.unit, asked.success, reference=UNMODIFIED)
        if out is not None:
            for name, found in outcomes.items():
                one = replace(found[number], arm=name)
                write_outcome(one, asked, files[name, judge.name])
    looping = {name: found[0].loop_rate() for name, found in outcomes.items()}
    return Evaluation(asked, rows, price, looping, _agreement(panel, outcomes), notes)


def _judged(
    lm: LM,
    task: Task,
    adapter: Adapter | None,
    scale: float,
    panel: Sequence[Any],
    limit: int | None,
    batch_size: int,
) -> list[Outcome]:
    """Generate once and let every judge label the same answers."""
    first = measure(lm, replace(task, judge=panel[0], keep_answers=True), adapter, scale=scale, limit=limit,
                    batch_size=batch_size)  # fmt: skip
    prompts = task.test[:limit].prompts
    many = [first, *(replace(first, unit=one.unit, labels=tuple(one(prompts, first.answers))) for one in panel[1:])]
    return many if task.keep_answers else [replace(one, answers=()) for one in many]


def _agreement(panel: Sequence[Any], outcomes: dict[str, list[Outcome]]) -> list[tuple[str, str, float, int]]:
    """Return Cohen's kappa of every two judges over the answers of all arms."""
    found = []
    for i, one in enumerate(panel):
        for j, other in enumerate(panel[:i]):
            if one.unit == other.unit == "rate":
                a = [label for many in outcomes.values() for label in many[j].labels]
                b = [label for many in outcomes.values() for label in many[i].labels]
                found.append((other.name, one.name, *kappa(a, b)))
    return found


def _plain(row: Comparison) -> dict[str, Any]:
    """Return a comparison with its scores as mappings."""
    return {key: value._asdict() if isinstance(value, Score) else value for key, value in row._asdict().items()}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in name)
