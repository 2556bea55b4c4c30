"""Whether a behaviour will arrive, told before the recipient generates a token with it.

The donor's own answers are run through the recipient, teacher-forced, without and with the adapter. What the adapter
raises of them is the evidence; a logistic regression on real attempts between models turns it into a probability.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pydantic
import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.models.encoding import Encoded, encode
from commandv.models.generation import batches
from commandv.models.lm import LM
from commandv.models.state import require_own
from commandv.transfer.distil.demonstrate import log_probs_after, places
from commandv.transfer.distil.demonstrations import Demonstrations
from commandv.transfer.distil.texts import beginning

ASKED = 16  # demonstrations that are read, spread over all
TOKENS = 24  # of each answer
RAISED = 1.0  # nats by which the donor's adapter raises a token that counts as its doing
LOGITS = 1 << 28  # bytes of logits at once
FITTED = importlib.resources.files("commandv.evaluation") / "data" / "forecast.json"

# What the regression sees of the evidence, and how a sentence says it.
FEATURES: dict[str, str] = {
    "first_gain": "the adapter adds {:+.1f} nats to the first token of the donor's answers",
    "first_won": "of the donor's first tokens, {:.0%} more become the recipient's likeliest",
    "raised_won": "of the later tokens that the donor's adapter raises, {:.0%} more become the recipient's likeliest",
    "rest_gain": "the adapter adds {:+.2f} nats to each later token of the donor's answers",
    "first_push": "the adapter moves the recipient's first token by {:.1f} nats (KL)",
}


class Feature(pydantic.BaseModel):
    """One feature of the fit: its mean, standard deviation, range, and weight of the standardised value."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    mean: float
    deviation: float
    low: float
    high: float
    weight: float


