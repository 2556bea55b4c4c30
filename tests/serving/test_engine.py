from __future__ import annotations

import contextlib
import random
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import commandv as cv
import tiny
from commandv.errors import InputError, MismatchError, ModelError
from commandv.models.encoding import encode
from commandv.models.sampling import Sampling
from commandv.serving.behaviours import behaviour_name, parse_behaviour
from commandv.serving.engine import Engine
from commandv.serving.requests import QueueFull, Request
from served import until

PROMPTS = (
    "Why does Venus spin?",
    "How do I make a good cup of tea, and how long do the leaves steep before the water gets cold?",
    "Hi",
    "Tell me about the river that runs through the city.",
    "Read the book.",
)
NAMES = ("base", "base+last", "base+all@0.5", "base+ends@-0.5", "base+last@0.7+all", "base+all+last", "base+start+ends")


def adapters(lm):
    """One of each way to act: the last prompt token, every token, both ends of the prompt, the answer's beginning."""
    where = {"last": "l1", "all": "all", "ends": "f2+l1", "start": "g3"}
    return {
        name: tiny.random_adapter(lm, (i % 2, 2), at, seed=i, rank=1 + i, size=0.5)
        for i, (name, at) in enumerate(where.items())
    }


def alone(lm, known, prompt, name, n):
    """What the model says to one prompt with the behaviour attached by hand."""
    with contextlib.ExitStack() as attached:
        for adapter, scale in parse_behaviour(name, known):
            attached.enter_context(cv.attach(lm, known[adapter], scale=scale))
        return cv.generate(lm, [prompt], max_new_tokens=n)[0]


def request(lm, known, prompt, name="base", n=8, **more):
    return Request(tuple(encode(lm, prompt).ids), parse_behaviour(name, known), n, **more)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt2", "bloom", "mpt", "gemma3n"])
def test_each_request_gets_what_generate_gives_alone(arch):
    # Gemma's window is shorter than some of the rows.
    lm = tiny.tiny_lm(arch, chat=True, **({"sliding_window": 24} if arch == "gemma3_text" else {}))
    known, rng = adapters(lm), random.Random(1)
    asked = [(rng.choice(PROMPTS), name, rng.randint(1, 12)) for name in NAMES * 2]
    expected = [alone(lm, known, *one) for one in asked]
    with Engine(lm, known, max_rows=5) as engine:
        answers = []
        for one in asked:
            answers += engine.submit(request(lm, known, *one))
            if rng.random() < 0.5:
                until(lambda: engine.n_waiting == 0)
        assert [one.text() for one in answers] == expected
    assert len(set(expected)) > len(NAMES)


@given(
    asked=st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.sampled_from(NAMES), st.integers(1, 9)), min_size=1, max_size=9
    ),
    rows=st.integers(1, 6),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mixture_in_any_batch_is_what_each_is_alone(lm, asked, rows):
    known = adapters(lm)
    expected = [alone(lm, known, *one) for one in asked]
    with Engine(lm, known, max_rows=rows) as engine:
        answers = engine.submit(*(request(lm, known, *one, strip=True) for one in asked))
        assert [one.text() for one in answers] == expected


def test_kinds_that_do_not_stack_and_other_activations_share_a_batch():
    lm = tiny.tiny_lm(chat=True)
    generator = torch.Generator().manual_seed(0)

    def net():
        width = lm.d_model
        parts = [torch.randn(*shape, generator=generator) for shape in ((width,), (width, 6), (6,), (6, width))]
        return cv.Network(*parts, torch.zeros(width))

    plain = tiny.random_adapter(lm, (1,), "all")
    (inner,) = plain.interventions[1]
    known = {
        "carried": replace(plain, interventions={1: (cv.Carried(inner, net(), net(), scale=0.3),)}),
        "silu": plain.map(lambda one: replace(one, activation="silu")),
        "linear": plain,
    }
    asked = [(PROMPTS[i % 5], f"base+{name}@0.4", 6) for i, name in enumerate([*known, *known])]
    expected = [alone(lm, known, *one) for one in asked]
    with Engine(lm, known) as engine:
        assert [one.text() for one in engine.submit(*(request(lm, known, *one) for one in asked))] == expected
    assert len(set(expected)) > 3


def test_the_model_is_as_it_was_afterwards(lm):
    before = cv.generate(lm, PROMPTS[:2], max_new_tokens=4)
    with Engine(lm, adapters(lm)) as engine:
        engine.submit(request(lm, engine.adapters, PROMPTS[0], "base+all"))[0].text()
    assert not cv.attached(lm)
    assert cv.generate(lm, PROMPTS[:2], max_new_tokens=4) == before


def test_pieces_add_up_and_count_tokens(lm):
    with Engine(lm, {}) as engine:
        (whole,) = engine.submit(request(lm, {}, PROMPTS[1], n=10, stream=False))
        (pieces,) = engine.submit(request(lm, {}, PROMPTS[1], n=10))
        (one,), many = list(whole), list(pieces)
    assert "".join(piece.text for piece in many) == one.text
    assert len(many) > 3
    assert [piece.n_tokens for piece in many] == sorted(piece.n_tokens for piece in many)
    assert (one.finish, one.n_tokens) == (many[-1].finish, many[-1].n_tokens) == ("length", 10)


