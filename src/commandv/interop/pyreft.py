"""pyreft directories: `config.json` and one `intkey_layer_N_comp_block_output_unit_pos_nunit_1#K.bin` per intervention.

Read without pyreft. The layer is taken from each file's key, not from the order of the config.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commandv.adapters.adapter import KINDS, Adapter, Intervention
from commandv.errors import FormatError
from commandv.interop.pickles import load_tensors
from commandv.models.load import ModelRef
from commandv.positions import LAST, Positions, as_positions

KEY = re.compile(r"layer_(\d+)_comp_block_output_unit_pos_nunit_1#(\d+)")
CLASSES = {f"{name}intervention": name for name in ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft")}


def is_pyreft(path: Path) -> bool:
    """True for a directory that looks like a saved pyreft model."""
    return path.is_dir() and (path / "config.json").is_file() and any(path.glob("intkey_*.bin"))


def read_pyreft(path: Path) -> Adapter:
    """Read a pyreft directory of any of the six ReFT kinds, or of bias-only interventions.

    Positions and the base model come from `training_metadata.json` where there is one; else the last prompt token.
    With `fN+lM` and two interventions per layer the first acts on the first N, the second on the last M tokens.

    Raises:
        FormatError: an unknown class or component, missing weights, wrong shapes, or a file that is not plain tensors.
    """
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        keys = list(map(str, config["sorted_keys"]))
        classes = dict(zip(_configured_keys(config), config["intervention_types"], strict=True))
        if not keys or set(keys) != set(classes):
            raise ValueError(f"sorted_keys {keys} are not those of the representations, {list(classes)}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FormatError(f"{path}: config.json is not pyreft's ({type(error).__name__}: {error})") from error
    facts = _metadata(path)
    positions = as_positions(facts["positions"]) if facts.get("positions") else LAST
    interventions: dict[int, tuple[Intervention, ...]] = {}
    kinds = set()
    for key in keys:
        match = KEY.fullmatch(key)
        if not match:
            raise FormatError(f"{path}: intervention {key!r}; only block outputs at positions can be read")
        file = path / f"intkey_{key}.bin"
        if not file.is_file():
            raise FormatError(f"{path}: the config names {file.name}, which is missing; copy the whole directory")
        tensors = load_tensors(file)
        kind = _kind(str(classes[key]), tensors, file)
        kinds.add(kind)
        made = _construct(kind, tensors, file)
        own = positions
        if positions.first and positions.last and sum(k.startswith(f"layer_{match[1]}_") for k in keys) == 2:
            own = Positions(first=positions.first) if match[2] == "0" else Positions(last=positions.last)
        layer = int(match[1])
        interventions[layer] = (*interventions.get(layer, ()), *(replace(one, positions=own) for one in made))
    d_model = next(iter(interventions.values()))[0].d_model
    stated = {d for d in config.get("intervention_dimensions") or [] if d}
    if stated - {d_model}:
        raise FormatError(f"{path}: the config says width {sorted(stated)}, the weights have {d_model}")
    provenance = {"made_by": "import", "format": "pyreft", "kinds": sorted(kinds), "metadata": facts}
    return Adapter(
        interventions, ModelRef(id=str(facts.get("model_name") or ""), d_model=d_model), path.name, provenance
    )


def _configured_keys(config: dict[str, Any]) -> list[str]:
    """Return the keys in the order of the representations, which is that of the classes but not of `sorted_keys`."""
    seen: Counter[str] = Counter()
    keys = []
    for layer, component, unit, n_units, *_ in config["representations"]:
        stem = f"layer_{layer}_comp_{component}_unit_{unit}_nunit_{n_units}"
        keys.append(f"{stem}#{seen[stem]}")
        seen[stem] += 1
    return keys


def _metadata(path: Path) -> dict[str, Any]:
    file = path / "training_metadata.json"
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise FormatError(f"{file}: not valid JSON ({error})") from error
    return facts if isinstance(facts, dict) else {}


def _kind(name: str, tensors: Any, file: Path) -> str:
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise FormatError(f"{file}: expected a dictionary of tensors")
    if set(tensors) - {"embed_dim", "interchange_dim"} == {"bias"}:
        return "bias"
    cls = name.removesuffix("'>").rpartition(".")[2].lower()
    if cls not in CLASSES:
        raise FormatError(f"{file}: intervention class {name}; known are {', '.join(CLASSES)} and bias-only ones")
    return CLASSES[cls]


def _construct(kind: str, tensors: dict[str, Tensor], file: Path) -> tuple[Intervention, ...]:
    def get(key: str) -> Tensor:
        if key not in tensors:
            raise FormatError(f"{file}: a {kind} needs {key}; the file has {', '.join(tensors)}")
        return tensors[key].float()

    try:
        if kind == "bias":
            vector = get("bias")
            return KINDS["steering_vector"](vector)
        if kind == "loreft":
            return KINDS[kind](get("weight"), get("bias"), get("rotate_layer"))
        if kind in ("consreft", "lobireft"):
            return KINDS[kind](get("learned_source"), _rotation(get))
        if kind == "direft":
            return KINDS[kind](get("learned_source.weight"), get("learned_source.bias"), _rotation(get))
        sources = (get("learned_source.weight"), get("learned_source.bias"), get("proj_layer.weight"))
        if kind == "nodireft":
            return KINDS[kind](*sources)
        # pyreft's add_bias=False leaves the projection's bias out.
        unbiased = "proj_layer.bias" not in tensors
        return KINDS[kind](*sources, torch.zeros_like(sources[1]) if unbiased else get("proj_layer.bias"))
    except (ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file}: the weights of this {kind} do not fit together: {error}") from error


def _rotation(get: Any) -> Tensor:
    """Rebuild R [d, r] from torch's orthogonal parametrisation (Householder vectors below the diagonal, and a base)."""
    original = get("rotate_layer.parametrizations.weight.original")
    base = get("rotate_layer.parametrizations.weight.0.base")
    reflectors = original.tril(diagonal=-1)
    tau = 2.0 / (1.0 + reflectors.square().sum(-2))
    product = torch.linalg.householder_product(reflectors, tau) * original.diagonal().int()
    return base @ product
