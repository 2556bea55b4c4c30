"""One model, one adapter, one task: the table of a study for a quick look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from commandv.adapters.adapter import Adapter
from commandv.errors import FormatError, require_seed
from commandv.evaluation.arms import ARMS, PASTED, UNMODIFIED, Made, make_arm
from commandv.evaluation.catalogue import load_task
from commandv.evaluation.judges import load_judge
from commandv.evaluation.material import Material
from commandv.evaluation.meter import Meter, price_scores
from commandv.evaluation.outcomes import Outcome, require_outcome_place, write_outcome
from commandv.evaluation.scores import Score
from commandv.evaluation.statistics import Comparison, compare, kappa
from commandv.evaluation.tasks import Judge, Task
from commandv.models.lm import LM
from commandv.storage.files import file_name

ADAPTED = "with the adapter"  # what the pasted arm is called where nothing is pasted


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    task: Task  # what was asked
    rows: dict[str, list[Comparison]]  # judge -> one comparison per arm
    price: dict[str, dict[str, Score]]  # arm -> measure -> what it costs on benign text; see `prices`
    loops: dict[str, Score]  # arm -> share of its answers that loop
    words: dict[str, float]  # arm -> mean number of words of its answers
    # (judge, judge, Cohen's kappa, n) of every two judges, over all arms; NaN where both only ever gave one label
    agreement: list[tuple[str, str, float, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a reader must know: arms that were left out

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "task": self.task.name,
            "success": self.task.success,
            "judges": {
                judge: [
                    {k: v._asdict() if isinstance(v, Score) else v for k, v in row._asdict().items()} for row in rows
                ]
                for judge, rows in self.rows.items()
            },
            "price": {
                arm: {measure: score._asdict() for measure, score in many.items()} for arm, many in self.price.items()
            },
            "loops": {arm: score._asdict() for arm, score in self.loops.items()},
            "words": self.words,
            "agreement": [{"judges": [a, b], "kappa": value, "n": n} for a, b, value, n in self.agreement],
            "notes": self.notes,
        }


def evaluate(
    lm: LM,
    task: Task | str,
    adapter: Adapter | None = None,
    *,
    scale: float = 1.0,
    judges: Sequence[str | Judge] = (),
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
        judges: judges, or specifications that `load_judge` takes, instead of the task's own judge.
        controls: False to leave out the random adapter of equal norm; the notes say so.
        seed: of the random control.
        limit: use the first so many test prompts.
        batch_size: prompts per batch.
        out: directory for a JSONL file per arm and judge: prompt, label and, where the task keeps them, answer.
    """
    require_seed(seed)
    asked = load_task(task) if isinstance(task, str) else task
    panel = [load_judge(one) if isinstance(one, str) else one for one in judges] or [asked.judge]
    made: dict[str, Made] = {UNMODIFIED: Made()}
    notes = [f"Prompts with {lm.format}."] if str(lm.format) else []
    if adapter is not None:
        made[ADAPTED] = Made(adapter)
        material = Material(adapter=adapter, recipient_lm=lm, seed=seed)
        others = [name for name in ARMS if name not in (UNMODIFIED, PASTED)]
        possible = [name for name in others if not material.lacks(ARMS[name].needs)]
        made |= {name: make_arm(name, material) for name in possible if controls}
        if not controls:
            notes.append("All controls were left out: without them a rate means little.")
        else:
            missing = ", ".join(name for name in others if name not in possible)
            notes.append(f"Left out, because they need the donor as well: {missing}. A study file runs them all.")
    files = _files(out, list(made), panel) if out is not None else {}
    # The same answers for every judge: tasks that ask the same are asked once.
    tasks = [replace(asked, name=f"{asked.name}:{n}", judge=judge, keep_answers=True) for n, judge in enumerate(panel)]
    meter = Meter(lm, tasks, limit=limit, batch_size=batch_size)
    found = {name: meter.measured(one, scale) for name, one in made.items()}
    outcomes = {
        name: [replace(outcome, task=asked.name, arm=name) for outcome in one.outcomes.values()]
        for name, one in found.items()
    }
    rows = {}
    for number, judge in enumerate(panel):
        labels = {name: [many[number].labels] for name, many in outcomes.items()}
        rows[judge.name] = compare(labels, judge.unit, asked.success, reference=UNMODIFIED)
        for name, many in outcomes.items():
            if files:
                write_outcome(many[number], asked, files[name, judge.name])  # answers only where the task keeps them
    return Evaluation(
        asked,
        rows,
        {name: price_scores(one.price) for name, one in found.items()},
        {name: many[0].loop_rate() for name, many in outcomes.items()},
        {name: many[0].mean_words() for name, many in outcomes.items()},
        _agreement(panel, outcomes),
        notes,
    )


def _files(out: Path, arms: Sequence[str], panel: Sequence[Judge]) -> dict[tuple[str, str], Path]:
    """Return where the labels of each arm and judge go, before anything is generated."""
    if out.exists() and not out.is_dir():
        raise FormatError(f"{out}: a file, expected a directory or nothing; choose another place")
    files = {
        (name, judge.name): out / f"{file_name(name)}-{file_name(judge.name)}.jsonl" for name in arms for judge in panel
    }
    for file in files.values():
        require_outcome_place(file)
    return files


def _agreement(panel: Sequence[Judge], outcomes: dict[str, list[Outcome]]) -> list[tuple[str, str, float, int]]:
    """Return Cohen's kappa of every two judges over the answers of all arms."""
    found = []
    for i, one in enumerate(panel):
        for j, other in enumerate(panel[:i]):
            if one.unit == other.unit == "rate":
                a = [label for many in outcomes.values() for label in many[j].labels]
                b = [label for many in outcomes.values() for label in many[i].labels]
                found.append((other.name, one.name, *kappa(a, b)))
    return found
