"""Drift, perplexity and multiple choice on tiny models, against one-by-one references without padding."""

from __future__ import annotations

import json
import math

import pytest
import torch

import commandv as cv
from commandv.errors import InputError, ModelError
from commandv.evaluation import (
    Question,
    as_letters,
    choices,
    drift,
    drift_values,
    load_questions,
    mean,
    multiple_choice,
    perplexity,
    perplexity_values,
)
from commandv.evaluation.meter import price_scores
from commandv.evaluation.price import MEASURES, prices, reply_log_probs, token_log_probs
from commandv.models.encoding import encode
from commandv.prompts.sets import Prompt, PromptSet
from tiny import SENTENCES, random_adapter, tiny_lm

QUESTIONS = [
    Question("Which city has a river?", ("the first one", "a", "Monday and the lazy dog"), 0),
    Question("How do I make tea?", ("Boil fresh water", "sleep"), 1),
    Question("What is the name of the cat?", ("yes", "the fox", "Venus", "a letter under the tree in the garden"), 3),
]
PASSAGES = PromptSet(tuple(Prompt(text[:30], text[30:]) for text in SENTENCES[:4]))


@pytest.fixture(scope="module", params=[("llama", True, True), ("gpt2", False, False), ("gemma3_text", True, False)])
def lm(request):
    arch, bos, chat = request.param
    return tiny_lm(arch, bos=bos, chat=chat)


@pytest.fixture(scope="module")
def adapter(lm):
    return random_adapter(lm, (1, 2), "l1+g2")


def alone(lm, ids, n_prompt, adapter=None):
    """Log-probabilities of the tokens after the prompt, the sequence run alone through an unpadded pass."""
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        if adapter is None:
            logits = lm.model(input_ids=tokens).logits[0]
        else:
            with cv.attach(lm, adapter, n_prompt=n_prompt):
                logits = lm.model(input_ids=tokens).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[n_prompt - 1 : -1], tokens[0, n_prompt:], reduction="none")
    return -losses.double()


def test_the_first_token_and_what_follows_are_priced_apart(lm, adapter):
    """Against each passage alone: KL(unmodified || adapted) and the nats of the reply's own tokens, by position."""
    plain = reply_log_probs(lm, PASSAGES, tokens=4)
    found = prices(lm, PASSAGES, plain, reply_log_probs(lm, PASSAGES, adapter, tokens=4))
    for number, one in enumerate(PASSAGES):
        encoded = encode(lm, one.text, one.response)
        ids, n = torch.tensor([encoded.ids[: encoded.n_prompt + 4]]), encoded.n_prompt
        with torch.inference_mode():
            p = lm.model(input_ids=ids).logits[0, n - 1 : -1].log_softmax(-1).double()
            with cv.attach(lm, adapter, n_prompt=n):
                q = lm.model(input_ids=ids).logits[0, n - 1 : -1].log_softmax(-1).double()
        kl = (p.exp() * (p - q)).sum(-1)
        nats = -q.gather(1, ids[0, n:, None])[:, 0]
        expected = {
            "kl": kl.mean(), "kl_first": kl[0], "kl_after": kl[1:].mean(), "perplexity_first": nats[0],
            "perplexity_after": nats[1:].mean(),
        }  # fmt: skip
        assert set(expected) == set(MEASURES)
        for name, value in expected.items():
            # kept in half precision
            assert found[name][number] == pytest.approx(float(value), rel=5e-3, abs=2e-3), name


def test_a_reply_of_one_token_has_no_price_after_it_and_one_of_two_has(lm):
    token = lm.tokenizer.decode([40])
    replies = [f"{token}", f"{token} {token}"]
    short = [
        tuple(reply_log_probs(lm, PromptSet((Prompt("Why?", reply),)), tokens=n))
        for reply, n in zip(replies, (1, 2), strict=True)
    ]
    assert [len(one[0]) for one in short] == [1, 2]
    for (plain,), reply, known in zip(short, replies, (False, True), strict=True):
        found = prices(lm, PromptSet((Prompt("Why?", reply),)), [plain], [plain])
        assert found["kl_first"] == [0.0]
        assert math.isfinite(found["kl_after"][0]) is known


