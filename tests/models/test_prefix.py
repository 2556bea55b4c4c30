"""The beginning that prompts share is run once, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

import commandv as cv
import tiny
from commandv.adapters.attach import attach
from commandv.evaluation.price import reply_log_probs
from commandv.models.encoding import encode, last_logits, pad
from commandv.models.prefix import WORTHWHILE, shared_prefix
from commandv.profiles.profiling import profile
from commandv.prompts.sets import Prompt, PromptSet

ARCHS = ("llama", "gpt2", "gemma2", "gemma3_text", "opt", "mixtral", "qwen2", "phi3")
OPENING = "the quick brown fox sat on the old mat by the door and "
PROMPTS = [
    OPENING + rest for rest in ("slept", "ate a fish that was far too big for it", "ran", "the dog barked at it")
]
PASSAGES = PromptSet(tuple(Prompt(text, "then it went home") for text in PROMPTS))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=ARCHS)
def lm(request):
    return tiny.tiny_lm(request.param, **({"sliding_window": 256} if request.param.startswith("gemma") else {}))


@pytest.fixture
def apart(monkeypatch):
    """Make every call run whole prompts."""

    def whole():
        monkeypatch.setattr("commandv.models.prefix.WORTHWHILE", 10_000)

    return whole


def shared(lm, **options):
    rows = [encode(lm, text).ids for text in PROMPTS]
    return shared_prefix(lm, rows, [len(row) for row in rows], **{"new_tokens": 8, **options})


def test_answers_are_those_of_whole_prompts(lm, apart):
    assert shared(lm).length >= WORTHWHILE
    adapters = [None, *(tiny.random_adapter(lm, positions=at) for at in ("l1", "l3", "g2", "all", "f2"))]
    answers = []
    for _ in range(2):
        for adapter in adapters:
            if adapter is None:
                answers.append(cv.generate(lm, PROMPTS, max_new_tokens=8, batch_size=3))
            else:
                with attach(lm, adapter):
                    answers.append(cv.generate(lm, PROMPTS, max_new_tokens=8, batch_size=3))
        apart()
    assert answers[: len(adapters)] == answers[len(adapters) :]
    assert len({tuple(one) for one in answers}) > 2  # the adapters do something


def test_predictions_are_those_of_whole_prompts(lm, apart):
    adapters = [None, *(tiny.random_adapter(lm, positions=at) for at in ("l1", "l3+g2", "all"))]
    together = [reply_log_probs(lm, PASSAGES, adapter, batch_size=3) for adapter in adapters]
    apart()
    for adapter, found in zip(adapters, together, strict=True):
        for one, other in zip(found, reply_log_probs(lm, PASSAGES, adapter, batch_size=3), strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=5e-3, atol=5e-3)  # kept as float16


@pytest.mark.parametrize("at", ["l3", "l5+g2"])
def test_an_adapter_attached_from_outside_acts_as_on_whole_texts(at, apart):
    """No `generate` tells it where the prompts end, and it takes a pass without a cache for a prompt."""
    lm = tiny.tiny_lm("llama")
    plain = reply_log_probs(lm, PASSAGES)
    with attach(lm, tiny.random_adapter(lm, positions=at)):
        together = reply_log_probs(lm, PASSAGES)
        apart()
        whole = reply_log_probs(lm, PASSAGES)
    for one, other, without in zip(together, whole, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert not torch.equal(one, without)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_profiles_are_those_of_whole_prompts(lm, padding, apart):
    def made():
        return profile(lm, PROMPTS, text=PASSAGES, places="words", batch_size=3, padding=padding, cache=False)

    together = made()
    apart()
    whole = made()
    assert (together.keys == whole.keys).all()
    for layer in range(lm.n_layers):
        one, other = (made.layer(layer).float() for made in (together, whole))
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)  # kept as bfloat16


def test_nothing_is_shared_where_it_would_matter():
    lm = tiny.tiny_lm("llama")
    length = shared(lm).length
    assert length >= WORTHWHILE
    for at, expected in (("l1", length), ("g1", length), ("f1", 0), ("all", 0)):
        with attach(lm, tiny.random_adapter(lm, positions=at)):
            assert shared(lm).length == expected, at
    with attach(lm, tiny.random_adapter(lm, positions="l1")):
        assert shared(lm, new_tokens=None).length == 0
    shortest = min(len(encode(lm, text).ids) for text in PROMPTS)
    with attach(lm, tiny.random_adapter(lm, positions="l4")):
        assert shared(lm).length == min(length, shortest - 4)
    handle = lm.blocks[0].register_forward_hook(lambda *_: None)
    assert shared(lm).length == 0
    handle.remove()
    assert shared(lm).length == length
    window = tiny.tiny_lm("gemma3_text", sliding_window=12)
    assert shared(window).length == 0


@pytest.mark.parametrize("arch", ["gemma2", "gemma3_text"])
def test_a_beginning_longer_than_the_window_is_shared_among_prompts_of_one_length(arch):
    lm = tiny.tiny_lm(arch, sliding_window=12)
    opened = encode(lm, OPENING).ids
    ids = [[*opened, *end] for end in ([3, 4, 5], [6, 7, 8])]
    prefix = shared_prefix(lm, ids, [len(row) for row in ids], alike=True)
    assert prefix.length > 12
    batch = pad(lm, ids)
    with torch.no_grad():
        whole, rest = last_logits(lm, batch, 1), last_logits(lm, prefix.rest(batch), 1, prefix.past(2))
    torch.testing.assert_close(rest, whole, **CLOSE)


def test_a_prefix_is_none_of_a_single_row_and_leaves_one_token_of_the_shortest():
    lm = tiny.tiny_lm("llama")
    row = encode(lm, PROMPTS[1]).ids
    assert shared_prefix(lm, [row], [len(row)]).length == 0
    both = [row, row[: WORTHWHILE + 1]]
    assert shared_prefix(lm, both, [len(one) for one in both]).length == WORTHWHILE
    assert shared_prefix(lm, [row, row[:WORTHWHILE]], [len(row), WORTHWHILE]).length == 0


def test_a_cache_is_copied_for_every_batch():
    lm = tiny.tiny_lm("llama")
    prefix = shared(lm)
    first, second = prefix.past(3), prefix.past(2)
    assert [first.layers[0].keys.shape[0], second.layers[0].keys.shape[0]] == [3, 2]
    assert prefix.cache.get_seq_length() == prefix.length
    first.layers[0].keys.zero_()
    assert prefix.cache.layers[0].keys.abs().max() > 0
