"""What attaching refuses: another model, a scale or a batch that cannot be right."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import commandv as cv
import tiny
from commandv.errors import InputError, MismatchError
from commandv.models.identity import ModelRef


def test_another_model_is_refused(lm):
    adapter = tiny.random_adapter(lm)
    for other, message in (
        (tiny.tiny_lm(hidden_size=64), "another width"),
        (tiny.tiny_lm(num_hidden_layers=3), "another depth"),
        (tiny.tiny_lm(seed=1), "weights"),
        (tiny.tiny_lm(template="plain", chat=True), None),
        (tiny.tiny_lm(chat=True), "template"),
    ):
        if message is None:
            cv.attach(other, adapter).detach()
            continue
        with pytest.raises(MismatchError, match=message):
            cv.attach(other, adapter)
        assert "generate" not in vars(other.model)


@pytest.mark.parametrize(("layer", "width"), [(4, tiny.D), (0, tiny.D + 1)])
def test_an_adapter_of_unknown_origin_must_fit(lm, layer, width):
    adapter = cv.Adapter({layer: cv.steering_vector(torch.ones(width))}, ModelRef())
    with pytest.raises(MismatchError, match=f"{lm.id} has width {tiny.D} and layers 0 .. 3"):
        cv.attach(lm, adapter)


def test_the_name_decides_where_no_revision_is_known(lm):
    adapter = cv.Adapter({0: cv.steering_vector(torch.ones(tiny.D))}, ModelRef(id="another"))
    with pytest.raises(MismatchError, match="made for another, got tiny-llama"):
        cv.attach(lm, adapter)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, torch.ones(2)])
def test_scale_must_be_finite(lm, scale):
    with pytest.raises(InputError, match=r"finite|expected float"):
        cv.attach(lm, tiny.random_adapter(lm), scale=scale)


@pytest.mark.parametrize("rows", [[[1, 20, 21], [1, 22, 0]], [[0, 1, 20], [1, 22, 23]]], ids=["right", "left"])
def test_a_padded_batch_without_a_mask_is_refused(lm, rows):
    assert lm.tokenizer.pad_token_id == 0
    with cv.attach(lm, tiny.random_adapter(lm)), pytest.raises(InputError, match="attention_mask"):
        lm.model(input_ids=torch.tensor(rows))


def test_a_scale_that_makes_the_deltas_overflow_is_refused_before_anything_is_attached(lm):
    loud = tiny.random_adapter(lm, layers=(1,)).map(lambda one: dataclasses.replace(one, write=one.write + 1e15))
    with pytest.raises(InputError, match="its scale is broken"):
        cv.attach(lm, loud, scale=1e3)
    assert "attached" not in repr(lm)
    with cv.attach(lm, loud, scale=0.0):
        pass


@pytest.mark.parametrize("n_prompt", [-1, 1.5, "3", 10**9])
def test_columns_of_the_prompt_that_are_none(lm, n_prompt):
    with pytest.raises(InputError, match=r"expected columns of the prompt|expected int or None"):
        cv.attach(lm, tiny.random_adapter(lm), n_prompt=n_prompt)
