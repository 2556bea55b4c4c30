"""Threads that run one model: none gets another's adapter, and none leaves anything behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading

import pytest
import torch
import transformers

import commandv as cv
import tiny
from commandv.errors import InputError

PROMPTS = ["How do I make tea?", "Why does Venus spin backwards, and what about the river?", "x"]


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def in_threads(n, work):
    """Run work(0) .. work(n - 1) at the same time and return what they return, or the error that one of them raised."""
    ready = threading.Barrier(n)

    def run(number):
        ready.wait()
        return work(number)

    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


@pytest.mark.parametrize("positions", [None, "l1", "all", "f1+g3"])
def test_threads_that_start_later_answer_alike(lm, positions):
    own = lm.model.generation_config
    changed = [cv.attach(lm, tiny.random_adapter(lm, (1, 2), positions))] if positions else []
    expected = {n: cv.generate(lm, PROMPTS, max_new_tokens=4 + n) for n in range(3)}

    def work(number):
        return [cv.generate(lm, PROMPTS, max_new_tokens=4 + number) == expected[number] for _ in range(3)]

    assert all(all(right) for right in in_threads(3, work))
    for one in changed:
        one.detach()
    assert lm.model.generation_config is own
    assert n_hooks(lm.model) == 0


def test_no_thread_gets_the_adapter_of_another(lm):
    adapters = [None, tiny.random_adapter(lm, (1,), "all"), tiny.random_adapter(lm, (2,), "l1", seed=5)]
    expected = []
    for adapter in adapters:
        if adapter is None:
            expected.append(cv.generate(lm, PROMPTS, max_new_tokens=4))
        else:
            with cv.attach(lm, adapter):
                expected.append(cv.generate(lm, PROMPTS, max_new_tokens=4))

    def work(number):
        wrong = []
        for _ in range(4):
            with contextlib.suppress(InputError):  # told that another thread has something attached
                if adapters[number] is None:
                    wrong.append(cv.generate(lm, PROMPTS, max_new_tokens=4) != expected[number])
                else:
                    with cv.attach(lm, adapters[number]):
                        wrong.append(cv.generate(lm, PROMPTS, max_new_tokens=4) != expected[number])
        return wrong

    assert not any(any(wrong) for wrong in in_threads(3, work))
    assert cv.attached(lm) == ()
    assert n_hooks(lm.model) == 0
    assert cv.generate(lm, PROMPTS, max_new_tokens=4) == expected[0]


def test_attaching_in_the_middle_of_another_threads_answer_is_refused(lm):
    inside, go_on = threading.Event(), threading.Event()

    class Waiting(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **_):
            inside.set()
            go_on.wait(20)
            return torch.ones(len(ids), dtype=torch.bool)

    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "stopping_criteria": [Waiting()]}
    thread = threading.Thread(
        target=lambda: lm.model.generate(input_ids=torch.tensor([[1, 20, 21, 22, 23]]), **settings)
    )
    thread.start()
    inside.wait(20)
    with pytest.raises(InputError, match="another thread"):
        cv.attach(lm, tiny.random_adapter(lm))
    go_on.set()
    thread.join()
    assert n_hooks(lm.model) == 0
    cv.attach(lm, tiny.random_adapter(lm)).detach()
