"""The models of a study: loaded when first used, a few kept at a time; siblings and rehearsals made from others."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict

import torch
import transformers

from commandv.directories import kept
from commandv.errors import InputError
from commandv.evaluation.siblings import damaged, dropped, rotated
from commandv.evaluation.study.parts import FineTuning, ModelSpec
from commandv.evaluation.study.schema import Study
from commandv.files import cache_dir, digest, file_name
from commandv.models.load import LM, load_model, resolve_dtype, wrap_model
from commandv.prompts.sets import load_prompts
from commandv.training.finetuning import LORA, LoRASettings, finetune, with_lora

KEPT = 3  # models in memory at a time
STAND_IN = "smollm2-135m-instruct"  # lends its tokenizer to rehearsals


class ModelSource:
    """Gives a study its models by their short names."""

    def __init__(self, study: Study, *, rehearsal: int | None = None) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            study: whose models.
            rehearsal: replace every model by one of random weights in its stated shape, with its widths divided by
                this number; a run then proves plumbing and memory, and its figures mean nothing.

        Raises:
            InputError: a rehearsal of models whose shape the study does not state.
        """
        self.specs, self.rehearsal = study.models, rehearsal
        self._loaded: OrderedDict[tuple[str, int], LM] = OrderedDict()
        if rehearsal is not None:
            without = [name for name, spec in self.specs.items() if spec.shape is None]
            if without or rehearsal < 1:
                raise InputError(f"a rehearsal (shrink {rehearsal}) needs a shape for every model; {without} have none")

    def __getitem__(self, name: str) -> LM:
        return self.seeded(name, 0)

    def seeded(self, name: str, seed: int) -> LM:
        """Return a model; one that is fine-tuned here is so with this seed, unless it states another."""
        spec = self.specs[name]
        key = (name, seed if spec.finetune and spec.finetune.seed is None else 0)
        if key in self._loaded:
            self._loaded.move_to_end(key)
            return self._loaded[key]
        while len(self._loaded) >= KEPT:
            self._loaded.popitem(last=False)
        self._loaded[key] = _load(spec, seed) if self.rehearsal is None else _random(spec, self.rehearsal)
        return self._loaded[key]

    def parameters(self, name: str) -> int:
        """Return how many parameters a model has; nothing is fine-tuned to know it."""
        spec = self.specs[name]
        untuned = spec.finetune is None or self.rehearsal is not None
        lm = self[name] if untuned else _load(spec.model_copy(update={"finetune": None}), 0)
        return sum(parameter.numel() for parameter in lm.model.parameters())


def _load(spec: ModelSpec, seed: int) -> LM:
    lm = load_model(spec.id, dtype=spec.dtype, revision=spec.revision)
    if spec.lora is not None:
        lm = with_lora(lm, spec.lora)
    if spec.finetune is not None:
        lm = _finetuned(lm, spec.finetune, seed)
    if spec.rotate is not None:
        lm = rotated(lm, spec.rotate)
    if spec.noise:
        lm = damaged(lm, spec.noise)
    return dropped(lm, spec.drop) if spec.drop else lm


def _finetuned(lm: LM, how: FineTuning, seed: int) -> LM:
    """Return a fine-tuned copy; its LoRA is kept in the cache directory."""
    examples = load_prompts(how.examples)
    chosen = seed if how.seed is None else how.seed
    settings = LoRASettings(**how.model_dump(exclude={"examples", "seed"}), seed=chosen)
    stamp = digest(lm.ref.revision, lm.ref.id, lm.ref.template, examples.hash, asdict(settings))
    path = cache_dir() / "loras" / f"{file_name(examples.name.rpartition(':')[2].rpartition('/')[2])}-{stamp}"
    return kept(path, LORA, lambda: with_lora(lm, path), lambda: finetune(lm, examples, path, settings))


def _random(spec: ModelSpec, shrink: int) -> LM:
    """Return random weights in a model's shape, its widths divided by `shrink`."""
    shape, stand_in = spec.shape, load_model(STAND_IN)
    assert shape is not None
    head = shape.d_model // shape.heads
    heads = max(1, shape.heads // shrink)
    config = transformers.LlamaConfig(
        hidden_size=heads * head,
        intermediate_size=max(64, shape.intermediate // shrink),
        num_hidden_layers=shape.n_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(
            n for n in range(1, heads + 1) if heads % n == 0 and n <= max(1, shape.kv_heads // shrink)
        ),
        vocab_size=stand_in.model.config.vocab_size,
        max_position_embeddings=2048,
    )
    dtype = resolve_dtype(spec.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return wrap_model(model, stand_in.tokenizer, f"{spec.id}, random weights, widths / {shrink}")
