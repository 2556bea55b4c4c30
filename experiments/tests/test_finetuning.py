"""Fine-tuning with LoRA: it learns, leaves the model alone, and a seed decides everything."""

from __future__ import annotations

import pytest
import torch

import commandv as cv
import tiny
from commandv.evaluation import reply_log_probs
from commandv.prompts.sets import Prompt
from experiments.organisms.finetuning import finetune

pytest.importorskip("peft")
EXAMPLES = cv.PromptSet(tuple(Prompt(f"What is {n}?", "the fox") for n in range(12)), "toy")
QUICK = {"epochs": 6, "learning_rate": 0.02, "batch_size": 4}


def surprise(lm) -> float:
    """Mean nats of the replies' tokens."""
    ids = [(cv.encode(lm, one.text, one.response)) for one in EXAMPLES]
    found = reply_log_probs(lm, EXAMPLES)
    return -float(
        torch.stack(
            [rows[: len(one.ids) - one.n_prompt].gather(1, torch.tensor(one.ids[one.n_prompt :])[:, None]).mean()
             for rows, one in zip(found, ids, strict=True)]
        ).mean()
    )  # fmt: skip


def test_it_learns_and_the_model_stays_as_it_was():
    lm = tiny.tiny_lm(seed=3)
    before = surprise(lm)
    tuned = finetune(lm, EXAMPLES, **QUICK)
    assert surprise(tuned) < before - 0.5
    assert surprise(lm) == before == surprise(tiny.tiny_lm(seed=3))
    assert all(parameter.requires_grad for parameter in lm.model.parameters())
    assert tuned.ref.weights != lm.ref.weights
    assert finetune(lm, EXAMPLES, **QUICK).ref.weights == tuned.ref.weights
    assert finetune(lm, EXAMPLES, **QUICK, seed=1).ref.weights != tuned.ref.weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_keeps_its_dtype(dtype):
    lm = tiny.tiny_lm(dtype=dtype)
    tuned = finetune(lm, EXAMPLES, epochs=4, learning_rate=1e-2)
    assert tuned.model.dtype == dtype
    assert surprise(tuned) < surprise(lm) - 0.1


def test_what_was_made_opens_as_a_model(tmp_path):
    tuned = finetune(tiny.tiny_lm(seed=3), EXAMPLES, **QUICK)
    tuned.model.save_pretrained(tmp_path)
    tuned.tokenizer.save_pretrained(tmp_path)
    assert surprise(cv.load_model(str(tmp_path))) == pytest.approx(surprise(tuned), abs=0.05)
