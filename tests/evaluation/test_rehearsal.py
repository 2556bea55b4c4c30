"""Studies tried at true width without weights: shapes, stages, and what they come to elsewhere."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
import yaml

import command_line
import commandv as cv
import real
import tiny
from commandv.errors import InputError, ModelError
from commandv.evaluation.study import load_study, rehearse
from commandv.evaluation.study.growth import GROWTH, Job, Sizes
from commandv.evaluation.study.parts import ModelSpec
from commandv.evaluation.study.shapes import altered, config_of, random_model, weight_bytes

run = command_line.run
# Parameters as their publishers state them.
PARAMETERS = {
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "google/gemma-2-2b-it": 2_614_341_888,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two models that are nothing but a config.json, of 4 layers and widths 32 and 48."""
    folder = tmp_path_factory.mktemp("study")
    models = {}
    for name, arch, more in (("small", "llama", {}), ("large", "gemma2", {"hidden_size": 48})):
        kind, sizes = tiny.ARCHS[arch]
        getattr(transformers, kind)(**{**sizes, "vocab_size": tiny.VOCAB, **more}).save_pretrained(folder / name)
        models[name] = {"id": str(folder / name), "dtype": "float32"}
    content = {
        "name": "tiny",
        "models": models,
        "pairs": [["small", "large"]],
        "behaviours": {"list": {"task": "numbered-list", "examples": "builtin:numbered-list", "training": {"rank": 2}}},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def made(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "rehearsal"
    return rehearse(load_study(study), layers=2, prompts=8, out=out, tokenizer=tiny.tiny_tokenizer()), out


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_shapes_have_the_published_number_of_parameters(name):
    assert weight_bytes(config_of(ModelSpec(id=name))) == 2 * PARAMETERS[name]


def test_a_model_without_a_configuration_is_refused_with_the_names_that_are_known():
    with pytest.raises(ModelError, match=r"did you mean .*meta-llama/Llama-3.1-8B.*known without are .*gemma-2-2b"):
        config_of(ModelSpec(id="meta-llama/Llama-3.1-9B"))


def test_random_weights_are_those_of_the_seed_and_norms_begin_as_transformers_has_them():
    config = transformers.LlamaConfig(**tiny.ARCHS["llama"][1], vocab_size=64, tie_word_embeddings=True)
    one, same, other = (random_model(config, torch.float32, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight is one.get_input_embeddings().weight
    assert all((block.input_layernorm.weight == 1).all() for block in one.model.layers)
    assert one.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    fresh = transformers.AutoModelForCausalLM.from_config(config)
    assert torch.equal(one.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3_text", "qwen2", "gpt2"])
def test_nothing_of_a_random_model_is_left_to_chance(arch):
    kind, sizes = tiny.ARCHS[arch]
    config = getattr(transformers, kind)(**sizes, vocab_size=64)
    one, same = (random_model(config, torch.float32) for _ in range(2))
    fresh = transformers.AutoModelForCausalLM.from_config(config)
    assert [name for name, _ in one.named_buffers()] == [name for name, _ in fresh.named_buffers()]
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), fresh.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert max(float(value.detach().abs().max()) for value in one.parameters()) < 10


def test_every_stage_is_run_and_told(made):
    found, out = made
    (stages,) = found.pairs.values()
    assert [one.stage for one in stages] == list(GROWTH)
    assert all(one.seconds > 0 and math.isfinite(one.large_seconds) for one in stages)
    assert found.models["large"]["layers"] == (2, 4)
    assert found.models["large"]["d_model"] == 48
    assert json.loads((out / "rehearsal.json").read_text())["prompts"] == 8
    pasted = cv.load_adapter(str(out / "small-large"))
    assert (pasted.d_model, pasted.layers) == (48, [0])
    assert cv.load_adapter(str(out / "small-large-pyreft")).layers == [0]


def test_bytes_are_counted_and_grow_as_stated(made):
    found, _ = made
    (stages,) = found.pairs.values()
    by_name = {one.stage: one for one in stages}
    rows = sum(found.facts["rows"].values())
    profile = by_name["profile donor"]
    assert rows * 2 * 32 * 2 <= profile.bytes <= rows * 2 * 32 * 2 + 20_000  # rows x layers x width x 2 bytes
    assert profile.full_bytes == 2 * profile.bytes
    assert profile.large_bytes == profile.bytes * 80 * 8192 // (2 * 32)
    assert by_name["build recipient"].bytes == 4 * found.models["large"]["parameters"][0]  # float32
    # Two layers are carried of four, one of two.
    assert by_name["paste"].bytes == 4 * (2 * 2 * 48 + 2)
    assert by_name["paste"].full_bytes == 2 * by_name["paste"].bytes


def test_the_work_of_a_fit_is_that_of_its_gram_matrices():
    one = Sizes(100, 4, 0, 0, 0)
    seconds, _ = GROWTH["fit"](Job(one, one._replace(d_model=200), 3, 10, 50))
    assert seconds == 3 * (10 * 200 * 10 + 4 * 10**3 + 50 * 100 * 50 + 4 * 50**3)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"layers": 5}, "expected 1 to 4"), ({"layers": 0}, "expected 1 to 4"), ({"prompts": 3}, "expected 8 or more")],
)
def test_what_cannot_be_rehearsed_is_refused(study, given, message):
    with pytest.raises(InputError, match=message):
        rehearse(load_study(study), tokenizer=tiny.tiny_tokenizer(), **given)


def test_ends_beyond_a_smaller_vocabulary_are_dropped():
    config = altered(transformers.LlamaConfig(vocab_size=100, eos_token_id=99, bos_token_id=1), {"vocab_size": 50})
    assert (config.eos_token_id, config.bos_token_id) == (None, 1)


@pytest.mark.real
def test_the_verb_prints_a_table_and_its_figures(run, study):
    real.require(real.SMOL)  # lends its tokenizer
    told = run("rehearse", study, "--prompts", 8)
    assert "small -> large" in told.out
    assert "layers 2 of 4" in told.out
    told = run("rehearse", study, "--prompts", 8, "--json").json
    assert set(told["pairs"]) == {"small -> large"}, told
