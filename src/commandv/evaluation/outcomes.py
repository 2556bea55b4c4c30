"""Running a model on a task, what was found prompt by prompt, and the file of it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.arguments import checked
from commandv.errors import CommandVError, FormatError, InputError
from commandv.evaluation.scores import Score, mean, rate
from commandv.evaluation.tasks import Split, Task
from commandv.models.encoding import Turns
from commandv.models.generation import generate
from commandv.models.lm import LM
from commandv.models.state import require_own
from commandv.prompts.loops import loops
from commandv.storage.files import require_file, storage_errors, write_text


@dataclass(frozen=True)
class Outcome:
    """The labels of one arm (a model with or without an adapter) on one task, prompt by prompt.

    Attributes:
        task: its name.
        arm: what was measured.
        unit: of the labels.
        labels: in the order of the prompts; NaN where the judge had no judgment.
        loops: whether each answer loops, whoever judged it; see `commandv.prompts.loops.loops`.
        answers: the texts, empty where the task keeps none.
        words: number of words of each answer.
    """

    task: str
    arm: str
    unit: str
    labels: tuple[float, ...]
    loops: tuple[bool, ...]
    answers: tuple[str, ...] = ()
    words: tuple[int, ...] = ()

    def score(self) -> Score:
        """Return the rate or mean of the labels that were given, with its 95 % interval."""
        given = [label for label in self.labels if not math.isnan(label)]
        if self.unit == "rate":
            return rate(self.arm, [bool(label) for label in given])
        return mean(self.arm, given, self.unit)

    def loop_rate(self) -> Score:
        """Return the share of answers that loop, with its 95 % interval."""
        return rate("loops", self.loops)

    def mean_words(self) -> float:
        """Return the mean number of words of an answer."""
        return sum(self.words) / len(self.words)


@checked
def measure(
    lm: LM,
    task: Task,
    adapter: Adapter | None = None,
    *,
    arm: str = "unmodified",
    scale: float = 1.0,
    split: Split = "test",
    limit: int | None = None,
    turns: Turns = (),
    batch_size: int = 64,
) -> Outcome:
    """Generate an answer to each prompt of a split and let the task's judge label it.

    Args:
        lm: the model, with nothing attached.
        task: what to ask.
        adapter: to attach meanwhile.
        arm: name of what is measured, for tables.
        scale: factor on the adapter's deltas.
        split: `"test"` for reporting, `"dev"` for choosing settings.
        limit: use the first so many prompts.
        turns: earlier turns of the conversation in which each prompt is asked.
        batch_size: prompts per batch.

    Raises:
        InputError: the judge fails, or gives labels that are not one for each answer.
    """
    answers = answered(lm, task, adapter, scale=scale, split=split, limit=limit, turns=turns, batch_size=batch_size)
    return judged(task, answers, arm=arm, split=split)


def answered(
    lm: LM,
    task: Task,
    adapter: Adapter | None = None,
    *,
    scale: float = 1.0,
    split: Split = "test",
    limit: int | None = None,
    turns: Turns = (),
    batch_size: int = 64,
) -> list[str]:
    """Generate an answer to each prompt of a split; arguments as in `measure`."""
    require_own(lm, "measuring")
    if limit is not None and limit < 1:  # -1 would leave out the last prompt
        raise InputError(f"limit={limit}: expected 1 or more")
    prompts = task.prompts(split)[:limit]
    with attach(lm, adapter, scale=scale) if adapter else contextlib.nullcontext():
        return generate(lm, prompts, max_new_tokens=task.max_new_tokens, batch_size=batch_size, turns=turns)


def judged(task: Task, answers: Sequence[str], *, arm: str = "unmodified", split: Split = "test") -> Outcome:
    """Let a task's judge label answers to the first prompts of a split; errors as in `measure`."""
    try:
        labels = [float(label) for label in task.judge(task.prompts(split).prompts[: len(answers)], answers)]
    except CommandVError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            f"judge {task.judge.name} of task {task.name} failed on {len(answers)} answers: "
            f"{type(error).__name__}: {error}; mend the judge, or take another"
        ) from error
    if len(labels) != len(answers):
        raise InputError(f"judge {task.judge.name}: {len(labels)} labels for {len(answers)} answers; expected one each")
    looping = tuple(loops(answer) for answer in answers)
    words = tuple(len(answer.split()) for answer in answers)
    kept = tuple(answers) if task.keep_answers else ()
    return Outcome(task.name, arm, task.judge.unit, tuple(labels), looping, kept, words)


def require_outcome_place(path: Path) -> None:
    """Raise `FormatError` when writing an outcome to `path` would destroy anything but an outcome."""
    require_file(path)
    with storage_errors(path):
        if not path.exists() or not path.stat().st_size:
            return
        with path.open("rb") as file:
            first = file.readline(1 << 20)
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not {"task", "arm", "split", "label"} <= row.keys():
        raise FormatError(f"{path}: is there and no outcome of a task, so it is not replaced; choose another place")


@checked
def write_outcome(outcome: Outcome, task: Task, path: str | Path, *, split: Split = "test") -> None:
    """Write an outcome as plain JSONL, one row per prompt: label, whether the answer loops, the answer where kept.

    Args:
        outcome: from `measure`.
        task: what it was measured on.
        path: of the file; an outcome there is replaced; a label that is not a number becomes null.
        split: which one was measured.

    Raises:
        InputError: the outcome is of another task, or has more labels than the split has prompts.
        FormatError: something else is there.
        StorageError: the file cannot be written.
    """
    require_outcome_place(Path(path))
    prompts = task.prompts(split).prompts
    if outcome.task != task.name or len(outcome.labels) > len(prompts):
        raise InputError(
            f"an outcome of {outcome.task} with {len(outcome.labels)} labels; expected {task.name} with at most "
            f"{len(prompts)} ({split})"
        )
    lines = []
    for i, label in enumerate(outcome.labels):
        row = {"task": task.name, "arm": outcome.arm, "split": split, **prompts[i]._asdict(), "unit": outcome.unit}
        row = {("prompt" if key == "text" else key): value for key, value in row.items()}
        row |= {"label": None if math.isnan(label) else label, "loops": outcome.loops[i]}
        if task.keep_answers and outcome.answers:
            row["answer"] = outcome.answers[i]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(Path(path), "".join(lines))