class Fit(pydantic.BaseModel):
    """The logistic regression, and what it was fitted on."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    features: dict[str, Feature]  # by name
    bias: float  # log-odds of an attempt whose features are all at their means
    cells: int  # attempts
    pairs: int  # pairs of models
    models: tuple[str, ...]  # their names
    arrived: float  # the share of the attempts that arrived
    auc: float  # on pairs of models that the fit did not see

    def parts(self, evidence: Mapping[str, float]) -> dict[str, float]:
        """Return what each feature adds to the log-odds."""
        return {name: one.weight * (evidence[name] - one.mean) / one.deviation for name, one in self.features.items()}

    def probability(self, evidence: Mapping[str, float]) -> float:
        """Return 1 / (1 + exp(-(bias + Σ weight (value - mean) / deviation)))."""
        return float(torch.sigmoid(torch.tensor(self.bias + sum(self.parts(evidence).values()), dtype=torch.float64)))


@functools.cache
def fitted() -> Fit:
    """Return the regression that comes with the library."""
    return Fit.model_validate_json(FITTED.read_bytes())


@dataclass(frozen=True)
class Forecast:
    """Whether a behaviour will arrive.

    Attributes:
        probability: that the recipient's strict rate rises, the 95 % interval leaving out 0, by half of the donor's
            own gain or more.
        reason: the feature that decides, in words.
        evidence: all that was read; see `evidence`.
        fitted_on: what the probability rests on.
        warnings: features outside the range of the fit, where it was never tested.
    """

    probability: float
    reason: str
    evidence: dict[str, float]
    fitted_on: str
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.probability:.0%}: {self.reason}", self.fitted_on, *self.warnings])

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)


@checked
def predict(lm: LM, adapter: Adapter, demonstrations: Demonstrations, *, scale: float = 1.0) -> Forecast:
    """Forecast, before the recipient generates a token with it, whether an adapter's behaviour will arrive.

    Up to `ASKED` of the donor's answers are run through the recipient without and with the adapter. The recipient as it
    is begins a few answers, so that white space at their beginning is as it would write it.

    Args:
        lm: the recipient, with nothing attached.
        adapter: the recipient's own: pasted, distilled, trained or steering.
        demonstrations: the donor's answers, and what its adapter changes in them; see `demonstrate`.
        scale: factor on the adapter's deltas.

    Returns:
        The probability, and why.

    Raises:
        InputError: the demonstrations are texts only, or something is attached to the recipient.
        MismatchError: the adapter is for another model.
    """
    return judged(evidence(lm, adapter, demonstrations, scale=scale), fitted())


def judged(evidence: Mapping[str, float], fit: Fit) -> Forecast:
    """Return the forecast that a fit gives for evidence."""
    probability, parts = fit.probability(evidence), fit.parts(evidence)
    sign = 1 if probability >= 0.5 else -1
    decides = max(parts, key=lambda name: sign * parts[name])
    outside = tuple(
        f"{name} = {evidence[name]:.2f} is outside the range of the fit, {one.low:.2f} to {one.high:.2f}: the "
        "probability was never tested there"
        for name, one in fit.features.items()
        if not one.low <= evidence[name] <= one.high
    )
    verdict = "likely to arrive" if sign > 0 else "unlikely to arrive"
    known = (
        f"fitted on {fit.cells} attempts between {fit.pairs} pairs of models ({', '.join(fit.models)}), of which "
        f"{fit.arrived:.0%} arrived; AUC {fit.auc:.2f} on pairs left out"
    )
    because = f"most of all because {FEATURES[decides].format(evidence[decides])}"
    if sign * parts[decides] <= 0:  # the base rate alone decides
        because = (
            f"as {fit.arrived:.0%} of the attempts did; no feature speaks more for that than in the average of them"
        )
    reason = f"{verdict}, {because}"
    return Forecast(probability, reason, dict(evidence), known, outside)


class _Place(NamedTuple):
    """One token of an answer, as the recipient and the donor see it."""

    first: bool  # the answer begins with it
    gain: float  # log p(token | with the adapter) - log p(token | without), in nats
    p: float  # probability of the token with the adapter
    taken: bool  # it is the likeliest with the adapter
    before: bool  # it is the likeliest without
    push: float  # KL(without || with) of the whole distribution, in nats
    # by how many nats the donor's adapter raises the donor's token there; NaN where its tokens end elsewhere
    donor: float


def evidence(lm: LM, adapter: Adapter, demonstrations: Demonstrations, *, scale: float = 1.0) -> dict[str, float]:
    """Read some of the donor's answers in the recipient without and with an adapter; tell what the adapter does.

    Arguments and errors as in `predict`.

    Returns:
        Means over the answers' first tokens (`first_...`), over all later ones (`rest_...`), and over those later ones
        that the donor's adapter raises by a nat or more (`raised_...`; 0 where there are none): `gain` in nats, `p` the
        probability with the adapter, `taken` and `before` the share that is the likeliest token with and without, `won`
        their difference, `push` KL(without || with) in nats, `donor` the donor's own gain.
    """
    found = _read(lm, adapter, demonstrations, scale)
    first, rest = [one for one in found if one.first], [one for one in found if not one.first]
    raised = [one for one in rest if one.donor >= RAISED]
    told = dict[str, float]()
    for name, many in (("first", first), ("rest", rest), ("raised", raised)):
        means = dict.fromkeys(_Place._fields, 0.0)
        if many:
            table = torch.tensor(many, dtype=torch.float64).nanmean(0).nan_to_num()
            means = dict(zip(_Place._fields, table.tolist(), strict=True))
        means |= {"won": means["taken"] - means["before"], "n": float(len(many))}
        told |= {f"{name}_{key}": value for key, value in means.items() if key != "first"}
    return told


def _read(lm: LM, adapter: Adapter, shown: Demonstrations, scale: float) -> list[_Place]:
    """Return what the adapter does at each token of some of the answers."""
    require_own(lm, "predicting")
    if shown.changes is None:
        raise InputError(
            f"the demonstrations of {shown.name} are texts only, without what an adapter changes in its donor, which a "
            "forecast is measured against; demonstrate with a donor and its adapter"
        )
    chosen = sorted({int(i) for i in torch.linspace(0, len(shown) - 1, ASKED).round()})
    lead = beginning(lm, shown.prompts)
    whole = [encode(lm, shown.prompts[i], lead + shown.answers[i]) for i in chosen]
    encoded = [
        one._replace(ids=one.ids[: (end := one.n_prompt + TOKENS)], text_ends=one.text_ends[:end]) for one in whole
    ]
    gains = shown.changes.ratio.gather(1, shown.changes.log_p.argmax(1, keepdim=True))[:, 0].tolist()
    donor: dict[int, dict[int, float]] = {i: {} for i in chosen}
    for (i, end), gain in zip(shown.changes.places.tolist(), gains, strict=True):
        donor.get(i, {})[end] = gain
    lengths = [one.n_prompt for one in encoded]
    size = lm.model.get_output_embeddings().weight.shape[0]
    at_once = max(1, min(ASKED, LOGITS // (4 * (TOKENS + 1) * size)))
    found = []
    with torch.inference_mode():
        for members in batches(lengths, at_once, alike=lengths if lm.recurrent else None):
            rows = [encoded[i] for i in members]
            off, on = (log_probs_after(lm, rows, one, scale) for one in (None, adapter))
            for i, row, without, with_it in zip(members, rows, off, on, strict=True):
                found += _places(row, without, with_it, donor[chosen[i]], len(lead))
    return found


def _cut(one: Encoded) -> Encoded:
    end = one.n_prompt + TOKENS
    return one._replace(ids=one.ids[:end], text_ends=one.text_ends[:end])


def _places(one: Encoded, off: Tensor, on: Tensor, donor: Mapping[int, float], lead: int) -> list[_Place]:
    """Return what is told at the tokens of one answer, which so many characters of white space stand before."""
    reply = one.ids[one.n_prompt :]
    told = {max(0, end - lead): at for end, at in zip(*places(one), strict=True) if at < len(reply)}
    found = []
    for end, at in told.items():
        token, a, b = reply[at], off[at], on[at]
        push = float((a.exp() * (a - b)).nan_to_num().sum().clamp(min=0))
        before, taken = (int(one.argmax()) == token for one in (a, b))
        gain, p = float(b[token] - a[token]), float(b[token].exp())
        found.append(_Place(end == 0, gain, p, taken, before, push, donor.get(end, math.nan)))
    return found