def test_a_stop_string_ends_the_answer_before_it(lm):
    text = alone(lm, {}, PROMPTS[1], "base", 12)
    stop = text[len(text) // 2 :][:3]
    with Engine(lm, {}) as engine:
        pieces = list(engine.submit(request(lm, {}, PROMPTS[1], n=12, stop=("never said", stop)))[0])
    assert "".join(piece.text for piece in pieces).strip() == text.split(stop)[0].strip()
    assert pieces[-1].finish == "stop"
    assert pieces[-1].n_tokens < 12


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_answer_whoever_shares_the_batch(lm):
    asked = [request(lm, {}, PROMPTS[1], n=10, sampling=Sampling(1.5, 0.9, seed)) for seed in (1, 1, 2, 3)]
    with Engine(lm, {}) as engine:
        together = [one.text() for one in engine.submit(*asked)]
        by_one = [engine.submit(one)[0].text() for one in asked]
    assert together == by_one
    assert together[0] == together[1]
    assert len(set(together)) == 3


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": 2.1}, {"top_p": 0}, {"top_p": 1.1}])
def test_sampling_has_limits(wrong):
    with pytest.raises(InputError, match="expected"):
        Sampling(**wrong)


# -- what is refused, what goes wrong ----------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_row(lm):
    with Engine(lm, {}, max_rows=1) as engine:
        first, second = engine.submit(request(lm, {}, PROMPTS[0], n=400), request(lm, {}, PROMPTS[2], n=2))
        next(iter(first))
        first.cancel()
        assert second.text() is not None
        assert until(lambda: engine.n_running == 0)


def test_more_than_may_wait_are_refused_all_or_none(lm):
    with Engine(lm, {}, max_rows=1, max_waiting=2) as engine:
        long = [request(lm, {}, PROMPTS[0], n=300)] * 2
        running = engine.submit(*long)
        with pytest.raises(QueueFull, match="at most 2 may"):
            engine.submit(*long)
        for one in running:
            one.cancel()
        assert until(lambda: not engine.n_waiting and not engine.n_running)
        assert engine.submit(request(lm, {}, PROMPTS[0], n=1))[0].text() is not None


def test_numbers_that_overflow_end_that_request_only(lm):
    one = tiny.random_adapter(lm, (1, 2), "all", size=1e15)
    known = {"all": adapters(lm)["all"], "huge": one.map(lambda edit: replace(edit, read=edit.read * 1e15))}
    expected = alone(lm, known, PROMPTS[0], "base+all", 6)
    with Engine(lm, known) as engine:
        asked = (request(lm, known, PROMPTS[0], name, 6, strip=True) for name in ("base+huge", "base+all"))
        bad, good = engine.submit(*asked)
        with pytest.raises(ModelError, match=r"NaN or infinity in the answer of base\+huge"):
            bad.text()
        assert good.text() == expected


def test_a_pass_that_fails_ends_its_requests_and_no_others(lm, monkeypatch):
    forward, failing = lm.model.forward, threading.Event()

    def fail(*args, **given):
        if failing.is_set():
            failing.clear()
            raise torch.OutOfMemoryError("no memory left")
        return forward(*args, **given)

    monkeypatch.setattr(lm.model, "forward", fail)
    with Engine(lm, {}) as engine:
        failing.set()
        with pytest.raises(torch.OutOfMemoryError):
            engine.submit(request(lm, {}, PROMPTS[0]))[0].text()
        assert engine.submit(request(lm, {}, PROMPTS[0]))[0].text()


def test_closing_ends_what_runs_and_what_waits(lm):
    with Engine(lm, {}, max_rows=1) as engine:
        answers = engine.submit(*[request(lm, {}, PROMPTS[0], n=400)] * 2)
    for one in answers:
        with pytest.raises(ModelError, match="closed before the answer was complete"):
            one.text()
    with pytest.raises(ModelError, match="not running"):
        engine.submit(request(lm, {}, PROMPTS[0]))


def test_prompts_have_room_for_their_answers(lm):
    with Engine(lm, {}) as engine:
        with pytest.raises(InputError, match="the context of tiny-llama is 512"):
            engine.submit(Request((5,) * 500, (), 13))
        with pytest.raises(InputError, match="empty prompt"):
            engine.submit(Request((), (), 13))
        with pytest.raises(InputError, match="max_tokens=0"):
            engine.submit(Request((5,), (), 0))


def test_an_engine_says_what_does_not_fit(lm):
    with pytest.raises(MismatchError):
        Engine(lm, {"other": tiny.random_adapter(tiny.tiny_lm(seed=1, id="another"))})
    with pytest.raises(InputError, match="max_rows=0"):
        Engine(lm, {}, max_rows=0)
    with cv.attach(lm, tiny.random_adapter(lm)), pytest.raises(InputError, match="attached already"):
        Engine(lm, {})


@pytest.mark.parametrize("arch", ["mamba", "jamba", "llama4_text"])
def test_models_whose_rows_cannot_come_and_go_are_refused(arch):
    with pytest.raises(ModelError, match="share a batch"):
        Engine(tiny.tiny_lm(arch), {})


def test_names_of_behaviours_are_read_back():
    assert behaviour_name(parse_behaviour(NAMES[4], ("last", "all"))) == NAMES[4]
