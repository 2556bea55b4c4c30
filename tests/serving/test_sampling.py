from __future__ import annotations

import random

import pytest
import torch

from commandv.errors import InputError
from commandv.models.sampling import Sampling, choose
from commandv.serving.logprobs import tell

P = torch.tensor([0.5, 0.25, 0.15, 0.1])


def frequencies(sampling, n=4000):
    logits = P.log().repeat(n, 1)
    draws = random.Random(0)
    tokens = torch.tensor(choose(logits, [sampling] * n, [draws] * n))
    return torch.bincount(tokens, minlength=4) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_are_likely(temperature):
    expected = (P.log() / temperature).softmax(0)
    assert torch.allclose(frequencies(Sampling(temperature)), expected, atol=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.95, 4)])
def test_top_p_keeps_the_fewest_tokens_that_have_it_together(top_p, kept):
    expected = torch.where(torch.arange(4) < kept, P, 0) / P[:kept].sum()
    assert torch.allclose(frequencies(Sampling(1.0, top_p)), expected, atol=0.03)


def test_a_wide_nucleus_is_found_in_a_large_vocabulary():
    logits = torch.zeros(1, 5000)
    tokens = {choose(logits, [Sampling(1.0, 0.999)], [random.Random(seed)])[0] for seed in range(40)}
    assert max(tokens) > 2000


def test_rows_of_a_batch_are_chosen_each_in_its_way():
    logits = P.log().repeat(3, 1)
    how = [Sampling(), Sampling(1.0, seed=3), Sampling()]
    tokens = choose(logits, how, [one.random() for one in how])
    assert tokens[0] == tokens[2] == 0
    assert tokens[1] == choose(logits[:1], how[1:2], [how[1].random()])[0]


def test_what_is_told_of_a_token():
    told = tell(P.log() + 3, 2, 2)
    assert told.logprob == pytest.approx(float(P[2].log()))
    assert [token for token, _ in told.top] == [0, 1]
    assert tell(P.log(), 2, 0).top == ()


@pytest.mark.parametrize("seed", [-5, 2**32, 1.5, "5"])  # -5 would draw what 5 draws
def test_seeds_that_are_none(seed):
    with pytest.raises(InputError, match="expected a whole number from 0"):
        Sampling(1.0, seed=seed)
