"""Mappers: pairing tokens, mapping states, and putting them into a running model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import commandv as cv
import mapped
import tiny
from commandv.errors import InputError
from commandv.evaluation import multiple_choice
from commandv.mapping import (
    MAPPED,
    MEAN_ABLATION,
    ROTATED,
    SHUFFLED,
    Along,
    fit_mapper,
    layer_pair,
    mapper_arms,
    pair_tokens,
    pairing,
    read_counterparts,
    replaced,
    unseen,
)
from commandv.models.encoding import encode, pad
from commandv.profiles.profile import END
from commandv.prompts.sets import Prompt, PromptSet
from commandv.transfer.convert.table import FITTERS
from commandv.transfer.link import HOLDOUT, held_out_prompts
from commandv.transfer.match import LayerPair
from mapped import PASSAGES, PROMPTS, QUESTIONS, TEXTS, constant, identity, profiled

donor, recipient, profiles, versions = mapped.donor, mapped.recipient, mapped.profiles, mapped.versions
BF16 = torch.bfloat16


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
    link = cv.link(*profiles, fit=fit, write_rows="both")
    mapper = fit_mapper(link, (1, 2))
    x = link.rows("write", LayerPair(1, 2))[0]
    expected = link.back(LayerPair(1, 2))(x.double()).float()
    torch.testing.assert_close(mapper(x, torch.zeros(len(x), dtype=torch.bool)), expected, rtol=1e-3, atol=1e-3)
    assert mapper.facts["fit"]["name"] == name


def test_a_relation_that_is_affine_is_found_with_its_bias(recipient):
    one = profiled(recipient)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    shift = 3 * torch.ones(32)
    moved = {layer: (rows.float() @ turn + shift).to(BF16) for layer, rows in one.activations.items()}
    other = dataclasses.replace(one, activations=moved)
    x = one.layer(1)[:50].float()
    mapped = fit_mapper(cv.link(one, other, fit=cv.Affine(), write_rows="both"), (1, 1))(
        x, torch.zeros(50, dtype=torch.bool)
    )
    assert float((mapped - x @ turn - shift).square().mean() / (x @ turn).var()) < 1e-3


def test_the_controls_are_what_they_say(profiles):
    link = cv.link(*profiles, write_rows="both")
    arms = mapper_arms(link, (1, 2), seed=4)
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
    again = mapper_arms(link, (1, 2), seed=4)
    assert all(torch.equal(again[name](x, end), given[name]) for name in arms)


def test_unseen_are_the_prompts_that_no_fit_sees(profiles):
    prompts, passages = unseen(PROMPTS, PASSAGES, holdout=0.3)
    link = cv.link(*profiles, write_rows="both", holdout=0.3)
    numbers = np.unique(link.rows("write", LayerPair(0, 0), held_out=True)[2])
    everything = [*PROMPTS, *PASSAGES]
    assert [everything[i] for i in numbers] == [*prompts, *passages]
    assert unseen(PROMPTS)[1] is None
    with pytest.raises(InputError, match="no prompts"):
        unseen(PROMPTS, holdout=0)


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
    for one, other in zip(
        multiple_choice_of(recipient, mapper), multiple_choice(recipient, QUESTIONS).log_probs, strict=True
    ):
        assert one == pytest.approx(other, rel=1e-6)


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
