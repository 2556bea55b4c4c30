"""Forecasts: what is read from a recipient before it generates, and the probability and words made of it."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

import commandv as cv
from commandv.errors import InputError, MismatchError
from commandv.evaluation.forecast import FEATURES, Feature, Fit, evidence, fitted, judged
from commandv.models.encoding import encode, last_logits, pad
from tiny import tiny_lm
from toy import FORMS, SUBJECTS

PROMPTS = [form.format(subject) for subject in SUBJECTS for form in FORMS][:20]
ANSWERS = [f"The fox sleeps under {prompt}" for prompt in PROMPTS]


@functools.cache
def recipient() -> cv.LM:
    return tiny_lm("llama", chat=True, seed=3, id="recipient")


def pushing(lm: cv.LM, text: str, strength: float, positions: str = "l1") -> cv.Adapter:
    """An adapter that makes a text's first token likelier, or with a strength below 0 less likely."""
    token = encode(lm, "What?", text).ids[encode(lm, "What?").n_prompt]
    row = lm.model.get_output_embeddings().weight.detach()[token].float()
    one = cv.Intervention(
        torch.zeros(1, lm.d_model), torch.ones(1), strength * row[None], positions=cv.Positions.parse(positions)
    )
    return cv.Adapter({lm.n_layers - 1: (one,)}, lm.ref, "fox")


@functools.cache
def shown() -> cv.Demonstrations:
    donor = tiny_lm("llama", chat=True, seed=0, id="donor")
    return cv.demonstrate(donor, pushing(donor, "The fox", 40, "l1+g4"), PROMPTS, answers=ANSWERS)


def fit(**weights: float) -> Fit:
    features = {name: Feature(mean=0, deviation=1, low=-30, high=30, weight=weights.get(name, 0)) for name in FEATURES}
    return Fit(features=features, bias=0, cells=10, pairs=3, models=("a", "b"), arrived=0.5, auc=0.8)


def first_log_p(lm: cv.LM, adapter: cv.Adapter | None) -> torch.Tensor:
    """Log-probabilities of the answers' first token, prompt by prompt."""
    token = encode(lm, "What?", "The fox").ids[encode(lm, "What?").n_prompt]
    found = []
    for prompt in PROMPTS:
        with torch.inference_mode(), cv.attach(lm, adapter) if adapter else torch.no_grad():
            found.append(last_logits(lm, pad(lm, [encode(lm, prompt).ids]), 1)[0, 0].log_softmax(-1)[token])
    return torch.stack(found)


def test_the_first_tokens_gain_is_that_of_plain_passes():
    lm, few = recipient(), replace(shown(), prompts=tuple(PROMPTS[:20]))
    adapter = pushing(lm, "The fox", 3)
    told = evidence(lm, adapter, few)
    on, off = first_log_p(lm, adapter), first_log_p(lm, None)
    chosen = sorted({round(float(i)) for i in torch.linspace(0, 19, 16).round()})
    assert told["first_n"] == len(chosen) == 16
    assert told["first_gain"] == pytest.approx(float((on - off)[chosen].mean()), abs=1e-4)
    assert told["first_p"] == pytest.approx(float(on[chosen].exp().mean()), abs=1e-4)
    assert told["rest_gain"] == pytest.approx(0, abs=1e-5)  # it acts at the last prompt token alone, at the last block


def test_an_adapter_that_raises_the_donors_tokens_is_likelier_to_bring_its_behaviour():
    lm = recipient()
    up, down = (cv.predict(lm, pushing(lm, "The fox", by), shown()) for by in (20, -20))
    assert up.evidence["first_won"] == 1
    assert down.evidence["first_gain"] < 0 < up.evidence["first_gain"]
    assert 0 <= down.probability < up.probability <= 1
    assert down.probability < 0.5
    assert "unlikely to arrive" in down.reason


