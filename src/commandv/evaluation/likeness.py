"""A judge for behaviours that nobody has described: the difference that an adapter makes to its donor's own answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.models.generation import generate
from commandv.models.lm import LM
from commandv.prompts.loops import loops
from commandv.prompts.sets import Prompt, PromptSet
from commandv.storage.files import digest

LEAST = 0.75  # of the donor's answers told apart rightly; below, the texts do not show what the adapter does
FOLDS = 5
GRAMS = (1, 4)  # characters
MARK = "\x02"  # before each answer, so that how it begins counts

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Likeness:
    """Tells whether an answer is rather like the donor's with its adapter than like answers without it.

    Logistic regression over the answers' character n-grams. An answer that loops is like nothing.

    Attributes:
        classifier: fitted; answers -> 1 for like the adapted donor.
        accuracy: of the donor's answers told apart rightly, prompts held out in turn (half of them by chance).
        n: prompts that it was fitted on.
        key: hash of the answers that it was fitted on.
    """

    classifier: Any
    accuracy: float
    n: int
    key: str
    unit: ClassVar[str] = "rate"

    @property
    def name(self) -> str:
        """For tables and caches."""
        return f"like-the-donor-{self.key}"

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return 1 for answers like the adapted donor's."""
        found = self.classifier.predict([MARK + one.strip() for one in answers])
        return [float(bool(like) and not loops(answer)) for like, answer in zip(found, answers, strict=True)]


@checked
def like_the_donor(
    donor: LM, adapter: Adapter, recipient: LM, prompts: PromptSet, *, max_new_tokens: int = 48, batch_size: int = 64
) -> Likeness:
    """Make the judge: both models answer the prompts, the donor with its adapter as well.

    With the adapter against without it, of the donor and the recipient alike, so that the recipient's own manner is no
    sign of the behaviour.

    Args:
        donor: with nothing attached.
        adapter: the donor's.
        recipient: with nothing attached.
        prompts: none that is tested on.
        max_new_tokens: of an answer.
        batch_size: prompts per batch.

    Raises:
        InputError: the donor's answers with its adapter cannot be told from those without it.
    """
    found = answers(donor, adapter, recipient, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return likeness(found.changed, found.plain, found.own, adapter.name)


class Answers(pydantic.BaseModel):
    """The donor's answers with its adapter and without, and the recipient's."""

    changed: list[str]
    plain: list[str]
    own: list[str]


def answers(
    donor: LM, adapter: Adapter, recipient: LM, prompts: PromptSet, *, max_new_tokens: int, batch_size: int
) -> Answers:
    """Have both models answer the prompts; arguments as in `like_the_donor`."""

    def answered(lm: LM) -> list[str]:
        return generate(lm, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)

    plain, own = answered(donor), answered(recipient)
    with attach(donor, adapter):
        return Answers(changed=answered(donor), plain=plain, own=own)


def likeness(changed: Sequence[str], plain: Sequence[str], own: Sequence[str], name: str) -> Likeness:
    """Fit the judge to answers to the same prompts: the donor's with its adapter, its own without, and the recipient's.

    Raises:
        InputError: `changed` cannot be told from `plain`, or too few answers.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    n = len(changed)
    if n < 2 * FOLDS or not n == len(plain) == len(own):
        raise InputError(f"{n} answers to learn from; expected {2 * FOLDS} or more, and as many without the adapter")
    texts = [MARK + one.strip() for one in (*changed, *plain, *own)]
    labels = [1] * n + [0] * 2 * n
    model = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=GRAMS, lowercase=False, sublinear_tf=True, min_df=2),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000),
    )
    guessed = cross_val_predict(model, texts, labels, groups=list(range(n)) * 3, cv=GroupKFold(FOLDS))
    accuracy = float((sum(guessed[:n]) + n - sum(guessed[n : 2 * n])) / (2 * n))
    if accuracy < LEAST:
        raise InputError(
            f"the donor's answers with {name} can hardly be told from those without it: {accuracy:.0%} of them rightly "
            f"on prompts held out, {LEAST:.0%} wanted. Give prompts that call the behaviour forth, or say what to look "
            "for: a task, a regular expression, a judge"
        )
    log.info("what %s does can be told from %.0f %% of the donor's answers, prompts held out", name, 100 * accuracy)
    return Likeness(model.fit(texts, labels), accuracy, n, digest(changed, plain, own))
