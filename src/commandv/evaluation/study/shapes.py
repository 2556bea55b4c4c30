"""What models look like without their weights: configurations, and models of random weights made from them."""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from commandv.errors import InputError, ModelError, did_you_mean
from commandv.evaluation.study.parts import ModelSpec
from commandv.models.gguf import converted
from commandv.models.names import PACKAGED, require_model_name
from commandv.storage.reading import first_line

# The published config.json of hub models, by id without -Instruct or -it, as far as it decides sizes and speed.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (importlib.resources.files("commandv.evaluation") / "data" / "published-configs.json").read_text("utf-8")
)


def config_of(spec: ModelSpec) -> Any:
    """Return a model's text configuration, without its weights: its own config.json, or the published one.

    Its own is that of a local directory, of a packaged model or GGUF file, or in the hub's cache; the hub itself is
    asked for models that are not in `PUBLISHED`.
    """
    import huggingface_hub

    name, here = spec.id, os.path.exists(spec.id)
    place, cached = name, None
    if name.count("/") == 1 and not here:
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if name in PACKAGED or name.endswith(".gguf"):
        place = str(converted(name))
    elif isinstance(cached, str):
        place = str(Path(cached).parent)
    elif not here and (published := PUBLISHED.get(name.removesuffix("-Instruct").removesuffix("-it"))):
        return transformers.AutoConfig.for_model(**published)
    try:
        require_model_name(name)
        config = transformers.AutoConfig.from_pretrained(place)
    except Exception as error:  # of files and the network transformers raises anything
        near = did_you_mean(name, [*PUBLISHED, *(f"{one}-Instruct" for one in PUBLISHED)])
        raise ModelError(
            f"{name}: no configuration to make it from{near}: {first_line(error)}. A directory with its config.json "
            f"will do; known without are {', '.join(PUBLISHED)}"
        ) from error
    return config.get_text_config(decoder=True)


def altered(config: Any, changes: dict[str, Any]) -> Any:
    """Return a configuration with other sizes; lists by layer are cut to the new depth."""
    made, deep = copy.deepcopy(config), config.num_hidden_layers
    layers = changes.get("num_hidden_layers", deep)
    if not 1 <= layers <= deep:
        raise InputError(f"layers={layers}: expected 1 to {deep}, the depth of the {config.model_type} model")
    for name, value in changes.items():
        setattr(made, name, value)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == deep:
            setattr(made, name, value[:layers])
        if name.endswith("_token_id") and isinstance(value, int) and value >= made.vocab_size:
            setattr(made, name, None)
    return made


def weight_bytes(config: Any) -> int:
    """Return what the weights of a configuration take in bfloat16."""
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    return 2 * sum(one.numel() for one in made.parameters())


def random_model(config: Any, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> nn.Module:
    """Return a model of random weights.

    Matrices are cut from one buffer of normal numbers, each from a place of its own, because drawing billions takes
    longer than running them; their scale, 1 / sqrt(inputs), lets every block change the stream. All else is as
    transformers begins with.
    """
    with no_init_weights(), torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn((1 << 22) - 3, generator=generator).to(device, dtype)  # of no width a multiple
    with torch.no_grad():
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if not any(one.ndim > 1 for one in own):
                model._init_weights(module)  # norms, and what else has no matrix
                continue
            for one in own:
                begins = int(torch.randint(len(drawn), (1,), generator=generator))
                if one.ndim > 1:
                    _fill(one.view(-1), drawn.roll(begins) / one.shape[-1] ** 0.5)
                else:
                    one.zero_()
    return model.eval()


def _fill(flat: torch.Tensor, values: torch.Tensor) -> None:
    for part in flat.split(len(values)):
        part.copy_(values[: len(part)])
