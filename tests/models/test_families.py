"""Models that are not plain transformers: right results, or a refusal that says why."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import commandv as cv
import tiny
from commandv.errors import InputError, ModelError
from commandv.models.encoding import encode, pad
from commandv.models.live import reading
from commandv.models.prefix import shared_prefix

OPENING = "the quick brown fox sat on the old mat by the door and "
PROMPTS = [OPENING + rest for rest in ("slept", "ate a fish that was far too big for it and went away over the hills")]
WINDOWED = {"mistral": {"sliding_window": 16}, "gemma3_text": {"sliding_window": 16}}
FAMILIES = (*tiny.NOT_PLAIN, *WINDOWED, "bloom")


@pytest.fixture(scope="module")
def models():
    return {arch: tiny.tiny_lm(arch, **WINDOWED.get(arch, {})) for arch in FAMILIES}


def changed(lm, positions):
    return cv.attach(lm, tiny.random_adapter(lm, (0, 1), positions)) if positions else contextlib.nullcontext()


@pytest.mark.parametrize("positions", [None, "l1", "f2", "l1+g2", "all"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_a_batch_with_one_beginning_answers_as_prompts_alone(models, arch, positions):
    lm = models[arch]
    with changed(lm, positions):
        together = cv.generate(lm, PROMPTS, max_new_tokens=6)
        assert together == [cv.generate(lm, [one], max_new_tokens=6)[0] for one in PROMPTS]
    if positions not in (None, "f2"):
        assert together != cv.generate(lm, PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize("positions", [None, "f1+l1", "all"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_profiles_are_the_same_padded_and_alone(models, arch, positions):
    lm = models[arch]
    with changed(lm, positions):
        alone = cv.profile(lm, PROMPTS, batch_size=1, cache=False, text=None)
        padded = [cv.profile(lm, PROMPTS, padding=side, cache=False, text=None) for side in ("left", "right")]
    for layer in range(lm.n_layers):
        for one in padded:
            assert_close(one.layer(layer).float(), alone.layer(layer).float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("arch", FAMILIES)
def test_what_is_read_is_what_the_next_block_gets(models, arch):
    lm, seen = models[arch], {}

    def entering(_block, args, kwargs):
        h = args[0] if args else next(one for one in kwargs.values() if isinstance(one, torch.Tensor))
        seen["into"] = h[lm.stream] if h.ndim == 4 else h

    handle = lm.blocks[1].register_forward_pre_hook(entering, with_kwargs=True)
    with changed(lm, "all"), reading(lm, {0: lambda h: seen.update(out=h)}), torch.inference_mode():
        lm.model(input_ids=torch.tensor([[1, 20, 21, 22]]))
    handle.remove()
    assert torch.equal(seen["out"], seen["into"])


@pytest.mark.parametrize("positions", ["l1", "f1+g2", "all"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_a_model_s_own_generate_equals_uncached_or_is_refused(models, arch, positions):
    lm = models[arch]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([encode(lm, PROMPTS[0]).ids])
    with changed(lm, positions):
        uncached = lm.model.generate(input_ids=ids, use_cache=False, **settings)
        if arch in ("mamba", "rwkv"):
            with pytest.raises(InputError, match="recurrent state"):
                lm.model.generate(input_ids=ids, **settings)
        else:
            assert torch.equal(lm.model.generate(input_ids=ids, **settings), uncached)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_beginning_is_shared_only_where_padding_after_it_changes_nothing(models, arch):
    lm = models[arch]
    rows = [encode(lm, text).ids for text in PROMPTS]
    length = shared_prefix(lm, rows, [len(row) for row in rows], new_tokens=6).length
    assert bool(length) == (arch == "mllama")
    assert lm.recurrent == (arch in tiny.RECURRENT)


@pytest.mark.parametrize("arch", tiny.RECURRENT)
def test_recurrent_models_are_not_padded_at_the_left(models, arch):
    lm = models[arch]
    with pytest.raises(InputError, match="recurrent model"):
        pad(lm, [[5, 6, 7], [5]])
    assert pad(lm, [[5, 6], [7, 8]]).attention_mask.all()
    assert pad(lm, [[5, 6, 7], [5]], "right").input_ids.shape == (2, 3)


def test_blocks_that_only_an_image_needs_are_left_out(models):
    lm = models["mllama"]
    assert lm.n_layers == tiny.LAYERS // 2
    assert cv.profile(lm, PROMPTS, cache=False, text=None).n_layers == lm.n_layers


def test_of_several_streams_the_active_one_is_changed(models):
    lm, outputs = models["gemma3n"], []
    handle = lm.blocks[1].register_forward_hook(lambda _m, _i, out: outputs.append(out))
    ids = torch.tensor([[1, 20, 21, 22]])
    with torch.inference_mode():
        lm.model(input_ids=ids)
        with changed(lm, "l1"), changed(lm, "f1"):
            lm.model(input_ids=ids)
    handle.remove()
    streams, batch, columns, _ = outputs[0].shape
    moved = (outputs[0] != outputs[1]).any(-1)
    assert (streams, batch, columns) == (4, 1, 4)
    assert moved[0, 0, -1]
    with torch.inference_mode(), cv.attach(lm, cv.Adapter({1: cv.steering_vector(torch.ones(lm.d_model))}, lm.ref)):
        outputs.clear()
        handle = lm.blocks[1].register_forward_hook(lambda _m, _i, out: outputs.append(out))
        lm.model(input_ids=ids)
        handle.remove()
    assert outputs[0].shape == (4, 1, 4, lm.d_model)


# -- what is no causal language model -------------------------------------------------------------------------------


def _config(arch="llama"):
    return tiny.tiny_model(arch).config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.AutoModel.from_config(_config()), "no language-model head"),
        (lambda: transformers.AutoModelForSequenceClassification.from_config(_config()), "no language-model head"),
        (lambda: nn.DataParallel(tiny.tiny_model()), "DataParallel"),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(d_model=32, num_layers=2, d_ff=32, num_heads=2, d_kv=8, vocab_size=tiny.VOCAB)
            ),
            "encoder-decoder",
        ),
        (
            lambda: transformers.BertLMHeadModel(
                transformers.BertConfig(
                    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                    vocab_size=tiny.VOCAB, initializer_range=0.2,
                )
            ),
            "causal",
        ),
    ],
    ids=["headless", "classifier", "parallel", "encoder-decoder", "encoder"],
)  # fmt: skip
def test_what_is_no_causal_language_model_is_refused(make, message):
    with pytest.raises(ModelError, match=message):
        cv.wrap_model(make(), tiny.tiny_tokenizer(), "other")


# -- offloaded weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["blocks", "embeddings", "all"])
def test_offloaded_weights_answer_alike(tmp_path, where):
    pytest.importorskip("accelerate")
    tiny.tiny_model().save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places = {
        "blocks": {"model.embed_tokens": "cpu", "model.layers": "disk", **rest},
        "embeddings": {"model.embed_tokens": "disk", "model.layers": "cpu", **rest},
        "all": {"": "disk"},
    }[where]
    whole = cv.load_model(tmp_path / "model", dtype="float32")
    away = cv.load_model(tmp_path / "model", dtype="float32", device_map=places)
    adapter = tiny.random_adapter(whole)
    assert cv.generate(away, PROMPTS, max_new_tokens=3) == cv.generate(whole, PROMPTS, max_new_tokens=3)
    with cv.attach(whole, adapter):
        expected = cv.generate(whole, PROMPTS, max_new_tokens=3)
    with cv.attach(away, adapter):
        assert cv.generate(away, PROMPTS, max_new_tokens=3) == expected


def test_a_lora_directory_is_loaded_with_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    tiny.tiny_model().save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tuned = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "lora")
    expected = cv.generate(cv.wrap_model(tuned, tiny.tiny_tokenizer(), "tuned"), PROMPTS, max_new_tokens=5)
    loaded = cv.load_model(tmp_path / "lora", dtype="float32")
    assert cv.generate(loaded, PROMPTS, max_new_tokens=5) == expected
    assert cv.generate(cv.load_model(tmp_path / "model", dtype="float32"), PROMPTS, max_new_tokens=5) != expected
