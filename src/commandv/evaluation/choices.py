"""Multiple choice by log-probability: which of the given answers the model finds the most likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from commandv.adapters.adapter import Adapter
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.evaluation.price import token_log_probs
from commandv.evaluation.questions import Question
from commandv.evaluation.scores import Score, rate
from commandv.models.encoding import encode
from commandv.models.lm import LM


class Choices(NamedTuple):
    """How a model chose, question by question.

    Attributes:
        name: what was measured.
        labels: 1 where the right choice has the highest log-probability of all, else 0.
        labels_by_length: the same with log-probabilities divided by the choices' numbers of characters.
        log_probs: of each choice, summed over its tokens, in nats.
    """

    name: str
    labels: tuple[float, ...]
    labels_by_length: tuple[float, ...]
    log_probs: tuple[tuple[float, ...], ...]

    def score(self, *, by_length: bool = False) -> Score:
        """Return the accuracy with its 95 % interval."""
        return rate(self.name, [bool(label) for label in (self.labels_by_length if by_length else self.labels)])


@checked
def multiple_choice(
    lm: LM,
    questions: Sequence[Question],
    adapter: Adapter | None = None,
    *,
    name: str = "",
    scale: float = 1.0,
    batch_size: int = 8,
) -> Choices:
    """Measure how often the right choice is the most likely continuation: log p(choice | question).

    The question is the user's turn in the model's own format and each choice a reply to it. The sum over tokens favours
    short choices; dividing it by the number of characters, which does not depend on the tokenizer, undoes much of that
    (`acc` and `acc_norm` of EleutherAI's lm-evaluation-harness). A tie, or a log-probability that is not a number,
    counts as wrong.

    Args:
        lm: the model, with nothing attached.
        questions: from `load_questions`, or made by hand.
        adapter: to attach meanwhile; the choices count as generated tokens.
        name: of the score.
        scale: as in `attach`.
        batch_size: choices per forward pass.

    Raises:
        InputError: no questions, or one that does not fit the model's context.
    """
    if not questions:
        raise InputError("no questions to choose answers to")
    pairs = [(question, choice) for question in questions for choice in question.choices]
    rows = [encode(lm, question.text, choice) for question, choice in pairs]
    sums = [0.0] * len(rows)
    for item, log_probs in token_log_probs(lm, rows, adapter, scale=scale, batch_size=batch_size):
        sums[item] = float(log_probs.sum())
    values, start = [], 0
    for question in questions:
        values.append(tuple(sums[start : start + len(question.choices)]))
        start += len(question.choices)
    plain, by_length = [], []
    for question, own in zip(questions, values, strict=True):
        plain.append(_right(own, question.answer))
        lengths = [len(choice) for choice in question.choices]
        by_length.append(_right([a / b for a, b in zip(own, lengths, strict=True)], question.answer))
    return Choices(name, tuple(plain), tuple(by_length), tuple(values))


def _right(values: Sequence[float], answer: int) -> float:
    return float(all(values[answer] > value for i, value in enumerate(values) if i != answer))
