"""Adapters in weights: exact where they are written at all, refused with the reason where they would not be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import command_line
import commandv as cv
import tiny
from command_line import fails
from commandv.errors import FormatError, InputError, MismatchError, ModelError
from commandv.interop.baked import bake
from commandv.positions import EVERYWHERE, Positions

run = command_line.run
BIASED = ("gpt2", "gpt_neox", "opt", "bloom")  # their MLPs end in a map with a bias
GIVEN = ("llama", "falcon", "qwen2", "mistral")  # theirs can be given one
PROMPTS = ("Why is the sky blue?", "Name a river. And its source, its mouth, its length.")


def additions(lm: cv.LM, layers=(0, 2), size: float = 2.0) -> cv.Adapter:
    generator = torch.Generator().manual_seed(0)
    made = {layer: cv.steering_vector(size * torch.randn(lm.d_model, generator=generator)) for layer in layers}
    return cv.Adapter(made, lm.ref, "push").at(EVERYWHERE)


def ablation(lm: cv.LM, *, layers=None, rank: int = 2) -> cv.Adapter:
    directions = torch.randn(rank, lm.d_model, generator=torch.Generator().manual_seed(1))
    made = {layer: cv.ablation(directions) for layer in (range(lm.n_layers) if layers is None else layers)}
    return cv.Adapter(made, lm.ref, "without").at(EVERYWHERE)


def logits(lm: cv.LM) -> torch.Tensor:
    ids = torch.cat([torch.tensor(cv.encode(lm, prompt).ids) for prompt in PROMPTS])[None]
    with torch.inference_mode():
        return lm.model(input_ids=ids).logits


@pytest.mark.parametrize("arch", [*BIASED, *GIVEN])
def test_additions_are_exact_and_the_model_is_an_ordinary_one(arch, tmp_path):
    lm = tiny.tiny_lm(arch, **({"sliding_window": None} if arch == "mistral" else {}))
    adapter = additions(lm)
    before = logits(lm)
    made = bake(lm, adapter, tmp_path / "model")
    assert made.difference < 1e-3 < made.effect
    assert made.kl is None
    assert torch.equal(logits(lm), before), "the original is as it was"
    again = cv.load_model(tmp_path / "model", dtype="float32", template="plain")
    with cv.attach(lm, adapter):
        torch.testing.assert_close(logits(again), logits(lm), rtol=1e-4, atol=1e-4)
        assert cv.generate(again, list(PROMPTS)) == cv.generate(lm, list(PROMPTS))
    assert not (logits(again) - before).abs().max() < 1e-2
    assert again.model.config.model_type == ("llama" if arch in ("qwen2", "mistral") else lm.model.config.model_type)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "opt"])
def test_an_ablated_direction_is_written_nowhere(arch, tmp_path):
    lm = tiny.tiny_lm(arch)
    adapter = ablation(lm)
    made = bake(lm, adapter, tmp_path / "model", every_writer=True)
    assert made.difference < 2e-3 < made.effect
    assert made.kl is not None
    again = cv.load_model(tmp_path / "model", dtype="float32", template="plain")
    basis = torch.linalg.svd(adapter.interventions[0][0].read, full_matrices=False).Vh
    states = []
    handles = [
        block.register_forward_hook(lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out))
        for block in again.blocks
    ]
    logits(again)
    for handle in handles:
        handle.remove()
    assert len(states) == lm.n_layers
    for h in states:
        assert (h @ basis.T).abs().max() < 1e-3 * h.abs().max()


def test_where_the_attached_one_acts_at_every_writer_they_are_the_same(tmp_path):
    """In a model whose attention and embeddings do not write the direction there is no difference left."""
    lm = tiny.tiny_lm("llama")
    adapter = ablation(lm, rank=1)
    u = torch.nn.functional.normalize(adapter.interventions[0][0].read)
    with torch.no_grad():
        embeddings = lm.model.get_input_embeddings().weight
        embeddings -= embeddings @ u.T @ u
        for block in lm.blocks:
            block.self_attn.o_proj.weight -= u.T @ (u @ block.self_attn.o_proj.weight)
    lm = cv.wrap_model(lm.model, lm.tokenizer, lm.id)
    made = bake(lm, replace(adapter, model=lm.ref), tmp_path / "model", every_writer=True)
    assert made.kl < 1e-6


def test_a_head_that_shares_the_embeddings_reads_as_before(tmp_path):
    lm = tiny.tiny_lm("llama", tie_word_embeddings=True)
    head = lm.model.get_output_embeddings().weight.clone()
    bake(lm, ablation(lm), tmp_path / "model", every_writer=True)
    again = cv.load_model(tmp_path / "model", dtype="float32", template="plain")
    assert torch.equal(again.model.get_output_embeddings().weight, head)
    assert not torch.equal(again.model.get_input_embeddings().weight, head)


def test_half_precision_and_chat(tmp_path):
    lm = tiny.tiny_lm("llama", chat=True, dtype=torch.bfloat16)
    made = bake(lm, additions(lm), tmp_path / "model")
    again = cv.load_model(tmp_path / "model", dtype="bfloat16")
    assert again.chat
    assert made.difference < made.effect / 10


REFUSED = {
    "reads": (lambda lm: tiny.random_adapter(lm, positions="all"), InputError, "reads the state"),
    "prompt only": (
        lambda lm: additions(lm).at(Positions(last=1)),
        InputError,
        r"positions l1 \(prompt tokens only\), not on every token",
    ),
    "ablation unasked": (ablation, InputError, r"not the same\. every_writer=True"),
    "ablation of some layers": (
        lambda lm: ablation(lm, layers=(1, 2)),
        InputError,
        r"ablates at layers \[1, 2\] of 4; in weights only at all",
    ),
    "half an ablation": (lambda lm: ablation(lm).scaled(0.5), InputError, "reads the state"),
    "other model": (lambda lm: additions(tiny.tiny_lm(seed=5)), MismatchError, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_in_weights_is_refused(name, lm, tmp_path):
    adapter, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        bake(lm, adapter(lm), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("arch", "error", "message"),
    [
        ("gemma3_text", InputError, r"norm what the MLP puts out .*\(post_feedforward_layernorm\)"),
        ("olmo2", InputError, "norm what the MLP puts out"),
        ("qwen3", ModelError, "has no bias and can be given none"),
        ("phi3", ModelError, "has no bias and can be given none"),
        ("mixtral", ModelError, "experts"),
        ("mamba", ModelError, "a mamba, whose blocks have none of"),
    ],
)
def test_architectures_without_a_place_for_additions(arch, error, message, tmp_path):
    lm = tiny.tiny_lm(arch)
    with pytest.raises(error, match=message):
        bake(lm, additions(lm), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_qwen2_with_a_sliding_window_is_no_llama(tmp_path):
    lm = tiny.tiny_lm("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ModelError, match="full-attention"):
        bake(lm, additions(lm), tmp_path / "model")


def test_a_model_that_does_not_agree_is_not_kept(tmp_path):
    """A block that does more than add: nothing in its names says so, the check does."""
    lm = tiny.tiny_lm("gpt2")

    def doubled(_module, _inputs, output):
        return 2 * output

    kept = lm.blocks[2].mlp.register_forward_hook(doubled)
    with pytest.raises(ModelError, match="differ by"):
        bake(lm, additions(lm), tmp_path / "model")
    kept.remove()
    assert not (tmp_path / "model").exists()


def test_a_directory_that_holds_something_stays(lm, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match=r"notes\.txt"):
        bake(lm, additions(lm), tmp_path)


def test_the_verb(run, lm, tmp_path, monkeypatch):
    monkeypatch.setattr(cv, "load_model", lambda name, **_: lm)
    cv.save(additions(lm), tmp_path / "a")
    ran = run("export", tmp_path / "a", tmp_path / "model", "--to", "baked", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["difference"] < 1e-3
    assert ran.json["bytes"] > 1000
    assert cv.load_model(tmp_path / "model", dtype="float32", template="plain").n_layers == lm.n_layers
    fails(run("export", tmp_path / "a", tmp_path / "model", "--to", "baked"), "holds")
    cv.save(tiny.random_adapter(lm, positions="all"), tmp_path / "b")
    fails(run("export", tmp_path / "b", tmp_path / "m", "--to", "baked"), "reads the state")
    cv.save(replace(additions(lm), model=replace(lm.ref, id="")), tmp_path / "c")
    fails(run("export", tmp_path / "c", tmp_path / "m", "--to", "baked"), "--model")
    fails(run("export", tmp_path / "a", tmp_path / "m", "--to", "vllm"), "COMMANDV_VLLM=NAME=", "--to baked")
