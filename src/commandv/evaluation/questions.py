"""Multiple-choice questions, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commandv.arguments import checked
from commandv.errors import InputError
from commandv.prompts.sets import file_rows

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FORMS = (
    '{"question", "choices", "answer_index"}, {"prompt", "correct", "incorrect"} or '
    '{"question", "best_answer", "incorrect_answers"}'
)


@checked
@dataclass(frozen=True)
class Question:
    """A question with answers to choose from.

    Attributes:
        text: the user's turn.
        choices: two or more different answers.
        answer: index of the right one.
        category: what it is about.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    category: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InputError("a question without a text")
        if len(set(self.choices)) < max(2, len(self.choices)) or not all(one.strip() for one in self.choices):
            raise InputError(f"choices {list(self.choices)}: expected two or more, all different and none empty")
        if not 0 <= self.answer < len(self.choices):
            raise InputError(f"answer {self.answer}: expected an index into {len(self.choices)} choices")


@checked
def as_letters(questions: Sequence[Question]) -> list[Question]:
    """Return the questions with their choices listed as "(A) ..." under the text, and the letters to choose from.

    Measures whether the model can name its choice, where plain choices measure which one it would say.
    """
    out = []
    for one in questions:
        letters = tuple(f"({letter})" for letter in _LETTERS[: len(one.choices)])
        listed = "\n".join(f"{letter} {choice}" for letter, choice in zip(letters, one.choices, strict=True))
        out.append(Question(f"{one.text}\n\nChoices:\n{listed}", letters, one.answer, one.category))
    return out


@checked
def load_questions(path: str | Path) -> list[Question]:
    """Load multiple-choice questions from a .jsonl file.

    Each row is one of: `{"question", "choices": [...], "answer_index": 2}` (ARC; the answer may also be a letter under
    `answer` or `answerKey`, and the choices `{"text": [...], "label": [...]}`); `{"prompt", "correct", "incorrect"}`
    (one right and one or more wrong answers; the right one comes first in `choices`); or
    `{"question", "best_answer", "incorrect_answers"}` (TruthfulQA).

    Raises:
        InputError: missing or empty file, or a malformed row, with its line number.
    """
    questions = []
    for where, row in file_rows(Path(path)):
        try:
            questions.append(_question(row))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    if not questions:
        raise InputError(f"{path}: no questions. Expected rows like {_FORMS}")
    return questions


def _question(row: dict[str, Any]) -> Question:
    text = row.get("question", row.get("prompt"))
    choices: Any = row.get("choices")
    labels = list(_LETTERS)
    wrong = row.get("incorrect", row.get("incorrect_answers"))
    right = row.get("correct", row.get("best_answer"))
    if choices is None and wrong is not None:
        # TruthfulQA repeats some of its wrong answers.
        choices, answer = [right, *dict.fromkeys(map(str, wrong if isinstance(wrong, list) else [wrong]))], 0
    else:
        if isinstance(choices, dict):  # the hub's form of ARC
            choices, labels = choices.get("text"), choices.get("label") or labels
        if not isinstance(choices, list):
            raise InputError(f"expected {_FORMS}, got an object with {', '.join(map(str, row))}")
        answer = _index(next((row[k] for k in ("answer_index", "answerKey", "answer") if k in row), None), labels)
    if not (isinstance(text, str) and isinstance(choices, list) and all(isinstance(one, str) for one in choices)):
        raise InputError(f"expected {_FORMS} with texts, got an object with {', '.join(map(str, row))}")
    return Question(text, tuple(choices), answer, str(row.get("category") or ""))


def _index(answer: Any, labels: Sequence[str]) -> int:
    """Return the index that an answer stands for: itself, or the place of its letter."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    letter = answer.strip().strip("().").upper() if isinstance(answer, str) else ""
    if letter not in labels:
        raise InputError(f"the answer is {answer!r}; expected an index from 0 or one of the choices' letters")
    return list(labels).index(letter)
