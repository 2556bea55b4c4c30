"""Tiny Llamas in GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

import tiny

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS = {"attn_q": 4, "attn_k": 2}


def tensors(model) -> dict[str, np.ndarray]:
    """A llama model's weights by llama.cpp's names; it keeps the two halves of a head's dimensions interleaved."""
    out = {}
    for name, value in model.state_dict().items():
        array = value.numpy().astype(np.float32)
        if not name.startswith("model.layers."):
            short = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            out[f"{short[name.removesuffix('.weight')]}.weight"] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        part = NAMES[rest.removesuffix(".weight")]
        if part in HEADS:
            array = array.reshape(HEADS[part], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        out[f"blk.{layer}.{part}.weight"] = array
    return out


def write(
    path: Path, weights: dict[str, np.ndarray], *, split: tuple[int, int, int] | None = None, **keys: str
) -> Path:
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(tiny.LAYERS)
    out.add_context_length(512)
    out.add_embedding_length(tiny.D)
    out.add_feed_forward_length(48)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(1e4)
    out.add_vocab_size(tiny.VOCAB)
    bpe = json.loads(tiny.tiny_tokenizer().backend_tokenizer.to_str())["model"]
    words = sorted(bpe["vocab"], key=bpe["vocab"].get)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words)
    out.add_token_types([3 if word in ("<pad>", "<bos>", "<eos>") else 1 for word in words])
    out.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in bpe["merges"]])
    out.add_pad_token_id(0)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    for key, value in keys.items():
        out.add_string(key.replace("__", "."), value)
    if split:
        out.add_uint16("split.no", split[0])
        out.add_uint16("split.count", split[1])
        out.add_int32("split.tensors.count", split[2])
    for name, array in weights.items():
        out.add_tensor(name, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def write_parts(folder: Path, weights: dict[str, np.ndarray], count: int = 3) -> list[Path]:
    names = list(weights)
    return [
        write(
            folder / f"model-{number + 1:05}-of-{count:05}.gguf",
            {name: weights[name] for name in names[number::count]},
            split=(number, count, len(names)),
        )
        for number in range(count)
    ]