def test_the_unmodified_model_has_nothing_to_differ_from(lm):
    found = prices(lm, PASSAGES, reply_log_probs(lm, PASSAGES, tokens=4))
    assert set(found) == {"perplexity_first", "perplexity_after"}
    one_token = prices(lm, PASSAGES, reply_log_probs(lm, PASSAGES, tokens=1))
    assert all(math.isnan(value) for value in one_token["perplexity_after"])
    scores = price_scores(one_token)
    assert set(scores) == {"perplexity_first"}


def test_an_adapter_at_the_last_prompt_token_moves_the_first_token_most(lm):
    strong = random_adapter(lm, (1, 2), "l1", size=2.0)
    plain = reply_log_probs(lm, PASSAGES)
    found = prices(lm, PASSAGES, plain, reply_log_probs(lm, PASSAGES, strong))
    assert sum(found["kl_first"]) > sum(found["kl"]) > sum(found["kl_after"])


def nothing(adapter):
    """The adapter with its writes set to zero."""
    zeroed = {
        layer: tuple(
            cv.Intervention(one.read, one.bias, 0 * one.write, positions=one.positions, activation=one.activation)
            for one in many
        )
        for layer, many in adapter.interventions.items()
    }
    return cv.Adapter(zeroed, adapter.model, "nothing")


# -- perplexity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 4])
def test_perplexity_is_the_cross_entropy_of_each_passage_alone(lm, adapter, context):
    bos = [lm.tokenizer.bos_token_id] if lm.tokenizer("a").input_ids[0] == lm.tokenizer.bos_token_id else []
    for edit in (None, adapter):
        expected = []
        for text in SENTENCES:
            ids = bos + lm.tokenizer(text, add_special_tokens=False).input_ids
            n_prompt = max(1, len(bos) + context)
            expected.append(-float(alone(lm, ids[: n_prompt + 9], n_prompt, edit).mean()))
        found = perplexity_values(lm, SENTENCES, edit, context=context, tokens=9)
        assert found == pytest.approx(expected, abs=1e-4)


def test_perplexity_is_exp_of_the_mean_and_of_its_interval(lm):
    values = perplexity_values(lm, SENTENCES)
    score, log = perplexity(lm, SENTENCES, name="plain"), mean("", values, "")
    expected = ("plain", math.exp(log.value), math.exp(log.low), math.exp(log.high), len(SENTENCES), "perplexity")
    assert score[1:5] == pytest.approx(expected[1:5])
    assert (score.name, score.unit) == (expected[0], expected[5])


def test_the_reply_of_a_passage_is_its_text(lm):
    replies = [one.response for one in PASSAGES]
    assert perplexity_values(lm, PASSAGES, context=2) == pytest.approx(perplexity_values(lm, replies, context=2))


def test_perplexity_refuses_what_it_cannot_measure(lm):
    with pytest.raises(InputError, match="nothing is left to count after"):
        perplexity(lm, [SENTENCES[0], "tea"])
    with pytest.raises(InputError, match="context=-1"):
        perplexity(lm, SENTENCES, context=-1)


def test_passages_longer_than_the_context_are_cut():
    lm = tiny_lm("gpt2", n_positions=32)
    assert math.isfinite(perplexity(lm, [" ".join(SENTENCES)] * 2, tokens=500).value)


def test_what_is_left_to_count_must_be_a_token(lm):
    tokens = len(lm.tokenizer(SENTENCES[0], add_special_tokens=False).input_ids)
    assert math.isfinite(perplexity_values(lm, SENTENCES[:1], context=tokens - 1)[0])
    assert math.isfinite(perplexity_values(lm, SENTENCES[:1], tokens=1)[0])
    with pytest.raises(InputError, match="nothing is left to count after"):
        perplexity_values(lm, SENTENCES[:1], context=tokens)
    with pytest.raises(InputError, match="tokens=0"):
        perplexity_values(lm, SENTENCES, tokens=0)


