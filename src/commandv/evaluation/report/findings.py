"""What a run found, as numbers: every method of a pair and behaviour over its seeds, and whether it crosses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from commandv.errors import InputError
from commandv.evaluation.results import Arm, Cell, Run
from commandv.evaluation.scores import Score, geometric_mean, mean, pooled
from commandv.evaluation.statistics import Comparison, compare, difference, holm, paired_p

UNMODIFIED, PASTED, RANDOM, DIRECT, DONOR = "unmodified", "pasted", "random", "direct", "donor"
ORDER = (UNMODIFIED, PASTED, "pinv", RANDOM, "shuffled", "mean-ablation", "text-bridge", DIRECT, DONOR)
FULL_STRENGTH = ("unmodified", "mean-ablation", DIRECT, DONOR)  # never scaled, whatever calibration picks for the paste
ALPHA = 0.05
WHOLE = 0.8  # a recovered fraction whose whole interval lies below this is a part only

CROSSES, PARTLY, DOES_NOT = "crosses", "partly", "does not cross"
NOT_EXAMINABLE, NOT_ESTABLISHED, NOT_MEASURED = "not examinable", "not established", "not measured"
VERDICTS = (CROSSES, PARTLY, DOES_NOT, NOT_EXAMINABLE, NOT_ESTABLISHED, NOT_MEASURED)

Success = Literal["more", "less"]
Labels = list[list[float | None]]


class Row(NamedTuple):
    """One method of one table, over all seeds.

    Attributes:
        method: its name.
        scales: distinct factors on the deltas, over seeds.
        layers: distinct recipient layers acted on, over seeds.
        by_seed: seed -> share or mean of its own labels.
        unjudged: answers that the judge gave no label.
        found: score, difference from the unmodified recipient, p-values, recovered fraction; None without any label.
        why_none: why there is no recovered fraction; empty if there is one.
        price: measure -> mean over passages, each averaged over seeds.
    """

    method: str
    scales: tuple[float, ...]
    layers: tuple[int, ...]
    by_seed: dict[int, float]
    unjudged: int
    found: Comparison | None
    why_none: str
    price: dict[str, Score]


class Verdict(NamedTuple):
    """One of `VERDICTS` and the figures that led to it, in words."""

    word: str
    why: str


@dataclass(frozen=True)
class Table:
    """One task of one pair and behaviour: every method, and the verdict.

    Attributes:
        task: what was asked.
        unit: of the labels.
        success: whether more or less is the aim.
        rows: in the order of `ORDER`, then others.
        verdict: of the paste.
        beside: further arms of methods that are in the table at another scale.
        notes: what a reader must know and no column tells.
    """

    task: str
    unit: str
    success: Success
    rows: list[Row]
    verdict: Verdict
    beside: list[tuple[Arm, Score]]
    notes: list[str]

    def row(self, method: str) -> Row | None:
        """Return a method's row if it has a figure."""
        return next((row for row in self.rows if row.method == method and row.found), None)


@dataclass(frozen=True)
class Group:
    """All seeds of one donor, recipient and behaviour; `tables` starts with the behaviour's own task."""

    donor: str
    recipient: str
    behaviour: str
    cells: list[Cell]
    failed: list[Cell]
    tables: list[Table]

    @property
    def pair(self) -> str:
        """Donor and recipient."""
        return f"{self.donor} → {self.recipient}"

    @property
    def verdict(self) -> Verdict:
        """The verdict on the behaviour's own task."""
        if self.tables:
            return self.tables[0].verdict
        return Verdict(NOT_MEASURED, "every cell failed" if self.failed else "no arm has labels")


def groups(run: Run) -> list[Group]:
    """Return the pairs and behaviours of a run, in the order of the study."""
    by_key: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in run.cells:
        by_key.setdefault((cell.donor, cell.recipient, cell.behaviour), []).append(cell)
    pairs = [tuple(pair) for pair in run.study.get("pairs", [])]
    behaviours = list(run.study.get("behaviours", []))

    def place(key: tuple[str, str, str]) -> tuple[int, int]:
        pair, behaviour = key[:2], key[2]
        return (
            pairs.index(pair) if pair in pairs else len(pairs),
            behaviours.index(behaviour) if behaviour in behaviours else len(behaviours),
        )

    found = []
    for key in sorted(by_key, key=place):
        cells = sorted(by_key[key], key=lambda cell: cell.seed)
        done = [cell for cell in cells if cell.state == "done"]
        tables = [_table(done, task) for task in _tasks(done)]
        found.append(Group(*key, done, [cell for cell in cells if cell.state == "failed"], tables))
    return found


