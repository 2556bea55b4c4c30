"""The models of a study: loaded when first used, a few kept at a time; for rehearsals random weights instead."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import transformers

from commandv.errors import CommandVError, InputError, ModelError
from commandv.evaluation.study.parts import ModelSpec
from commandv.evaluation.study.schema import Study
from commandv.evaluation.study.shapes import altered, config_of, random_model, weight_bytes
from commandv.models.gguf import converted, is_converted
from commandv.models.lm import LM
from commandv.models.load import load_model, resolve_dtype, wrap_model
from commandv.models.names import PACKAGED

KEPT = 3  # models in memory at a time
STAND_IN = "smollm2-135m-instruct"  # lends its tokenizer to rehearsals


class ModelSource:
    """Gives a study its models by their short names."""

    def __init__(self, study: Study, *, rehearsal: int | None = None) -> None:
        """Prepare; nothing is loaded yet.

        With `rehearsal` every model is replaced by one of random weights in its shape, with its widths divided by this
        number: a run then proves plumbing, and its figures mean nothing.

        Raises:
            InputError: a number below 1.
        """
        if rehearsal is not None and rehearsal < 1:
            raise InputError(f"rehearsal={rehearsal}: expected 1 or more, by which widths are divided")
        self.specs, self.rehearsal = study.models, rehearsal
        self.device_map: str | None = None  # of models that are loaded
        self._loaded: OrderedDict[str, LM] = OrderedDict()

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
            self._loaded[name] = load_model(**spec.model_dump(), device_map=self.device_map)
        else:
            self._loaded[name] = _random(spec, self.rehearsal)
        return self._loaded[name]

    def bytes(self) -> int:
        """Return about what the weights of the two largest models take in bfloat16; 0 where no size is known here."""
        sizes = sorted(_bytes(spec) for spec in self.specs.values())
        return sum(sizes[-2:])

    def parameters(self, name: str, *, convert: bool = True) -> int:
        """Return how many parameters a model has; its weights are not loaded.

        Raises:
            ModelError: its configuration is not to be had; without `convert`, not before a conversion.
        """
        own = self.specs[name].id
        if not convert and (own in PACKAGED or own.endswith(".gguf")) and not is_converted(own):
            raise ModelError(f"{own} is converted at its first use")
        if self.rehearsal is not None:
            return sum(parameter.numel() for parameter in self[name].model.parameters())
        return weight_bytes(config_of(self.specs[name])) // 2


def stand_in_tokenizer() -> Any:
    """Return the tokenizer that models of random weights borrow."""
    return transformers.AutoTokenizer.from_pretrained(converted(STAND_IN))


def _bytes(spec: ModelSpec) -> int:
    try:
        return weight_bytes(config_of(spec))
    except CommandVError:  # the workers may have what is not here
        return 0


def _random(spec: ModelSpec, shrink: int) -> LM:
    """Return random weights in a model's shape, its widths divided by `shrink`."""
    config, tokenizer = config_of(spec), stand_in_tokenizer()
    had = config.num_attention_heads
    heads, shared = (max(1, n // shrink) for n in (had, getattr(config, "num_key_value_heads", None) or had))
    narrow = {
        "hidden_size": config.hidden_size // had * heads,
        "intermediate_size": max(64, (getattr(config, "intermediate_size", None) or 0) // shrink),
        "num_attention_heads": heads,
        "num_key_value_heads": max(n for n in range(1, shared + 1) if heads % n == 0),
        "vocab_size": len(tokenizer),
    }
    narrow = {name: size for name, size in narrow.items() if getattr(config, name, None) is not None}
    model = random_model(altered(config, narrow), resolve_dtype(spec.dtype))
    return wrap_model(model, tokenizer, f"{spec.id}, random weights, widths / {shrink}")
