"""Validating a mapper: put its states in the place of the recipient's own, and see what the recipient makes of them.

Three trials, each beside the same controls: along given texts every token's state is replaced, and the predictions are
compared with the recipient's own; a prompt's states are replaced, and the recipient writes the reply; and the states of
multiple-choice questions and their choices, whose log-probabilities then say which is chosen. Which tokens that are,
and how those of two vocabularies are paired, says `commandv.mapping.tokens`.

Source: arXiv 2503.04429, for the trials and the metrics TvS and MvA; its judges give a mark for similarity where here
two texts are compared by their words. Mean-ablation apart for last prompt tokens, the rotation and the shuffled pairs
are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import commandv as cv
from commandv.errors import InputError, MismatchError
from commandv.evaluation import Judge, Question, Score, mean, multiple_choice, rate
from commandv.mapping import (
    MEAN_ABLATION,
    Along,
    Counterparts,
    Mapper,
    Pairing,
    mapper_arms,
    pairing,
    read_counterparts,
    replaced,
)
from experiments.mapping.similarity import rouge_l
from experiments.mapping.teacher_forcing import UNPATCHED, read_texts, score_texts

DONOR = "donor"
TEXTS, REPLIES, CHOICES = "texts", "replies", "choices"

Values = dict[str, list[float]]  # metric -> one value per text, prompt or question; NaN where there is none


@dataclass(frozen=True)
class Trial:
    """What mappers are tried on; at least one of texts, prompts and questions. None of it may have been fitted on.

    Attributes:
        texts: passages to read along; of one with a reply the reply is the text. They are read as user turns.
        prompts: to reply to.
        questions: of multiple choice.
        tokens: of each text, at most, counted in the recipient's tokens.
        max_new_tokens: of each reply.
        judge: labels replies, or None.
        similarity: of two replies, 1 for the same; by default the F of their longest common subsequence of words.
        read_along: the donor reads the reply while it is written, and its tokens' states are replaced too. Both models
            must make the same tokens of every prompt, as versions of one model do.
        keep_replies: keep the texts; leave this off where they may be harmful.
        batch_size: sequences per forward pass.
    """

    texts: cv.PromptSet | None = None
    prompts: cv.PromptSet | None = None
    questions: Sequence[Question] = ()
    tokens: int = 64
    max_new_tokens: int = 24
    judge: Judge | None = None
    similarity: Callable[[str, str], float] = rouge_l
    read_along: bool = False
    keep_replies: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.texts is None and self.prompts is None and not self.questions:
            raise InputError("a trial without texts, prompts and questions: expected at least one of them")
        if min(self.tokens, self.max_new_tokens, self.batch_size) < 1:
            raise InputError("tokens, max_new_tokens and batch_size: expected 1 or more")


@dataclass(frozen=True)
class Validation:
    """What became of a recipient whose states were replaced.

    Attributes:
        donor: the model whose states were mapped.
        recipient: the model that took them.
        pair: (donor layer, recipient layer).
        pairing: trial -> which tokens of its texts have a counterpart.
        scores: trial (`"texts"`, `"replies"`, `"choices"`) -> arm -> metric -> figure with its 95 % interval. The first
            arm, `"unpatched"`, is the recipient by itself; `"donor"` the donor by itself. The metrics:

            - texts: `kl` (unpatched || patched), `perplexity`, `agreement` (same most likely token), `cosine` (centred
              rows), `fvu_mean` and `fvu_median` over dimensions; see `experiments.mapping.teacher_forcing`.
            - replies: `to_own`, mean similarity to the unpatched recipient's reply; `to_donor`, to the donor's; `tvs`,
              share nearer to the recipient's than to the donor's; `mva`, share nearer to the recipient's than the
              mean-ablated reply is. Ties are left out of both and their n, so that .5 is chance. And the judge's.
            - choices: `accuracy`, and `accuracy_by_length` with log-probabilities per character.
        values: the same for each text, prompt or question, for paired tests; FVU has none, `nats` stand for perplexity.
        replies: arm -> the texts, where the trial keeps them.
        facts: how the mapper was fitted.
    """

    donor: str
    recipient: str
    pair: cv.LayerPair
    pairing: dict[str, Pairing]
    scores: dict[str, dict[str, dict[str, Score]]]
    values: dict[str, dict[str, Values]]
    replies: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, without the replies."""
        return {
            "donor": self.donor,
            "recipient": self.recipient,
            "pair": list(self.pair),
            "pairing": {trial: one._asdict() for trial, one in self.pairing.items()},
            "scores": {
                trial: {arm: {metric: one._asdict() for metric, one in many.items()} for arm, many in arms.items()}
                for trial, arms in self.scores.items()
            },
            "facts": self.facts,
        }


