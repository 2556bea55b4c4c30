"""The models of a study: loaded when first used, a few kept at a time; for rehearsals random weights instead."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import transformers

from commandv.errors import InputError
from commandv.evaluation.study.parts import ModelSpec
from commandv.evaluation.study.schema import Study
from commandv.models.lm import LM
from commandv.models.load import load_model, resolve_dtype, wrap_model

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
        self.device_map: str | None = None  # of models that are loaded
        self._loaded: OrderedDict[str, LM] = OrderedDict()
        if rehearsal is not None:
            without = [name for name, spec in self.specs.items() if spec.shape is None]
            if without or rehearsal < 1:
                raise InputError(f"a rehearsal (shrink {rehearsal}) needs a shape for every model; {without} have none")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": OrderedDict()}  # workers load models of their own

    def __getitem__(self, name: str) -> LM:
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return self._loaded[name]
        while len(self._loaded) >= KEPT:
            self._loaded.popitem(last=False)
        spec = self.specs[name]
        if self.rehearsal is None:
            self._loaded[name] = load_model(**spec.model_dump(exclude={"shape"}), device_map=self.device_map)
        else:
            self._loaded[name] = _random(spec, self.rehearsal)
        return self._loaded[name]

    def bytes(self) -> int:
        """Return about what the weights of the two largest models take in bfloat16; 0 where no size is known here."""
        sizes = sorted(_bytes(spec) for spec in self.specs.values())
        return sum(sizes[-2:])

    def parameters(self, name: str) -> int:
        """Return how many parameters a model has."""
        return sum(parameter.numel() for parameter in self[name].model.parameters())


def _bytes(spec: ModelSpec) -> int:
    shape = spec.shape
    if shape is None:
        return sum(file.stat().st_size for file in Path(spec.id).glob("*.safetensors"))
    head = shape.d_model // shape.heads
    block = 2 * shape.d_model * head * (shape.heads + shape.kv_heads) + 3 * shape.d_model * shape.intermediate
    return 2 * shape.n_layers * block


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
