"""What a run found, as numbers: every arm of a pair and behaviour over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from commandv.errors import InputError
from commandv.evaluation.arms import ARMS, PASTED, UNMODIFIED
from commandv.evaluation.meter import price_scores
from commandv.evaluation.results import Arm, Cell, Run
from commandv.evaluation.scores import Score, mean, pooled
from commandv.evaluation.statistics import Comparison, compare
from commandv.evaluation.verdicts import DONOR, NOT_MEASURED, Labels, Success, Verdict, verdict

ORDER = (*ARMS, DONOR)


class Row(NamedTuple):
    """One arm of one table, over all seeds."""

    arm: str  # its name
    # score, difference from the unmodified recipient, p-values, recovered fraction; None without any label
    found: Comparison | None
    by_seed: list[float]  # share or mean of each seed's own labels
    unjudged: int  # answers that the judge gave no label
    # measure -> mean, each passage or answer averaged over seeds first: they come back in every seed
    price: dict[str, Score]
    scales: list[float]  # distinct factors on the deltas, over seeds
    layers: list[int]  # distinct recipient layers acted on, over seeds


@dataclass(frozen=True)
class Table:
    """One task of one pair and behaviour."""

    task: str  # what was asked
    unit: str  # of the labels
    success: Success  # whether more or less is the aim
    rows: list[Row]  # one an arm, in the order of `ORDER`, then others
    verdict: Verdict  # of the paste
    notes: list[str]  # what a reader must know and no column tells

    def score(self, arm: str) -> Score | None:
        """Return an arm's figure."""
        return next((row.found.score for row in self.rows if row.arm == arm and row.found), None)


@dataclass(frozen=True)
class Group:
    """All seeds of one donor, recipient and behaviour; `tables` starts with the behaviour's own task."""

    donor: str
    recipient: str
    behaviour: str
    cells: list[Cell]
    tables: list[Table]

    @property
    def pair(self) -> str:
        """Donor and recipient."""
        return f"{self.donor} → {self.recipient}"

    @property
    def verdict(self) -> Verdict:
        """The verdict on the behaviour's own task."""
        return self.tables[0].verdict if self.tables else Verdict(NOT_MEASURED, "no cell has results")


def groups(run: Run) -> list[Group]:
    """Return the pairs and behaviours of a run, in the order in which its cells first name them."""
    by_key: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in run.cells:
        by_key.setdefault((cell.donor, cell.recipient, cell.behaviour), []).append(cell)
    found = []
    for key, cells in by_key.items():
        done = sorted((cell for cell in cells if cell.state == "done"), key=lambda cell: cell.seed)
        # A study measures the behaviour's own task first.
        tasks = dict.fromkeys(task for cell in done for arm in cell.arms for task in arm.labels)
        found.append(Group(*key, done, [_table(done, task) for task in tasks]))
    return found


def _table(cells: Sequence[Cell], task: str) -> Table:
    arms: dict[str, list[Arm | None]] = {}
    for i, cell in enumerate(cells):
        for arm in cell.arms:
            if task in arm.labels:
                arms.setdefault(arm.method, [None] * len(cells))[i] = arm
    names = sorted(arms, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    unit = next((arm.units[task] for many in arms.values() for arm in many if arm and task in arm.units), "rate")
    success, notes = _success(cells, task)
    labels = {name: _labels(arms[name], task) for name in names}
    judged = {name: one for name, one in labels.items() if any(label is not None for row in one for label in row)}
    found, problems = _compared(judged, unit, success)
    rows = [_row(name, [arm for arm in arms[name] if arm], task, found.get(name)) for name in names]
    notes += problems
    if unjudged := [f"{row.arm} {row.unjudged}" for row in rows if row.unjudged]:
        notes.append(f"Answers without a judgment: {', '.join(unjudged)}.")
    if len(cells) == 1:
        notes.append("One seed: nothing is said of how the figures vary between seeds.")
    if short := [name for name in names if None in arms[name]]:
        notes.append(f"Measured with some seeds only: {', '.join(short)}.")
    missing = {name: why for cell in cells for name, why in cell.missing.items()}
    notes += [f"{name} could not be made: {why}." for name, why in missing.items()]
    for name in names:
        if name in judged and name != PASTED and name in ARMS and ARMS[name].by:
            word, why = verdict(judged, found, unit, success, arm=name)
            notes.append(f"By {ARMS[name].by} it {word}: {why}.")
    return Table(task, unit, success, rows, verdict(judged, found, unit, success), notes)


def _success(cells: Sequence[Cell], task: str) -> tuple[Success, list[str]]:
    """Return the aim that the cells state in `settings["success"][task]`; say so where they state none."""
    for cell in cells:
        stated: Any = cell.settings.get("success", {}).get(task)
        if stated in ("more", "less"):
            return stated, []
    return "more", ["The run does not say whether more or less is the aim; more was taken."]


def _labels(arms: Sequence[Arm | None], task: str) -> Labels:
    """Return labels seed by seed, without judgment where a seed has no such arm; one row if only one seed has it."""
    present = [arm.labels[task] for arm in arms if arm]
    if len(present) == 1:
        return present
    return [arm.labels[task] if arm else [None] * len(present[0]) for arm in arms]


def _compared(judged: dict[str, Labels], unit: str, success: Success) -> tuple[dict[str, Comparison], list[str]]:
    """Compare every arm with the unmodified recipient; the donor is another model and gets its figure only."""
    alone = {name: Comparison(name, pooled(name, one, unit)) for name, one in judged.items()}
    if UNMODIFIED not in judged:
        return alone, ["The unmodified recipient was not measured, so nothing is compared with it."] if judged else []
    try:
        rows = compare({name: one for name, one in judged.items() if name != DONOR}, unit, success)
    except InputError as error:
        return alone, [f"Arms could not be compared: {error}."]
    return alone | {row.method: row for row in rows}, []


def _row(name: str, arms: Sequence[Arm], task: str, found: Comparison | None) -> Row:
    given = [[label for label in arm.labels[task] if label is not None] for arm in arms]
    return Row(
        name,
        found,
        [float(np.mean(labels)) for labels in given if labels],
        sum(len(arm.labels[task]) for arm in arms) - sum(map(len, given)),
        _price(arms, task),
        sorted({arm.scale for arm in arms}),
        sorted({layer for arm in arms for layer in arm.layers}),
    )


def _price(arms: Sequence[Arm], task: str) -> dict[str, Score]:
    """Return what an arm costs: on benign text, and in loops and length of its answers to this task."""
    many: list[dict[str, Any]] = [
        {**arm.price, "loops": arm.loops.get(task, []), "words": arm.words.get(task, [])} for arm in arms
    ]
    averaged = {}
    for measure in dict.fromkeys(name for one in many for name in one):
        lists = [one[measure] for one in many if one.get(measure)]
        values = []
        for place in range(max(map(len, lists), default=0)):
            given = [one[place] for one in lists if place < len(one) and math.isfinite(one[place] or 0.0)]
            if given:
                values.append(float(np.mean(given)))
        averaged[measure] = values
    found = price_scores(averaged)
    if averaged["words"]:
        found["words"] = mean("words", averaged["words"], "words")
    if loops := [one["loops"] for one in many if one["loops"]]:
        found["loops"] = pooled("loops", loops, "rate")
    return found
