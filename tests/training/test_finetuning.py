"""Fine-tuning with LoRA: it learns, leaves the model alone, and is stored as PEFT stores it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import tiny
from commandv.errors import FormatError, InputError
from commandv.prompts.sets import Prompt, PromptSet
from commandv.training.examples import read_examples, reply_loss
from commandv.training.finetuning import LoRASettings, finetune, with_lora

EXAMPLES = PromptSet(tuple(Prompt(f"What is {n}?", "the fox") for n in range(12)), "toy")
QUICK = LoRASettings(rank=2, epochs=6, learning_rate=0.02, batch_size=4)


@pytest.fixture(scope="module")
def lm():
    return tiny.tiny_lm(seed=3)


@pytest.fixture(scope="module")
def tuned(lm, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "fox"
    return finetune(lm, EXAMPLES, out, QUICK), out


@torch.no_grad()
def loss(lm) -> float:
    return float(reply_loss(lm, read_examples(lm, EXAMPLES, 8)))


def test_it_learns_and_the_model_stays_as_it_was(lm, tuned):
    before = loss(lm)
    assert loss(tuned[0]) < before - 0.5
    assert loss(tiny.tiny_lm(seed=3)) == before
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


def test_what_is_stored_is_what_was_learned(lm, tuned):
    made, out = tuned
    assert {file.name for file in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = with_lora(lm, out)
    assert loss(again) == loss(made)
    assert again.revision == made.revision != lm.revision
    with pytest.raises(FormatError, match=r"holds README\.md, adapter_config\.json.*choose another place"):
        finetune(lm, EXAMPLES, out, QUICK)


def test_a_seed_decides_everything(lm, tuned, tmp_path):
    same = finetune(lm, EXAMPLES, tmp_path / "same", QUICK)
    other = finetune(lm, EXAMPLES, tmp_path / "other", LoRASettings(**{**vars(QUICK), "seed": 1}))
    assert loss(same) == loss(tuned[0]) != loss(other)


def test_bad_input_is_refused(lm, tuned, tmp_path):
    with pytest.raises(InputError, match="example 1 has no response"):
        finetune(lm, PromptSet((Prompt("What?"),)), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="learning_rate"):
        LoRASettings(learning_rate=0)
    with pytest.raises(FormatError, match=r"no adapter_model\.safetensors"):
        with_lora(lm, tmp_path)
    with pytest.raises(FormatError, match="not a LoRA of"):
        with_lora(tiny.tiny_lm("gpt2"), tuned[1])
    copy = tmp_path / "pickled"
    copy.mkdir()
    (copy / "adapter_config.json").write_text((tuned[1] / "adapter_config.json").read_text())
    (copy / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FormatError, match="pickled weights"):
        with_lora(lm, copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_is_learnt_and_stored_in_float32_whatever_the_model_is_in(dtype, tiny_lm, tmp_path):
    lm = tiny_lm("llama", dtype=dtype)
    before = loss(lm)
    tuned = finetune(lm, EXAMPLES, tmp_path / "lora", LoRASettings(epochs=4, learning_rate=1e-2, max_response=8))
    assert loss(tuned) < before - 0.1
    assert next(tuned.model.parameters()).dtype == next(lm.model.parameters()).dtype == dtype
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
