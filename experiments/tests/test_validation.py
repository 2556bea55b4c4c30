"""What the trials say of mappers, against known answers on tiny models."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import commandv as cv
import mapped
import real
import tiny
from commandv.errors import InputError, MismatchError
from commandv.evaluation import ByText
from commandv.mapping import MAPPED, MEAN_ABLATION, ROTATED, SHUFFLED, mapper_arms, read_counterparts, replaced, unseen
from commandv.prompts.sets import Prompt, PromptSet
from commandv.transfer.match import LayerPair
from experiments.mapping.similarity import rouge_l
from experiments.mapping.teacher_forcing import read_texts
from experiments.mapping.trials import Trial, try_mappers, validate_mapper
from mapped import PROMPTS, QUESTIONS, TEXTS, constant, identity, profiled

donor, recipient, profiles, versions = mapped.donor, mapped.recipient, mapped.profiles, mapped.versions


# -- what the trials say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("", "", 1.0),
        ("tea", "", 0.0),
        ("The cat sat.", "the CAT sat", 1.0),
        ("a b c d", "a c x d", 2 * 3 / 8),
        ("police killed the gunman", "the gunman killed police", 2 * 2 / 8),  # section 3.1 of the paper: F = .5
        ("one two", "two one two", 4 / 5),
    ],
)
def test_rouge_l(a, b, expected):
    assert rouge_l(a, b) == rouge_l(b, a) == pytest.approx(expected)


def test_texts_against_figures_made_by_hand(donor, recipient):
    """One text at a time, every formula written out."""
    many = read_counterparts(donor, recipient, LayerPair(0, 1), TEXTS, until=12)
    value = torch.linspace(-1, 1, 32)
    mapper = constant(donor, recipient, 1, value)
    found = read_texts(recipient, many, {"arm": mapper})
    centre = torch.cat([one.own for one in many]).mean(0)
    for i, one in enumerate(many):
        with torch.no_grad():
            plain = recipient.model(input_ids=torch.tensor([one.ids])).logits[0].log_softmax(-1)
            with replaced(recipient, [one], mapper):
                changed = recipient.model(input_ids=torch.tensor([one.ids])).logits[0].log_softmax(-1)
        inside = range(one.places.start, len(one.ids) - 1)
        kl = np.mean([float((plain[t].exp() * (plain[t] - changed[t])).sum()) for t in inside])
        values = found["arm"]
        assert values.kl[i] == pytest.approx(kl, rel=1e-3)
        assert values.nats[i] == pytest.approx(-np.mean([float(changed[t, one.ids[t + 1]]) for t in inside]), rel=1e-3)
        same = np.mean([int(plain[t].argmax()) == int(changed[t].argmax()) for t in inside])
        assert values.agreement[i] == pytest.approx(same)
        cosine = torch.nn.functional.cosine_similarity(value - centre, one.own - centre).mean()
        assert values.cosine[i] == pytest.approx(float(cosine), abs=1e-4)
        torch.testing.assert_close(values.unexplained[i], (value - one.own).double().square().sum(0))
        assert found["unpatched"].kl[i] == 0
        assert found["unpatched"].nats[i] == pytest.approx(
            -np.mean([float(plain[t, one.ids[t + 1]]) for t in inside]), rel=1e-3
        )


def test_a_model_mapped_into_itself_by_the_identity_stays_itself(recipient):
    mapper = identity(recipient, recipient)
    trial = Trial(texts=TEXTS, prompts=TEXTS, questions=QUESTIONS, tokens=10, max_new_tokens=6, keep_replies=True)
    found = try_mappers(recipient, recipient, {MAPPED: mapper}, trial)
    scores = found.scores["texts"][MAPPED]
    assert scores["kl"].value == scores["fvu_mean"].value == scores["fvu_median"].value == 0
    assert scores["agreement"].value == 1
    assert scores["cosine"].value == pytest.approx(1)
    assert scores["perplexity"] == found.scores["texts"]["unpatched"]["perplexity"]
    assert found.replies[MAPPED] == found.replies["unpatched"] == found.replies["donor"]
    assert found.scores["replies"][MAPPED]["to_own"].value == 1
    assert found.scores["replies"][MAPPED]["tvs"].n == 0  # nothing tells the recipient's replies from the donor's
    assert math.isnan(found.scores["replies"][MAPPED]["tvs"].value)
    assert found.scores["choices"][MAPPED] == {
        metric: score._replace(name=MAPPED) for metric, score in found.scores["choices"]["unpatched"].items()
    }
    assert found.pairing["texts"].exact == 1


def test_the_mean_explains_nothing_and_the_rows_themselves_all(recipient):
    """FVU is 1 of the mean of the very rows it is measured on, 4 of states that err by twice their deviation."""
    many = read_counterparts(recipient, recipient, LayerPair(1, 1), TEXTS, until=12)
    rows = torch.cat([one.own for one in many]).double()
    centre = rows.mean(0)
    arms = {
        "mean": constant(recipient, recipient, 1, centre),
        "opposite": dataclasses.replace(identity(recipient, recipient), convert=lambda s, _: 2 * centre - s),
    }
    arms["mean"] = dataclasses.replace(arms["mean"], pair=LayerPair(1, 1))
    found = try_mappers(recipient, recipient, arms, Trial(texts=TEXTS, tokens=12)).scores["texts"]
    for arm, expected, cosine in (("mean", 1, 0), ("opposite", 4, -1)):
        for metric in ("fvu_mean", "fvu_median"):
            score = found[arm][metric]
            assert score.value == pytest.approx(expected, rel=1e-3)
            assert score.low <= score.value <= score.high
        assert found[arm]["cosine"].value == pytest.approx(cosine, abs=0.01)


def test_tvs_and_mva_count_who_is_nearer(donor, recipient, profiles):
    """With a similarity that is known: texts as numbers, by their length."""

    def likeness(a: str, b: str) -> float:
        return -abs(len(a) - len(b))

    arms = mapper_arms(cv.link(*profiles, write_rows="both"), (1, 2))
    judge = ByText("long", lambda text: len(text) > 8)
    trial = Trial(prompts=PROMPTS[:12], similarity=likeness, judge=judge, max_new_tokens=6, keep_replies=True)
    found = try_mappers(donor, recipient, arms, trial)
    replies = found.replies
    own, theirs, ablated = (replies[name] for name in ("unpatched", "donor", MEAN_ABLATION))
    assert own == cv.generate(recipient, PROMPTS[:12], max_new_tokens=6, batch_size=8)
    assert theirs == cv.generate(donor, PROMPTS[:12], max_new_tokens=6, batch_size=8)
    for arm in arms:
        scores = found.scores["replies"][arm]
        for metric, rival in (("tvs", [(a, b) for a, b in zip(replies[arm], theirs, strict=True)]),
                              ("mva", [(a, b) for a, b in zip(ablated, own, strict=True)])):  # fmt: skip
            if metric == "mva" and arm == MEAN_ABLATION:
                assert metric not in scores
                continue
            pairs = [(likeness(a, b), likeness(*c)) for a, b, c in zip(replies[arm], own, rival, strict=True)]
            told = [a > b for a, b in pairs if a != b]
            assert scores[metric].n == len(told)
            if told:
                assert scores[metric].value == pytest.approx(np.mean(told))
        assert scores["long"].value == pytest.approx(np.mean([len(text) > 8 for text in replies[arm]]))
    assert not try_mappers(donor, recipient, arms, dataclasses.replace(trial, keep_replies=False)).replies


def test_version_switching_brings_the_versions_behaviour_along(versions):
    """What the version does, it does in the base once its states are there; by itself the base does not."""
    base, tuned = versions
    prompts = PROMPTS[:16]
    own, theirs = (cv.generate(lm, prompts, max_new_tokens=6) for lm in versions)
    news = set(theirs) - set(own)
    judge = ByText("behaviour", lambda text: text in news)
    trial = Trial(prompts=prompts, judge=judge, read_along=True, max_new_tokens=6)
    profiles = [profiled(lm) for lm in (tuned, base)]
    arms = {
        "unmapped": identity(tuned, base, 1),
        **mapper_arms(cv.link(*profiles, fit=cv.Affine(), write_rows="both"), (1, 1)),
    }
    found = try_mappers(tuned, base, arms, trial)
    assert found.pairing["replies"].exact == 1
    scores = found.scores["replies"]
    rates = {arm: one["behaviour"].value for arm, one in scores.items()}
    assert rates["donor"] == rates["unmapped"] == np.mean([text in news for text in theirs])
    assert rates["donor"] > 0.9
    assert rates["unpatched"] == 0
    assert (scores["unmapped"]["to_donor"].value, scores["unmapped"]["tvs"].value) == (1, 0)
    assert scores[MAPPED]["to_own"].n == len(prompts)


def test_everything_at_once_and_as_plain_values(donor, recipient, profiles):
    trial = Trial(texts=TEXTS, prompts=PROMPTS[:4], questions=QUESTIONS, tokens=10, max_new_tokens=4)
    link = cv.link(*profiles, fit=cv.FourierRidge(features=32), write_rows="both")
    found = validate_mapper(donor, recipient, link, (1, 2), trial)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["pair"] == [1, 2]
    assert plain["facts"]["fit"]["name"] == "fourier"
    arms = ["unpatched", MAPPED, SHUFFLED, MEAN_ABLATION, ROTATED]
    assert list(plain["scores"]["texts"]) == arms
    for trial_name in ("replies", "choices"):
        assert list(plain["scores"][trial_name]) == [arms[0], "donor", *arms[1:]]
    for name, n in (("texts", 4), ("replies", 4), ("choices", 2)):
        for values in found.values[name].values():
            assert {len(column) for column in values.values()} == {n}


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said(donor, recipient, profiles):
    trial = Trial(prompts=PROMPTS[:2], max_new_tokens=2)
    arms = mapper_arms(cv.link(*profiles, write_rows="both"), (1, 2))
    other = tiny.tiny_lm("llama", seed=8, chat=True, id="other")
    with pytest.raises(MismatchError, match=r"mapper, of the recipient.*got other"):
        try_mappers(donor, other, arms, trial)
    with pytest.raises(MismatchError, match="mapper, of the donor"):
        try_mappers(recipient, recipient, arms, trial)
    with pytest.raises(MismatchError, match="the recipient's profile"):
        validate_mapper(donor, other, cv.link(*profiles), (1, 2), trial)
    for pair in ((3, 0), (0, 4), (-1, 0)):
        with pytest.raises(InputError, match="holds layers"):
            validate_mapper(donor, recipient, cv.link(*profiles), pair, trial)
    gone = dataclasses.replace(arms[MAPPED], pair=LayerPair(1, 9))
    with pytest.raises(InputError, match=r"layer 9 of recipient: expected one of 0 \.\. 3"):
        try_mappers(donor, recipient, {MAPPED: gone}, trial)
    with pytest.raises(InputError, match="expected one layer pair"):
        try_mappers(donor, recipient, {**arms, "more": dataclasses.replace(arms[MAPPED], pair=LayerPair(0, 0))}, trial)
    with pytest.raises(InputError, match="expected one layer pair"):
        try_mappers(donor, recipient, {}, trial)
    with pytest.raises(InputError, match="names other than"):
        try_mappers(donor, recipient, {"donor": arms[MAPPED]}, trial)
    with pytest.raises(MismatchError, match="width 40, got 32"):
        arms[MAPPED](torch.zeros(2, 32), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(InputError, match="at least one of them"):
        Trial()
    with pytest.raises(InputError, match="1 or more"):
        Trial(texts=TEXTS, tokens=0)
    with pytest.raises(InputError, match=r"text 2 is one token"):
        try_mappers(donor, recipient, arms, Trial(texts=PromptSet((*TEXTS[:1], Prompt("a")))))
    with pytest.raises(InputError, match="is empty"):
        PromptSet((Prompt(" "),))
    with pytest.raises(MismatchError, match="make different tokens"):
        try_mappers(donor, recipient, arms, dataclasses.replace(trial, read_along=True))


# -- the packaged models ----------------------------------------------------------------------------------------------


@pytest.mark.real
def test_between_real_models_mapped_states_do_better_than_every_control():
    real.require(real.GEMMA, real.SMOL)
    models = [cv.load_model(name) for name in (real.GEMMA, real.SMOL)]
    prompts, text = cv.load_prompts("builtin:general", limit=12), cv.load_prompts("builtin:text", limit=32)
    profiles = [cv.profile(lm, prompts, text=text, places="words", cache=False) for lm in models]
    _, passages = unseen(prompts, text)
    found = validate_mapper(*models, cv.link(*profiles, write_rows="both"), (9, 15), Trial(texts=passages, tokens=24))
    paired, scores = found.pairing["texts"], found.scores["texts"]
    assert paired.exact > 0.9
    for control in (SHUFFLED, MEAN_ABLATION, ROTATED):
        kl = [np.array(found.values["texts"][arm]["kl"]) for arm in (MAPPED, control)]
        assert (kl[0] < kl[1]).all(), control
        assert scores[MAPPED]["cosine"].low > scores[control]["cosine"].high
    assert scores[MAPPED]["fvu_mean"].high < 1