def test_what_is_not_said_is_as_documented(lm, adapter):
    """Scale 1; 16 tokens of a reply; 128 tokens of plain text after 16 of context."""
    long = [" ".join(SENTENCES)] * 2
    assert len(lm.tokenizer(long[0]).input_ids) > 160
    pairs = [
        (perplexity_values(lm, long, adapter), perplexity_values(lm, long, adapter, scale=1.0, context=16, tokens=128)),
        (perplexity(lm, long, adapter), perplexity(lm, long, adapter, scale=1.0, context=16, tokens=128)),
    ]
    replies = PromptSet(tuple(Prompt("Go on.", text) for text in long))
    pairs += [
        (drift_values(lm, replies, adapter), drift_values(lm, replies, adapter, scale=1.0, tokens=16)),
        (drift(lm, replies, adapter), drift(lm, replies, adapter, scale=1.0, tokens=16)),
    ]
    for unsaid, said in pairs:
        assert unsaid == said
    plain, said = reply_log_probs(lm, replies, adapter), reply_log_probs(lm, replies, adapter, scale=1.0, tokens=16)
    assert [one.shape[0] for one in plain] == [16, 16]
    assert all(torch.equal(a, b) for a, b in zip(plain, said, strict=True))
    row = [encode(lm, "Go on.", SENTENCES[0])]
    ((_, unsaid),), ((_, told),) = token_log_probs(lm, row, adapter), token_log_probs(lm, row, adapter, scale=1.0)
    assert torch.equal(unsaid, told)


def test_what_breaks_is_told_by_its_number():
    lm = tiny_lm()
    rows = [encode(lm, "Go on.", text) for text in SENTENCES[:3]]
    alone_in_it = set(rows[1].ids) - set(rows[0].ids) - set(rows[2].ids)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[min(alone_in_it)] = math.nan
    with pytest.raises(ModelError, match="for prompt 2"):
        list(token_log_probs(lm, rows, batch_size=1))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_recurrent_models_are_priced_without_padding_their_prompts(batch_size):
    lm = tiny_lm("lfm2")
    passages = PromptSet(tuple(Prompt(text[:n], text[30:]) for text, n in zip(SENTENCES, (12, 30, 20), strict=False)))
    rows = [encode(lm, one.text, one.response) for one in passages]
    found = dict(token_log_probs(lm, rows, batch_size=batch_size))
    for number, row in enumerate(rows):
        assert found[number].numpy() == pytest.approx(alone(lm, row.ids, row.n_prompt).numpy(), abs=1e-4)


# -- multiple choice --------------------------------------------------------------------------------------------------


def test_choices_have_the_log_probs_of_each_alone(lm, adapter):
    for edit in (None, adapter):
        found = multiple_choice(lm, QUESTIONS, edit, batch_size=4)
        for question, values in zip(QUESTIONS, found.log_probs, strict=True):
            for choice, value in zip(question.choices, values, strict=True):
                ids, n_prompt, _ = encode(lm, question.text, choice)
                assert value == pytest.approx(float(alone(lm, ids, n_prompt, edit).sum()), abs=1e-3)


def test_labels_follow_from_the_log_probs(lm):
    found = multiple_choice(lm, QUESTIONS, name="plain")
    for i, question in enumerate(QUESTIONS):
        values = found.log_probs[i]
        by_length = [value / len(choice) for value, choice in zip(values, question.choices, strict=True)]
        assert found.labels[i] == float(values.index(max(values)) == question.answer)
        assert found.labels_by_length[i] == float(by_length.index(max(by_length)) == question.answer)
    assert found.score().value == pytest.approx(sum(found.labels) / 3)
    assert found.score(by_length=True).value == pytest.approx(sum(found.labels_by_length) / 3)
    assert (found.score().name, found.score().unit, found.score().n) == ("plain", "rate", 3)


def test_a_model_that_was_told_the_answer_is_right(lm):
    """Whichever choice the model prefers: call it the right one, and it is right."""
    values = multiple_choice(lm, QUESTIONS).log_probs
    told = [Question(q.text, q.choices, v.index(max(v))) for q, v in zip(QUESTIONS, values, strict=True)]
    assert multiple_choice(lm, told).labels == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("value", [math.nan, -math.inf, -3.0])
def test_a_ruined_model_and_a_tie_are_wrong(lm, monkeypatch, value):
    def ruined(_lm, rows, *_, **__):
        return ((i, torch.full((2,), value)) for i in range(len(rows)))

    monkeypatch.setattr(choices, "token_log_probs", ruined)
    assert multiple_choice(lm, QUESTIONS).labels == (0.0, 0.0, 0.0)


