"""Tasks: prompts, the judge of the answers, and the direction that counts as success."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from commandv.errors import InputError
from commandv.evaluation.graders import Grader
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