def _tasks(cells: Sequence[Cell]) -> list[str]:
    """Return the tasks that were measured, the behaviour's own one first, because a study measures it first."""
    return list(dict.fromkeys(task for cell in cells for arm in cell.arms for task in arm.labels))


def chosen(cell: Cell, method: str) -> Arm | None:
    """Return the arm of a method that stands in the table: at the strength chosen on the development split, or 1."""
    arms = [arm for arm in cell.arms if arm.method == method]
    picked = {point.method: point.scale for point in cell.curve if point.chosen}
    # Controls that mirror the paste have no curve of their own and act at its strength.
    wanted = [] if method in FULL_STRENGTH else [picked.get(method, picked.get(PASTED, 1.0))]
    for scale in (*wanted, 1.0):
        for arm in arms:
            if math.isclose(arm.scale, scale):
                return arm
    return arms[0] if arms else None


def _table(cells: Sequence[Cell], task: str) -> Table:
    methods = list(dict.fromkeys(arm.method for cell in cells for arm in cell.arms if task in arm.labels))
    methods.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    arms = {name: {cell.seed: chosen(cell, name) for cell in cells} for name in methods}
    unit = next(
        (arm.units[task] for by_seed in arms.values() for arm in by_seed.values() if arm and task in arm.units), "rate"
    )
    success, notes = _success(cells, task)
    labels = {name: _labels(by_seed, task) for name, by_seed in arms.items()}
    judged = {name: one for name, one in labels.items() if any(label is not None for row in one for label in row)}
    found, problems = _compared(judged, unit, success)
    rows = [_row(name, arms[name], labels[name], task, unit, found.get(name), DIRECT in judged) for name in methods]
    shown = {id(arm) for by_seed in arms.values() for arm in by_seed.values()}
    beside = [
        (arm, pooled(arm.method, [arm.labels[task]], unit))
        for cell in cells
        for arm in cell.arms
        if id(arm) not in shown and any(label is not None for label in arm.labels.get(task, []))
    ]
    verdict = _verdict(judged, found, unit, success)
    return Table(task, unit, success, rows, verdict, beside, notes + problems)


def _success(cells: Sequence[Cell], task: str) -> tuple[Success, list[str]]:
    """Return the aim that the cells state in `settings["success"][task]`; say so where they state none."""
    for cell in cells:
        stated = cell.settings.get("success")
        aim: Any = stated.get(task) if isinstance(stated, dict) else stated
        if aim in ("more", "less"):
            return aim, []
    return "more", ["The run does not say whether more or less is the aim; more was taken as the aim."]


def _labels(by_seed: dict[int, Arm | None], task: str) -> Labels:
    """Return labels seed by seed, without judgment where a seed has no such arm; one row if only one seed has it."""
    present = {seed: arm.labels[task] for seed, arm in by_seed.items() if arm and task in arm.labels}
    if len(present) == 1:
        return list(present.values())
    # A run that went on with more test prompts has the same first ones: a study takes the first n.
    length = max(map(len, present.values()), default=0)
    return [(own := present.get(seed, [])) + [None] * (length - len(own)) for seed in by_seed]


def _compared(judged: dict[str, Labels], unit: str, success: Success) -> tuple[dict[str, Comparison], list[str]]:
    """Compare every arm with the unmodified recipient; the donor is another model and gets its figure only."""
    alone = {name: Comparison(name, pooled(name, one, unit)) for name, one in judged.items()}
    if UNMODIFIED not in judged:
        return alone, ["The unmodified recipient was not measured, so nothing is compared with it."] if judged else []
    try:
        rows = compare(_same_length({k: v for k, v in judged.items() if k != DONOR}), unit, success)
    except InputError as error:
        return alone, [f"Arms could not be compared: {error}."]
    return alone | {row.method: row for row in rows}, []


def _same_length(judged: dict[str, Labels]) -> dict[str, Labels]:
    length = max(len(row) for one in judged.values() for row in one)
    return {name: [row + [None] * (length - len(row)) for row in one] for name, one in judged.items()}