def validate_mapper(
    donor_lm: cv.LM,
    recipient_lm: cv.LM,
    link: cv.Link,
    pair: cv.LayerPair | tuple[int, int],
    trial: Trial,
    *,
    seed: int = 0,
) -> Validation:
    """Fit a mapper of one layer pair and try it, beside its controls.

    For version switching the donor is a fine-tuned version of the recipient: what it does then shows in the `donor`
    arm, and how much of it one layer's states bring along, in the mapped one.

    Args:
        donor_lm: the model whose states are mapped.
        recipient_lm: the model that takes them.
        link: the two models' profiles and how converters are fitted; see `commandv.mapping.fit_mapper`.
        pair: (donor layer, recipient layer).
        trial: what to try it on; `commandv.mapping.unseen` gives the prompts that the fit leaves out.
        seed: of the random controls.

    Raises:
        MismatchError: profiles of other models; reading along with other tokens.
        InputError: a layer that is not there, too few shared rows, or a text that cannot be used.
    """
    link.donor.model.require(donor_lm.ref, "the donor's profile")
    link.recipient.model.require(recipient_lm.ref, "the recipient's profile")
    arms = mapper_arms(link, pair, seed=seed)
    return try_mappers(donor_lm, recipient_lm, arms, trial)


def try_mappers(donor_lm: cv.LM, recipient_lm: cv.LM, arms: Mapping[str, Mapper], trial: Trial) -> Validation:
    """Try mappers of one layer pair, side by side.

    Args:
        donor_lm: the model whose states are mapped.
        recipient_lm: the model that takes them.
        arms: name -> mapper, such as `mapper_arms` gives; `mva` needs one named `"mean-ablation"`.
        trial: what to try them on.

    Raises:
        MismatchError: a mapper of another pair of models; reading along with other tokens.
        InputError: no mapper, mappers of different layers, a layer that is not there, or a text that cannot be used.
    """
    pairs = {mapper.pair for mapper in arms.values()}
    if len(pairs) != 1 or {UNPATCHED, DONOR} & set(arms):
        raise InputError(
            f"mappers {list(arms)} of layer pairs {sorted(pairs)}: expected one layer pair, and names other than "
            f"{UNPATCHED!r} and {DONOR!r}"
        )
    for mapper in arms.values():
        mapper.require(donor_lm, recipient_lm)
    run = _Run(donor_lm, recipient_lm, dict(arms), pairs.pop(), trial)
    if trial.texts is not None:
        run.read(trial.texts)
    if trial.prompts is not None:
        run.reply(trial.prompts)
    if trial.questions:
        run.choose(trial.questions)
    facts = next(iter(arms.values())).facts
    return Validation(
        donor_lm.id, recipient_lm.id, run.pair, run.pairing, run.scores, run.values, run.replies, dict(facts)
    )


