"""The plug-in of vLLM, on a stand-in for its model runner: which rows of a step get which adapter's deltas.

Answers in vLLM itself: benchmarks/in_vllm.py, since vLLM holds transformers at another version than these tests'.
"""

from __future__ import annotations

from types import SimpleNamespace as Made

import numpy as np
import pytest
import torch
from torch import nn

import commandv as cv
import tiny
from commandv.errors import InputError, MismatchError, ModelError
from commandv.interop.vllm import Attached, blocks_of, register, sources

WIDTH, LAYERS = tiny.D, 4


class Block(nn.Module):
    """As vLLM's: the stream goes on as two parts."""

    def forward(self, hidden, residual):
        return hidden, residual


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))


def runner(requests: dict[str, tuple[str | None, int, int]], **wrong) -> Made:
    """Requests by id: adapter, tokens of the prompt, tokens that ran before."""
    model = Model()
    return Made(
        get_model=lambda: model,
        model=model,
        model_config=Made(hf_text_config=Made(num_hidden_layers=LAYERS, hidden_size=WIDTH)),
        vllm_config=Made(
            cache_config=Made(enable_prefix_caching=wrong.get("prefix", False)),
            model_config=Made(enforce_eager=wrong.get("eager", True)),
            parallel_config=Made(tensor_parallel_size=wrong.get("split", 1), pipeline_parallel_size=1),
            speculative_config=wrong.get("speculative"),
        ),
        requests={
            name: Made(sampling_params=Made(extra_args={"commandv": one[0]} if one[0] else None))
            for name, one in requests.items()
        },
        input_batch=Made(
            req_ids=list(requests),
            num_prompt_tokens=np.array([one[1] for one in requests.values()]),
            num_computed_tokens_cpu=np.array([one[2] for one in requests.values()]),
        ),
    )


def step(one: Made, adapters: dict[str, cv.Adapter], scheduled: dict[str, int], layer: int):
    """Return the stream before and after a block, [tokens, width]."""
    state = Attached(one, adapters)
    state.scheduled = scheduled
    hidden, residual = torch.randn(2, sum(scheduled.values()), WIDTH)
    before = hidden + residual
    changed, kept = one.model.layers[layer](hidden, residual)
    assert torch.equal(kept, residual)
    return before, changed + kept


def test_each_request_gets_its_adapter_at_its_prompts_last_token(lm):
    adapters = {name: tiny.random_adapter(lm, seed=seed) for seed, name in enumerate(("one", "other"))}
    requests = {"a": ("one", 3, 0), "b": (None, 2, 0), "c": ("other", 4, 0)}
    before, after = step(runner(requests), adapters, {"a": 3, "b": 2, "c": 4}, 1)
    expected = before.clone()
    for name, row in (("one", 2), ("other", 8)):
        expected[row] += adapters[name].interventions[1][0].delta(before[row])
    torch.testing.assert_close(after, expected)
    before, after = step(runner(requests), adapters, {"a": 3, "b": 2, "c": 4}, 2)
    assert torch.equal(after, before), "they act on layer 1"


def test_prompts_in_chunks_and_generated_tokens(lm):
    adapter = tiny.random_adapter(lm, positions="f1+l2+g1")
    for computed, count, rows in [
        (0, 4, [0]),  # the first chunk of a prompt of 10
        (4, 3, []),
        (7, 3, [1, 2]),
        (10, 1, [0]),  # the first generated token is fed
        (11, 1, []),
    ]:
        before, after = step(runner({"a": ("it", 10, computed)}), {"it": adapter}, {"a": count}, 1)
        assert [row for row in range(count) if not torch.equal(before[row], after[row])] == rows


def test_a_request_that_is_not_scheduled_has_no_rows(lm):
    adapter = tiny.random_adapter(lm, positions="all")
    requests = {"waiting": ("it", 3, 0), "b": ("it", 2, 0), "c": (None, 2, 0)}
    before, after = step(runner(requests), {"it": adapter}, {"b": 2, "c": 2}, 1)
    assert [row for row in range(4) if not torch.equal(before[row], after[row])] == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prefix": True}, "--no-enable-prefix-caching"),
        ({"eager": False}, "--enforce-eager"),
        ({"split": 2}, "one device"),
        ({"speculative": object()}, "speculative"),
    ],
)
def test_what_would_answer_wrongly_is_refused(wrong, message, lm):
    with pytest.raises(InputError, match=message):
        Attached(runner({}, **wrong), {"it": tiny.random_adapter(lm)})


def test_adapters_of_other_models_are_refused():
    for other in (tiny.tiny_lm(hidden_size=48), tiny.tiny_lm(num_hidden_layers=6)):
        with pytest.raises(MismatchError, match="adapter it: width"):
            Attached(runner({}), {"it": tiny.random_adapter(other, layers=(other.n_layers - 1,))})
    with pytest.raises(ModelError, match="no list of 4 decoder blocks"):
        blocks_of(nn.Linear(2, 2), 4)


def test_the_environment_names_adapters(monkeypatch):
    assert sources("a=dir, b=builtin:list@model") == {"a": "dir", "b": "builtin:list@model"}
    for text in ("a", "=x", "a=", "a=x,a=y"):
        with pytest.raises(InputError, match="NAME=ADAPTER"):
            sources(text)
    monkeypatch.delenv("COMMANDV_VLLM", raising=False)
    register()  # changes nothing, and needs no vLLM