def test_nothing_attached_or_of_no_strength_changes_nothing():
    told = evidence(recipient(), pushing(recipient(), "The fox", 5), shown(), scale=0.0)
    assert told["first_gain"] == told["first_push"] == told["rest_gain"] == told["raised_won"] == 0
    assert told["first_donor"] > 1  # the donor's own gain does not depend on the recipient


def test_the_donors_own_gain_is_the_ratio_it_demonstrated():
    made = shown()
    chosen = sorted({round(float(i)) for i in torch.linspace(0, 19, 16).round()})
    rows = [int((made.changes.places == torch.tensor([i, 0])).all(1).nonzero()) for i in chosen]
    likeliest = made.changes.log_p[rows].argmax(1)
    wanted = made.changes.ratio[rows].gather(1, likeliest[:, None]).mean()
    assert evidence(recipient(), pushing(recipient(), "The", 1), made)["first_donor"] == pytest.approx(float(wanted))


def test_the_probability_is_the_logistic_of_the_weighted_features_and_the_largest_part_is_the_reason():
    told = dict.fromkeys(FEATURES, 0.0) | {"first_gain": 2.0, "rest_gain": -1.0}
    found = judged(told, fit(first_gain=1.0, rest_gain=0.5))
    assert found.probability == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert "+2.0 nats to the first token" in found.reason
    assert "10 attempts between 3 pairs of models (a, b), of which 50% arrived; AUC 0.80" in found.fitted_on
    against = judged(told, fit(first_gain=0.1, rest_gain=3.0))
    assert against.probability < 0.5
    assert "-1.00 nats to each later token" in against.reason
    assert not found.warnings
    assert found.as_dict()["evidence"] == told
    assert str(found).startswith("82%: likely to arrive")


def test_where_no_feature_speaks_for_the_verdict_the_base_rate_is_the_reason():
    rare = fit(first_gain=0.1).model_copy(update={"bias": -3.0})
    found = judged(dict.fromkeys(FEATURES, 0.0) | {"first_gain": 2.0}, rare)
    assert found.probability == pytest.approx(1 / (1 + math.exp(2.8)))
    assert found.reason.startswith("unlikely to arrive, as 50% of the attempts did")


def test_what_lies_outside_the_fit_is_said():
    told = dict.fromkeys(FEATURES, 0.0) | {"first_push": 31.0}
    assert ["first_push = 31.00 is outside" in one for one in judged(told, fit()).warnings] == [True]


def test_the_fit_that_comes_with_the_library_is_of_the_features_that_are_read():
    assert list(fitted().features) == list(FEATURES)
    assert fitted().cells >= 40
    assert all(one.low < one.high for one in fitted().features.values())


def test_answers_without_what_an_adapter_changes_are_refused():
    texts = cv.demonstrate(None, None, PROMPTS, answers=ANSWERS)
    with pytest.raises(InputError, match=r"texts only.*demonstrate with a donor and its adapter"):
        cv.predict(recipient(), pushing(recipient(), "The", 1), texts)


def test_a_foreign_adapter_and_an_attached_one_are_refused():
    lm, wide = recipient(), tiny_lm("llama", hidden_size=48, id="wide")
    with pytest.raises(MismatchError, match="width"):
        cv.predict(lm, pushing(wide, "The", 1), shown())
    own = pushing(lm, "The", 1)
    with cv.attach(lm, own), pytest.raises(InputError, match="attached"):
        cv.predict(lm, own, shown())


@pytest.mark.parametrize(("arch", "chat"), [("gpt2", False), ("mamba", True), ("gemma3_text", True)])
def test_other_architectures_tokenizers_without_a_template_and_recurrent_models_are_read(arch, chat):
    lm = tiny_lm(arch, chat=chat, vocab=300, id=arch)
    found = cv.predict(lm, pushing(lm, "The fox", 5), shown())
    assert 0 <= found.probability <= 1
    assert found.evidence["first_gain"] > 0