class _Run:
    """The trials of some mappers, and what they have given so far."""

    def __init__(
        self, donor: cv.LM, recipient: cv.LM, arms: dict[str, Mapper], pair: cv.LayerPair, trial: Trial
    ) -> None:
        self.donor, self.recipient, self.arms, self.pair, self.trial = donor, recipient, arms, pair, trial
        self.pairing: dict[str, Pairing] = {}
        self.scores: dict[str, dict[str, dict[str, Score]]] = {}
        self.values: dict[str, dict[str, Values]] = {}
        self.replies: dict[str, list[str]] = {}

    def _counterparts(self, trial: str, texts: cv.PromptSet, until: int | None = None) -> list[Counterparts]:
        many = read_counterparts(
            self.donor, self.recipient, self.pair, texts, until=until, batch_size=self.trial.batch_size
        )
        self.pairing[trial] = pairing(many)
        return many

    def read(self, texts: cv.PromptSet) -> None:
        passages = cv.PromptSet(tuple(cv.Prompt(one.response or one.text) for one in texts), texts.name)
        many = self._counterparts(TEXTS, passages, self.trial.tokens)
        found = read_texts(self.recipient, many, self.arms)
        self.scores[TEXTS] = {name: score_texts(values, many) for name, values in found.items()}
        metrics = ("kl", "nats", "agreement", "cosine")
        self.values[TEXTS] = {
            name: {metric: getattr(values, metric) for metric in metrics} for name, values in found.items()
        }

    def reply(self, prompts: cv.PromptSet) -> None:
        trial = self.trial
        if trial.read_along:
            _require_same_tokens(self.donor, self.recipient, prompts.texts)
        many = self._counterparts(REPLIES, cv.PromptSet(tuple(cv.Prompt(text) for text in prompts.texts)))
        replies: dict[str, list[str]] = {}
        for name, lm in ((UNPATCHED, self.recipient), (DONOR, self.donor)):
            replies[name] = self._generated(lm, prompts)
        for name, mapper in self.arms.items():
            along = Along(self.donor, mapper) if trial.read_along else None
            with replaced(self.recipient, many, mapper, along):
                replies[name] = self._generated(self.recipient, prompts)
        values = {name: _likeness(name, replies, trial.similarity) for name in replies}
        units = {"to_own": "similarity", "to_donor": "similarity"}
        if trial.judge is not None:
            units[trial.judge.name] = trial.judge.unit
            for name, answers in replies.items():
                values[name][trial.judge.name] = list(trial.judge(prompts.prompts, answers))
        self.values[REPLIES] = values
        self.scores[REPLIES] = {
            name: {metric: _score(metric, labels, units.get(metric, "rate")) for metric, labels in one.items()}
            for name, one in values.items()
        }
        self.replies = replies if trial.keep_replies else {}

    def _generated(self, lm: cv.LM, prompts: cv.PromptSet) -> list[str]:
        return cv.generate(lm, prompts, max_new_tokens=self.trial.max_new_tokens, batch_size=self.trial.batch_size)

    def choose(self, questions: Sequence[Question]) -> None:
        both = (cv.Prompt(question.text, choice) for question in questions for choice in question.choices)
        many = self._counterparts(CHOICES, cv.PromptSet(tuple(both)))
        size = self.trial.batch_size
        found = {}
        for name, lm in ((UNPATCHED, self.recipient), (DONOR, self.donor)):
            found[name] = multiple_choice(lm, questions, name=name, batch_size=size)
        for name, mapper in self.arms.items():
            with replaced(self.recipient, many, mapper):
                found[name] = multiple_choice(self.recipient, questions, name=name, batch_size=size)
        self.values[CHOICES] = {
            name: {"accuracy": list(one.labels), "accuracy_by_length": list(one.labels_by_length)}
            for name, one in found.items()
        }
        self.scores[CHOICES] = {
            name: {"accuracy": one.score(), "accuracy_by_length": one.score(by_length=True)}
            for name, one in found.items()
        }


def _require_same_tokens(donor: cv.LM, recipient: cv.LM, texts: Sequence[str]) -> None:
    different = next((text for text in texts if cv.encode(donor, text).ids != cv.encode(recipient, text).ids), None)
    if different is not None:
        raise MismatchError(
            f"{donor.id} and {recipient.id} make different tokens of {different[:40]!r} ...; reading along needs two "
            "versions of one model, with one tokenizer and prompt format. Leave read_along out"
        )


def _likeness(arm: str, replies: Mapping[str, list[str]], similarity: Callable[[str, str], float]) -> Values:
    """Return one arm's similarities, TvS and MvA, prompt by prompt."""

    def likeness(a: str, b: str) -> list[float]:
        return [similarity(one, other) for one, other in zip(replies[a], replies[b], strict=True)]

    values = {"to_own": likeness(arm, UNPATCHED), "to_donor": likeness(arm, DONOR)}
    values["tvs"] = _above(values["to_own"], values["to_donor"])
    if arm != MEAN_ABLATION and MEAN_ABLATION in replies:
        values["mva"] = _above(values["to_own"], likeness(MEAN_ABLATION, UNPATCHED))
    return values


def _above(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return 1 where the first value is larger, 0 where the second is, NaN where neither."""
    return [math.nan if a == b else float(a > b) for a, b in zip(first, second, strict=True)]


def _score(name: str, labels: Sequence[float], unit: str) -> Score:
    """Return the rate or mean of the labels that are given; NaN of none."""
    given = [label for label in labels if not math.isnan(label)]
    if not given:
        return Score(name, math.nan, math.nan, math.nan, 0, unit)
    return rate(name, [bool(label) for label in given]) if unit == "rate" else mean(name, given, unit)