def _row(
    method: str,
    arms: dict[int, Arm | None],
    labels: Labels,
    task: str,
    unit: str,
    found: Comparison | None,
    direct: bool,
) -> Row:
    present = {seed: arm for seed, arm in arms.items() if arm and task in arm.labels}
    by_seed = {}
    for seed, arm in present.items():
        given = [label for label in arm.labels[task] if label is not None]
        if given:
            by_seed[seed] = float(np.mean(given))
    unjudged = sum(label is None for arm in present.values() for label in arm.labels[task])
    why = ""
    if found is None or found.recovered is None:
        why = _why_none(method, found, direct)
    return Row(
        method,
        tuple(sorted({arm.scale for arm in present.values()})),
        tuple(sorted({layer for arm in present.values() for layer in arm.layers})),
        by_seed,
        unjudged,
        found,
        why,
        _price(list(present.values())),
    )


def _why_none(method: str, found: Comparison | None, direct: bool) -> str:
    if found is None:
        return "no judgment on any answer"
    if method == UNMODIFIED:
        return "0 by definition"
    if method == DIRECT:
        return "1 by definition"
    if method == DONOR:
        return "another model"
    if found.difference is None:
        return "not compared"
    return "direct does nothing to recover" if direct else "no direct arm"


def _price(arms: Sequence[Arm]) -> dict[str, Score]:
    """Average each passage over seeds first: the same passages come back in every seed and are not new evidence."""
    found = {}
    for measure in dict.fromkeys(name for arm in arms for name in arm.price):
        lists = [arm.price[measure] for arm in arms if measure in arm.price]
        values = []
        for passage in range(max(map(len, lists))):
            given = [one[passage] for one in lists if passage < len(one) and math.isfinite(one[passage])]
            if given:
                values.append(float(np.mean(given)))
        if values:
            # Perplexities are kept as nats per token.
            geometric, unit = measure == "perplexity", "share" if measure == "loops" else "nats per token"
            found[measure] = geometric_mean(measure, values, measure) if geometric else mean(measure, values, unit)
    return found


def _verdict(judged: dict[str, Labels], found: dict[str, Comparison], unit: str, success: Success) -> Verdict:
    """Apply the rules that the report states, in their order."""
    pasted, direct = found.get(PASTED), found.get(DIRECT)
    if pasted is None or pasted.difference is None:
        return Verdict(NOT_MEASURED, "no figures of the pasted and the unmodified recipient to compare")
    if direct and not _moves(direct.difference, direct.adjusted, success):
        return Verdict(NOT_EXAMINABLE, "the recipient's own adapter or vector does not show the behaviour")
    if RANDOM not in judged:
        return Verdict(NOT_ESTABLISHED, "no random control to compare with")
    arms = _same_length({name: one for name, one in judged.items() if name != DONOR})
    tested = [name for name in arms if name != RANDOM]
    try:
        adjusted = dict(zip(tested, holm([paired_p(arms[one], arms[RANDOM], unit) for one in tested]), strict=True))
        gap = difference("random", arms[PASTED], arms[RANDOM], unit)
    except InputError:
        return Verdict(NOT_ESTABLISHED, "no prompt was judged with both the paste and the random control")
    # Both tests must reject, each at the full level: their conjunction rejects no more often than either.
    beats_unmodified = _moves(pasted.difference, pasted.adjusted, success)
    beats_random = _moves(gap, adjusted[PASTED], success)
    if not (beats_unmodified and beats_random):
        others = [name for name, beaten in ((UNMODIFIED, beats_unmodified), (RANDOM, beats_random)) if not beaten]
        return Verdict(DOES_NOT, f"not {success} than {' and '.join(others)}, after Holm's correction")
    if direct is None:
        return Verdict(CROSSES, "how much of it cannot be said without the direct arm")
    if pasted.recovered and pasted.recovered.high < WHOLE:
        return Verdict(PARTLY, f"{success} than unmodified and random, but less than {WHOLE} of what training gives")
    return Verdict(CROSSES, f"{success} than unmodified and random")


def _moves(gap: Score | None, adjusted: float | None, success: Success) -> bool:
    """Tell whether a difference is significant and in the wanted direction."""
    if gap is None or adjusted is None:
        return False
    return adjusted < ALPHA and (gap.value > 0 if success == "more" else gap.value < 0)
