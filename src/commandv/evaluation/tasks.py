"""Tasks: prompts, the judge of the answers, the direction that counts as success; and files of prompts by split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from commandv.arguments import checked
from commandv.errors import InputError
from commandv.evaluation.arithmetic import by_hash
from commandv.evaluation.graders import Grader
from commandv.prompts.sets import Prompt, PromptSet, file_rows, to_prompt

Split = Literal["dev", "test"]

_DEV, _TEST, _TRAIN = ("dev", "validation", "valid", "val"), ("test",), ("train",)
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


@checked
@dataclass(frozen=True)
class ByText:
    """The judge that asks a function of the answer's text."""

    name: str
    grader: Grader
    unit: str = "rate"

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return 1 or 0 per answer."""
        return [float(self.grader(answer)) for answer in answers]


@checked
@dataclass(frozen=True)
class ByPrompt:
    """The judge that asks a function of the prompt and the answer, for labels that need the prompt's reference."""

    name: str
    labeller: Callable[[Prompt, str], float]
    unit: str = "rate"

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return one label per answer."""
        return [float(self.labeller(prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)]


@checked
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


@checked
def load_splits(file: str | Path, *, reference: bool = False, label: str = "") -> tuple[PromptSet, PromptSet]:
    """Load the (dev, test) prompts of a task file: a row per prompt, `{"prompt": ..., "answer": ..., "split": ...}`.

    The columns have the names that `load_prompts` knows. `split` is `dev` (or `validation`) or `test`; `train` rows
    serve as dev where there are no others, and are left out where there are. A file without splits is split by the
    prompts' SHA-256, whatever their order: in that order, the first third of the different prompts is dev.

    Args:
        file: .jsonl, .csv or .txt.
        reference: whether every row must have an answer.
        label: of files with a column `label` (XSTest: safe, unsafe) use the rows with this one.

    Raises:
        InputError: missing, empty or malformed file (with the line's number), or fewer than two different prompts.
    """
    rows: list[tuple[Prompt, str]] = []
    for where, row in file_rows(Path(file)):
        if label and row.get("label") not in (None, "", label):
            continue
        prompt, split = to_prompt(row, where), str(row.get("split") or "")
        if split not in ("", *_DEV, *_TEST, *_TRAIN):
            raise InputError(f"{where}: split {split!r}; expected 'dev' or 'test'")
        if rows and bool(split) != bool(rows[0][1]):
            raise InputError(f"{where}: some rows have a split and some have none; give all one, or none")
        if reference and not prompt.response.strip():
            raise InputError(f"{where}: no answer to compare with; expected a text or number under answer or target")
        rows.append((prompt, split))
    if not rows:
        raise InputError(f'{file}: no prompts. Expected rows like {{"prompt": "...", "answer": "...", "split": "dev"}}')
    if not rows[0][1]:
        order = by_hash(prompt.text for prompt, _ in rows)
        early = set(order[: max(1, len(order) // 3)])
        rows = [(prompt, "dev" if prompt.text in early else "test") for prompt, _ in rows]
    given = {split for _, split in rows}
    chosen = _DEV if given & set(_DEV) else _TRAIN
    dev, test = (tuple(prompt for prompt, split in rows if split in names) for names in (chosen, _TEST))
    if not dev or not test:
        raise InputError(
            f"{file}: {len(dev)} dev and {len(test)} test prompts; expected at least one different of each"
        )
    return PromptSet(dev, f"{file} (dev)"), PromptSet(test, f"{file} (test)")
