"""Tiny random models and tokenizers, built in memory and offline."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import commandv as cv
from commandv.models.lm import LM

D, LAYERS, VOCAB = 32, 4, 320

SENTENCES = (
    "Why does Venus spin backwards compared with most of the other planets?",
    "How do I make a good cup of tea? Boil fresh water and steep the leaves four minutes.",
    "Question: what is the name of the river that runs through the city?\nAnswer: the answer is yes.",
    "The quick brown fox jumps over the lazy dog, and then it sleeps under a tree in the garden.",
    "1. First, open the window.\n2. Then close the door.\n3. Read the book and write a letter.",
    "She said that nobody had seen the cat since Monday, which was strange because it never left.",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@functools.cache
def _bpe(vocab: int, bos: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    byte_level = processors.ByteLevel(trim_offsets=False)
    start = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    tokenizer.post_processor = processors.Sequence([byte_level, start]) if bos else byte_level
    return tokenizer


def tiny_tokenizer(*, vocab: int = VOCAB, bos: bool = True, chat: bool = False) -> Any:
    """A byte-level BPE; with `bos` it starts every text with <bos>, with `chat` it has a chat template."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(vocab, bos).to_str()),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


# Names of the usual sizes in configurations, and in the older ones that have their own.
_MODERN = {
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GQA = {**_MODERN, "head_dim": 8}
_GPT = {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 512}
_MOE = {"num_local_experts": LAYERS, "num_experts_per_tok": 2}

ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _MODERN),
    "mistral": ("MistralConfig", _MODERN),
    "qwen2": ("Qwen2Config", _MODERN),
    "qwen3": ("Qwen3Config", _GQA),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_GQA, "num_experts": LAYERS, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "mixtral": ("MixtralConfig", {**_MODERN, **_MOE}),
    "gemma2": ("Gemma2Config", {**_GQA, "sliding_window": 64}),
    "gemma3_text": ("Gemma3TextConfig", {**_GQA, "sliding_window": 64}),
    "phi3": ("Phi3Config", _MODERN),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_neox": ("GPTNeoXConfig", {**_MODERN, "num_key_value_heads": None}),
    "opt": ("OPTConfig", {**_MODERN, "ffn_dim": 48, "word_embed_proj_dim": D}),
    "bloom": ("BloomConfig", {"hidden_size": D, "n_layer": LAYERS, "n_head": 4}),
    "falcon": ("FalconConfig", {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 4}),
    "olmo2": ("Olmo2Config", _MODERN),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", {**_GPT, "rotary_dim": 4}),
    # Distances counted in columns: ALiBi, local and chunked attention.
    "mpt": ("MptConfig", {"d_model": D, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 512}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": D,
            "num_layers": LAYERS,
            "num_heads": 4,
            "window_size": 32,
            "attention_types": [[["global", "local"], LAYERS // 2]],
            "max_position_embeddings": 512,
        },
    ),
    "llama4_text": (
        "Llama4TextConfig",
        {**_GQA, **_MOE, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 32},
    ),
    # A state that goes through every column: recurrent models and hybrids.
    "mamba": ("MambaConfig", {"hidden_size": D, "num_hidden_layers": LAYERS, "state_size": 8}),
    "rwkv": (
        "RwkvConfig",
        {
            "hidden_size": D,
            "attention_hidden_size": D,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "context_length": 512,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**_MODERN, "num_key_value_heads": 1, "lru_width": D, "attention_window_size": 64, "conv1d_width": 4},
    ),
    "jamba": (
        "JambaConfig",
        {
            **_MODERN,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": ("Lfm2Config", {**_MODERN, "layer_types": ["conv", "full_attention"] * (LAYERS // 2), "conv_L_cache": 3}),
    # Blocks that put out four streams.
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **_GQA,
            "sliding_window": 64,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
            "laurel_rank": 4,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.0] * LAYERS,
        },
    ),
}
MULTIMODAL = ("llava", "gemma3", "mllama")
RECURRENT = ("mamba", "rwkv", "recurrent_gemma", "jamba", "lfm2")
NOT_PLAIN = ("mpt", "gpt_neo", "llama4_text", *RECURRENT, "gemma3n", "mllama")


def tiny_model(arch: str = "llama", *, seed: int = 0, **settings: Any) -> Any:
    """A random model in float32 with weights large enough that blocks matter; `settings` change its config."""
    if arch in MULTIMODAL:
        config = _multimodal_config(arch)
    else:
        name, sizes = ARCHS[arch]
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        sizes = {"vocab_size": VOCAB, "initializer_range": 0.2, **special, **sizes, **settings}
        config = getattr(transformers, name)(**sizes)
    auto = transformers.AutoModelForImageTextToText if arch in MULTIMODAL else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32).eval()
        if arch in NOT_PLAIN:  # most of them take no notice of initializer_range
            for one in model.parameters():
                if one.ndim > 1:
                    torch.nn.init.normal_(one, std=0.15)
    return model


def _multimodal_config(arch: str) -> Any:
    """A text part and a vision tower of the same depth."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {"vocab_size": VOCAB, "initializer_range": 0.2}
    if arch == "mllama":  # of its text blocks every second one looks at an image, and is left out where there is none
        rope = {"rope_type": "default", "rope_theta": 1e4}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        seeing = {
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        }
        vision = {name: value for name, value in vision.items() if name != "num_attention_heads"}
        return transformers.MllamaConfig(
            text_config={**_MODERN, **text, **special, "cross_attention_layers": [1, 3], "rope_scaling": rope},
            vision_config={**vision, **seeing},
        )
    if arch == "llava":
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision, projection_dim=16),
            text_config=transformers.LlamaConfig(**_MODERN, **text),
            image_token_id=VOCAB - 1,
        )
    return transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**vision),
        text_config=transformers.Gemma3TextConfig(**_GQA, **text),
        image_token_id=VOCAB - 1,
        mm_tokens_per_image=4,
    )


def tiny_lm(
    arch: str = "llama",
    *,
    seed: int = 0,
    template: str = "auto",
    bos: bool = True,
    chat: bool = False,
    vocab: int = VOCAB,
    id: str = "",
    dtype: torch.dtype = torch.float32,
    system: str | None = None,
    **settings: Any,
) -> LM:
    """A tiny random model with its tokenizer; `settings` change the model's config (vocab is the tokenizer's)."""
    model = tiny_model(arch, seed=seed, **{"vocab_size": max(vocab, VOCAB), **settings}).to(dtype)
    tokenizer = tiny_tokenizer(vocab=vocab, bos=bos, chat=chat)
    return cv.wrap_model(model, tokenizer, id or f"tiny-{arch}", template=template, system=system)


def random_adapter(
    lm: LM, layers: Any = (1,), positions: str = "l1", *, rank: int = 2, seed: int = 0, size: float = 1.0
) -> cv.Adapter:
    """An adapter that reads and writes random directions, large enough to change what tiny models say."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def one() -> cv.Intervention:
        width = lm.d_model
        where = cv.Positions.parse(positions)
        return cv.Intervention(
            normal(rank, width) / width**0.5, normal(rank), size * normal(rank, width), positions=where
        )

    return cv.Adapter({layer: (one(),) for layer in layers}, lm.ref, "random")