def test_letters_list_the_choices():
    one = as_letters(QUESTIONS)[0]
    assert one.choices == ("(A)", "(B)", "(C)")
    assert one.answer == 0
    assert one.text.endswith("?\n\nChoices:\n(A) the first one\n(B) a\n(C) Monday and the lazy dog")


ROWS = [
    ({"question": "q", "choices": ["a", "b"], "answer_index": 1}, Question("q", ("a", "b"), 1)),
    ({"question": "q", "choices": ["a", "b"], "answer": "B", "category": "c"}, Question("q", ("a", "b"), 1, "c")),
    ({"question": "q", "choices": ["a", "b"], "answer": 0}, Question("q", ("a", "b"), 0)),
    (
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        Question("q", ("a", "b"), 1),
    ),
    ({"prompt": "q", "correct": "(B)", "incorrect": "(A)"}, Question("q", ("(B)", "(A)"), 0)),
    ({"question": "q", "best_answer": "a", "incorrect_answers": ["b", "c", "b"]}, Question("q", ("a", "b", "c"), 0)),
]


def test_question_files(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row, _ in ROWS))
    assert load_questions(path) == [question for _, question in ROWS]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "line 2: expected .* got an object with question"),
        ({"question": "q", "choices": ["a", "b"]}, "line 2: the answer is None; expected an index"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "line 2: answer 2: expected an index into 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": "?"}, "line 2: the answer is '[?]'"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "line 2: choices .* all different"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "line 2: choices .* two or more"),
        ({"question": "q", "choices": ["a", 7], "answer": 0}, "line 2: expected .* with texts"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "line 2: a question without a text"),
        ({"prompt": "q", "correct": None, "incorrect": "b"}, "line 2: expected .* with texts"),
    ],
)
def test_malformed_questions(tmp_path, row, message):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ROWS[0][0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        load_questions(path)


def test_no_questions(lm, tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no questions"):
        load_questions(tmp_path / "q.jsonl")
    with pytest.raises(InputError, match="no questions"):
        multiple_choice(lm, [])


# -- what all prices share --------------------------------------------------------------------------------------------

PRICES = {
    "drift": lambda lm, adapter, n: drift_values(lm, PASSAGES, adapter, batch_size=n),
    "perplexity": lambda lm, adapter, n: perplexity_values(lm, SENTENCES, adapter, context=3, batch_size=n),
    "choices": lambda lm, adapter, n: [
        value for values in multiple_choice(lm, QUESTIONS, adapter, batch_size=n).log_probs for value in values
    ],
}


@pytest.mark.parametrize("price", PRICES)
def test_batch_size_changes_nothing(lm, adapter, price):
    assert PRICES[price](lm, adapter, 1) == pytest.approx(PRICES[price](lm, adapter, 8), abs=2e-3, rel=1e-3)


@pytest.mark.parametrize("price", ["perplexity", "choices"])
def test_an_adapter_of_nothing_costs_nothing_and_another_does(lm, adapter, price):
    plain = PRICES[price](lm, None, 4)
    assert PRICES[price](lm, nothing(adapter), 4) == pytest.approx(plain, abs=1e-5)
    assert PRICES[price](lm, adapter, 4) != pytest.approx(plain, abs=1e-3)
    assert PRICES[price](lm, None, 4) == plain  # nothing stays attached


def test_drift_is_from_the_reference_that_is_given(lm, adapter):
    changed = reply_log_probs(lm, PASSAGES, adapter)
    assert drift_values(lm, PASSAGES, adapter, reference=changed) == [0.0] * len(PASSAGES)


def test_drift_is_the_mean_of_its_values(lm, adapter):
    values = drift_values(lm, PASSAGES, adapter)
    assert drift(lm, PASSAGES, adapter, name="it") == mean("it", values, "nats per token")
    assert min(values) > 0
    assert drift_values(lm, PASSAGES, nothing(adapter)) == pytest.approx([0.0] * len(values), abs=1e-3)


def test_an_adapter_at_the_last_prompt_token_reaches_what_follows(lm):
    last = random_adapter(lm, (1,), "l1")
    plain, changed = (perplexity_values(lm, SENTENCES, one, context=3) for one in (None, last))
    assert all(abs(a - b) > 1e-4 for a, b in zip(plain, changed, strict=True))
