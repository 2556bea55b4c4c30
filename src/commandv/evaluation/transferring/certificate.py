"""What a transfer found: the certificate that goes with the adapter, and the sentence that says it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from commandv.adapters.adapter import Adapter
from commandv.evaluation.arms import ARMS, FEW_SHOT, IN_SPAN, SHUFFLED, UNMODIFIED
from commandv.evaluation.likeness import Likeness
from commandv.evaluation.meter import price_scores
from commandv.evaluation.report.tables import figure, number
from commandv.evaluation.results import Arm, Attempt, Sample
from commandv.evaluation.scores import Score, pooled
from commandv.evaluation.statistics import Comparison, compare, difference
from commandv.evaluation.tasks import Task
from commandv.evaluation.transferring.job import Job
from commandv.evaluation.tuning import Tuned
from commandv.evaluation.verdicts import DOES_NOT, DONOR, Verdict, verdict

VERSION = 1
CONTROLS = (IN_SPAN, SHUFFLED)
N_SAMPLES = 3
CALLED = {
    UNMODIFIED: "unmodified",
    IN_SPAN: "random directions within its activations (the mean of several draws)",
    SHUFFLED: "the same fit on wrongly paired prompts",
    FEW_SHOT: "a few-shot prompt of the donor's answers",
    DONOR: "the donor with its adapter",
}


@dataclass(frozen=True, eq=False)
class Transferred:
    """A behaviour carried into another model, and what was measured of it.

    Attributes:
        adapter: the recipient's, scaled as chosen; its provenance holds the certificate.
        verdict: whether the behaviour crosses, and the rule that led to it.
        sentence: the same with its figures: at what price, and compared with what.
        by: the method that was chosen.
        arms: what was measured on the test prompts.
        samples: development prompts with the recipient's answers without and with the adapter: the first in which the
            behaviour is absent before and present after; none for tasks that keep no answers.
        certificate: all of it as plain values, JSON-able.
    """

    adapter: Adapter
    verdict: Verdict
    sentence: str
    by: str
    arms: Mapping[str, Arm]
    samples: Sequence[Sample]
    certificate: Mapping[str, Any]

    @property
    def arrived(self) -> bool:
        """Whether the behaviour is there, more than in every control."""
        return self.verdict.word != DOES_NOT


def certified(
    job: Job,
    task: Task,
    adapter: Adapter,
    name: str,
    arms: Sequence[Arm],
    *,
    base: Attempt,
    after: Attempt,
    donors: Mapping[str, Arm],
    tried: Mapping[str, Tuned],
    missing: Mapping[str, str],
    seconds: Mapping[str, float],
) -> Transferred:
    """Judge what was measured on the test prompts, and write the certificate into the adapter, made by the arm `name`.

    On the development prompts `base` is the unmodified recipient, `after` the chosen setting, and `donors` the donor
    "without" and "with" its adapter. `tried` are the settings of each method's arm, `missing` says why a method or
    control could not be made, and `seconds` what each stage took.
    """
    by_name = {arm.method: arm for arm in arms}
    unit = task.judge.unit
    labels = {arm: [one.labels[task.name]] for arm, one in by_name.items()}
    # The few-shot prompt is a rival, not a control: the question is not whether it differs from the unmodified model.
    asked = {arm: one for arm, one in labels.items() if arm not in (DONOR, FEW_SHOT)}
    found = {row.method: row for row in compare(asked, unit, task.success)}
    judgment = verdict(asked, found, unit, task.success, arm=name, controls=CONTROLS)
    scores = {arm: pooled(arm, one, unit) for arm, one in labels.items()}
    facts = {arm: _facts(task, one, scores[arm], found.get(arm)) for arm, one in by_name.items()}
    chosen = tried[name]
    sentence = _sentence(job, task, judgment, name, chosen, scores, facts, labels)
    samples = _samples(task, base, after)
    certificate: dict[str, Any] = {
        "version": VERSION,
        "verdict": judgment.word,
        "why": judgment.why,
        "sentence": sentence,
        "by": ARMS[name].by,
        "arm": name,
        "layers": adapter.layers,
        "setting": {"layers": chosen.chosen.setting.layers, "scale": chosen.chosen.setting.scale},
        "budget": {"kl": job.settings.budget, "loops_above_unmodified": job.settings.most_loops},
        "within_budget": chosen.within_budget,
        "task": _task(task, job),
        "donor": {"id": job.donor.id, "weights": job.donor.ref.weights, "adapter": job.adapter.name,
                  "development": {way: pooled(way, [one.labels[task.name]], unit)._asdict()
                                  for way, one in donors.items()}},
        "recipient": {"id": job.recipient.id, "weights": job.recipient.ref.weights},
        "arms": facts,
        "tried": {ARMS[arm].by: [one.as_dict() for one in many.tried] for arm, many in tried.items()},
        "missing": dict(missing),
        "samples": [one.model_dump() for one in samples],
        "prompts": {which: getattr(job, which).hash for which in ("prompts", "text", "asked", "passages")},
        "seed": job.settings.seed,
        "seconds": {stage: round(one, 1) for stage, one in seconds.items()},
    }  # fmt: skip
    whole = replace(adapter, provenance={**adapter.provenance, "certificate": certificate})
    return Transferred(whole, judgment, sentence, ARMS[name].by, by_name, samples, certificate)


def _facts(task: Task, arm: Arm, score: Score, found: Comparison | None) -> dict[str, Any]:
    return {
        "score": score._asdict(),
        "difference": found.difference._asdict() if found and found.difference else None,
        "adjusted_p": found.adjusted if found else None,
        "loops": pooled("loops", [arm.loops[task.name]], "rate")._asdict(),
        "words": statistics.fmean(arm.words[task.name]),
        "price": {measure: one._asdict() for measure, one in price_scores(arm.price).items()},
        "tokens_per_request": arm.cost.tokens,
    }


def _task(task: Task, job: Job) -> dict[str, Any]:
    facts = {
        "name": task.name, "judge": task.judge.name, "unit": task.judge.unit, "success": task.success,
        "max_new_tokens": task.max_new_tokens, "n_dev": len(job.dev), "n_test": len(job.test),
        "dev": job.dev.hash, "test": job.test.hash,
    }  # fmt: skip
    if isinstance(task.judge, Likeness):
        facts |= {"accuracy_on_the_donor": round(task.judge.accuracy, 4), "learned_from": task.judge.n}
    return facts


def _samples(task: Task, base: Attempt, after: Attempt) -> list[Sample]:
    """Return the first development prompts in which the behaviour is absent before and present after."""
    if not (base.answers and after.answers) or task.judge.unit != "rate":
        return []
    absent, present = (0, 1) if task.success == "more" else (1, 0)
    return [
        Sample(prompt=prompt, before=before, after=now)
        for prompt, before, now, was, is_ in zip(
            task.dev.texts, base.answers, after.answers, base.labels, after.labels, strict=False
        )
        if was == absent and is_ == present
    ][:N_SAMPLES]


# -- in words ---------------------------------------------------------------------------------------------------------


def _sentence(
    job: Job,
    task: Task,
    judgment: Verdict,
    name: str,
    tuned: Tuned,
    scores: Mapping[str, Score],
    facts: Mapping[str, Any],
    labels: Mapping[str, Any],
) -> str:
    """Return the verdict with its figures, made of them."""
    ours, others = facts[name], [arm for arm in (UNMODIFIED, *CONTROLS) if arm in scores]
    compared = ", ".join(f"{figure(scores[arm])} with {CALLED[arm]}" for arm in others[1:])
    share = (
        f"of {scores[name].n} answers" if task.judge.unit == "rate" else f"{task.judge.unit}, {scores[name].n} answers"
    )
    said = (
        f"{task.name} {judgment.word} from {job.donor.id} to {job.recipient.id} by {ARMS[name].by}: "
        f"{figure(scores[name])} {share}, {figure(scores[UNMODIFIED])} unmodified"
        + (f", {compared}" if compared else "")
        + (f" ({judgment.why})" if judgment.word == DOES_NOT else "")
    )
    price = ours["price"]
    said += (
        f"; it costs {number(price['kl']['value'])} nats a token on benign text "
        f"({number(price['kl_first']['value'])} at the first), loops in {number(ours['loops']['value'])} of answers "
        f"({number(facts[UNMODIFIED]['loops']['value'])} unmodified) and no tokens."
    )
    if not tuned.within_budget:
        said += " No setting was within the budget; the cheapest was taken."
    return said + _rival(task, name, scores, facts, labels)


def _rival(
    task: Task, name: str, scores: Mapping[str, Score], facts: Mapping[str, Any], labels: Mapping[str, Any]
) -> str:
    """Say what a few-shot prompt does beside it."""
    if FEW_SHOT not in scores:
        return ""
    gap = difference("gap", labels[FEW_SHOT], labels[name], task.judge.unit)
    toward = gap.value if task.success == "more" else -gap.value
    does = "does more" if toward > 0 else "does less" if toward < 0 else "does as much"
    kl = facts[FEW_SHOT]["price"]["kl"]["value"]
    return (
        f" A few-shot prompt of the donor's answers {does}: {figure(scores[FEW_SHOT])}, for "
        f"{facts[FEW_SHOT]['tokens_per_request']:.0f} tokens a request and {number(kl)} nats a token."
    )
