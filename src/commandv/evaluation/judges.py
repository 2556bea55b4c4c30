"""The table of judges, in tiers: graders, phrase lists, classifiers, guard models, chat endpoints."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from commandv.arguments import checked
from commandv.errors import InputError, did_you_mean, require_known
from commandv.evaluation.endpoint import Endpoint
from commandv.evaluation.graders import GRADERS
from commandv.evaluation.judgments import Cached, CostlyJudge
from commandv.evaluation.tasks import ByText, Judge
from commandv.prompts.sets import Prompt

_PHRASE_FILE = "refusal-phrases.json"


@checked
@dataclass(frozen=True)
class Phrases:
    """Finds fixed phrases in an answer, as string-match scorers of published work do.

    Attributes:
        name: of the list.
        phrases: any of them is a hit.
        match: `"contains"` anywhere, or as the `"prefix"` of the answer without leading white space.
        ignore_case: compare in lower case.
        unit: of the labels.
    """

    name: str
    phrases: tuple[str, ...]
    match: Literal["contains", "prefix"] = "contains"
    ignore_case: bool = False
    unit: str = "rate"

    def __post_init__(self) -> None:
        if not self.phrases or not all(self.phrases) or self.match not in ("contains", "prefix"):
            raise InputError(
                f"phrases {self.name}: {len(self.phrases)} phrases, match={self.match!r}; expected at least one, none "
                "of them empty, and 'contains' or 'prefix'"
            )

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return 1 where a phrase is found, else 0."""
        return [float(self.finds(answer)) for answer in answers]

    def finds(self, answer: str) -> bool:
        """True when the answer has one of the phrases."""
        text, phrases = answer.strip(), self.phrases
        if self.ignore_case:
            text, phrases = text.lower(), tuple(phrase.lower() for phrase in phrases)
        return text.startswith(phrases) if self.match == "prefix" else any(phrase in text for phrase in phrases)


@checked
def refusal_phrases(name: str) -> Phrases:
    """Return a published list of refusal phrases, matched as its authors match it; its source is in the data file.

    Args:
        name: `gcg` (Zou et al. 2023), `arditi` (Arditi et al. 2024) or `xstest` (Röttger et al. 2024).

    Raises:
        InputError: no such list.
    """
    text = (importlib.resources.files("commandv.evaluation") / "data" / _PHRASE_FILE).read_text("utf-8")
    lists = json.loads(text)
    require_known("phrase list", name, lists)
    chosen = lists[name]
    return Phrases(name, tuple(chosen["phrases"]), chosen["match"], chosen["ignore_case"])


def _endpoint(rest: str) -> CostlyJudge:
    url, _, model = rest.rpartition("#")
    return Endpoint(url, model)


def _classifier(rest: str) -> CostlyJudge:
    from commandv.evaluation.model_judges import Classifier

    model, _, label = rest.partition("#")
    return Classifier(model, label or None)


def _guard(rest: str) -> CostlyJudge:
    from commandv.evaluation.model_judges import Guard

    return Guard(rest)


@checked
def load_judge(spec: str, *, folder: Path | None = None) -> Judge:
    """Return the judge that a spec names; costly ones keep their judgments.

    Args:
        spec: a grader (`refusal`, `numbered-list`, `pirate`), a published list of refusal phrases (`gcg`, `arditi`,
            `xstest`), `classifier:ID[#LABEL]`, `guard:ID` or `endpoint:URL#MODEL`.
        folder: where judgments are kept. Default: `judgments` in the cache directory.

    Raises:
        InputError: not such a spec.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in JUDGES or bool(colon) != (kind in COSTLY) or bool(rest) != bool(colon):
        raise InputError(
            f"judge {spec!r}{did_you_mean(kind, JUDGES)}: expected "
            f"{', '.join(name for name in JUDGES if name not in COSTLY)}, classifier:ID[#LABEL], guard:ID or "
            "endpoint:URL#MODEL"
        )
    judge = JUDGES[kind](rest)
    return judge if isinstance(judge, (ByText, Phrases)) else Cached(judge, folder)


JUDGES: dict[str, Callable[[str], ByText | Phrases | CostlyJudge]] = {
    **{name: functools.partial(lambda name, _: ByText(name, GRADERS[name]), name) for name in GRADERS},
    **{name: functools.partial(lambda name, _: refusal_phrases(name), name) for name in ("gcg", "arditi", "xstest")},
    "classifier": _classifier,
    "guard": _guard,
    "endpoint": _endpoint,
}
COSTLY = frozenset({"classifier", "guard", "endpoint"})
