"""Tasks: prompts, the judge of the answers, and the direction that counts as success; and running a model on one."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.errors import CommandVError, InputError
from commandv.evaluation.graders import Grader
from commandv.evaluation.scores import Score, mean, rate
from commandv.models.encoding import Turns
from commandv.models.generation import generate
from commandv.models.lm import LM
from commandv.models.state import require_own
from commandv.prompts.loops import loops
from commandv.prompts.sets import Prompt, PromptSet

Split = Literal["dev", "test"]

ANSWER_TOKENS = 48  # of answers that are graded by their text: in fewer only their openings show


class Judge(Protocol):
    """Labels answers."""

    @property
    def name(self) -> str:
        """For tables and caches."""

    @property
    def unit(self) -> str:
        """`"rate"` for labels 0 and 1, otherwise what the labels count, such as `"words"`."""

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return one label per answer; NaN where there is no judgment. A prompt's `response` is the reference."""


@dataclass(frozen=True)
class ByText:
    """The judge that asks a function of the answer's text."""

    name: str
    grader: Grader
    unit: str = "rate"

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return 1 or 0 per answer."""
        return [float(self.grader(answer)) for answer in answers]


@dataclass(frozen=True)
class ByPrompt:
    """The judge that asks a function of the prompt and the answer, for labels that need the prompt's reference."""

    name: str
    labeller: Callable[[Prompt, str], float]
    unit: str = "rate"

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return one label per answer."""
        return [float(self.labeller(prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)]


@dataclass(frozen=True)
class Task:
    """What is asked of a model and how its answers count.

    Attributes:
        name: of the task.
        dev: prompts for choosing settings.
        test: prompts for reporting; no training, fit or choice may see them.
        judge: labels the answers.
        success: whether `"more"` or `"less"` of what the judge finds is the aim.
        max_new_tokens: of an answer.
        keep_answers: False where answers may be harmful: then only labels are kept.
    """

    name: str
    dev: PromptSet
    test: PromptSet
    judge: Judge
    success: Literal["more", "less"] = "more"
    max_new_tokens: int = ANSWER_TOKENS
    keep_answers: bool = True

    def __post_init__(self) -> None:
        shared = set(self.dev.texts) & set(self.test.texts)
        if shared:
            raise InputError(
                f"task {self.name}: {len(shared)} prompts are in both splits, the first {sorted(shared)[0]!r}; what "
                "settings are chosen on must not be reported on. Remove them from one"
            )
        again = next((text for text, n in Counter(self.test.texts).items() if n > 1), None)
        if again is not None:
            raise InputError(
                f"task {self.name}: the test prompt {again[:60]!r} is there more than once; intervals count prompts, "
                "and the same one twice is one. Remove the copies"
            )

    def prompts(self, split: Split) -> PromptSet:
        """Return one split."""
        return self.dev if split == "dev" else self.test


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
    prompts = task.prompts(split)[:limit]
    with attach(lm, adapter, scale=scale) if adapter else contextlib.nullcontext():
        return generate(lm, prompts, max_new_tokens=task.max_new_tokens, batch_size=batch_size, turns=turns)


def judged(task: Task, answers: Sequence[str], *, arm: str = "unmodified", split: Split = "test") -> Outcome:
    """Let a task's judge label answers to the first prompts of a split; errors as in `measure`."""
    try:
        labels = task.judge(task.prompts(split).prompts[: len(answers)], answers)
    except CommandVError:
        raise
    except Exception as error:
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
