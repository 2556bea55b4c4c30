"""Relatives of a Llama model whose right answer is known: the same function in another basis, and damaged copies."""

from __future__ import annotations

import copy
import math

import torch
import transformers

import commandv as cv

SEED = 7


@torch.no_grad()
def rotated(lm: cv.LM, d_model: int) -> cv.LM:
    """Return the same function with its residual stream in a random orthonormal frame of a wider space.

    With h' = h Q for Q [d, d_model] of orthonormal rows, RMSNorm differs by sqrt(d_model / d), which the norm weights
    take back; their per-channel gains move into the matrices that follow them.

    Raises:
        ValueError: not a Llama, or a narrower stream.
    """
    _require_llama(lm)
    if d_model < lm.d_model:
        raise ValueError(f"rotated: width {d_model} is below the model's own {lm.d_model}; expected at least that")
    old, config = copy.deepcopy(lm.model).float(), copy.deepcopy(lm.model.config)
    d = config.hidden_size
    generator = torch.Generator().manual_seed(SEED)
    q = torch.linalg.qr(torch.randn(d_model, d, generator=generator, dtype=torch.float64)).Q.T.float()
    config.hidden_size, config.tie_word_embeddings = d_model, False
    config.head_dim = old.model.layers[0].self_attn.head_dim
    config.rms_norm_eps = config.rms_norm_eps * d / d_model
    new = transformers.LlamaForCausalLM(config)
    new.model.embed_tokens.weight.copy_(old.model.embed_tokens.weight @ q)
    flat = math.sqrt(d / d_model)
    for a, b in zip(old.model.layers, new.model.layers, strict=True):
        for part in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(a.self_attn, part).weight
            getattr(b.self_attn, part).weight.copy_((weight * a.input_layernorm.weight) @ q)
        for part in ("gate_proj", "up_proj"):
            getattr(b.mlp, part).weight.copy_((getattr(a.mlp, part).weight * a.post_attention_layernorm.weight) @ q)
        b.self_attn.o_proj.weight.copy_(q.T @ a.self_attn.o_proj.weight)
        b.mlp.down_proj.weight.copy_(q.T @ a.mlp.down_proj.weight)
        b.input_layernorm.weight.fill_(flat)
        b.post_attention_layernorm.weight.fill_(flat)
    new.lm_head.weight.copy_((old.lm_head.weight * old.model.norm.weight) @ q)
    new.model.norm.weight.fill_(flat)
    new.generation_config = old.generation_config
    return _wrapped(new, lm, f"{lm.id}, rotated to {d_model}")


@torch.no_grad()
def damaged(lm: cv.LM, noise: float) -> cv.LM:
    """Return the model with Gaussian noise on every matrix, `noise` of its root mean square."""
    generator = torch.Generator().manual_seed(SEED)
    model = copy.deepcopy(lm.model).float()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight += noise * weight.square().mean().sqrt() * torch.randn(weight.shape, generator=generator)
    return _wrapped(model, lm, f"{lm.id}, {noise:.0%} noise")


def dropped(lm: cv.LM, layers: tuple[int, ...]) -> cv.LM:
    """Return the model without some of its blocks; (4, 17, 25) are the three that SmolLM2 misses least on plain text.

    Raises:
        ValueError: not a Llama, or layers it does not have.
    """
    _require_llama(lm)
    outside = [layer for layer in layers if not 0 <= layer < lm.n_layers]
    if outside or len(set(layers)) == lm.n_layers:
        raise ValueError(f"dropped: layers {outside or layers}: expected some, not all, of 0 .. {lm.n_layers - 1}")
    model = copy.deepcopy(lm.model)
    kept = [block for number, block in enumerate(model.model.layers) if number not in layers]
    for number, block in enumerate(kept):
        block.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]
    return _wrapped(model, lm, f"{lm.id}, {len(layers)} layers less")


def _require_llama(lm: cv.LM) -> None:
    if not isinstance(lm.model, transformers.LlamaForCausalLM):
        raise ValueError(
            f"{lm.id} is a {type(lm.model).__name__}; rotating and dropping are known for Llama models only"
        )


def _wrapped(model: torch.nn.Module, like: cv.LM, id: str) -> cv.LM:
    return cv.wrap_like(like, model.to(like.model.dtype), id)
