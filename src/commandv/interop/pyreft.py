"""pyreft directories: `config.json` and one `intkey_layer_N_comp_block_output_unit_pos_nunit_1#K.bin` per intervention.

Read and written without pyreft. The layer is taken from each file's key, not from the order of the config.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commandv.adapters.adapter import ACTIVATIONS, Adapter, Intervention, low_rank
from commandv.adapters.kinds import KINDS, Kind, Part, steering_vector
from commandv.errors import FormatError, InputError
from commandv.models.identity import ModelRef
from commandv.positions import LAST, Positions, as_positions
from commandv.storage.directories import CONFIG
from commandv.storage.foreign import new_directory
from commandv.storage.reading import number_of, read_json
from commandv.storage.tensors import read_torch

KEY = re.compile(r"layer_(\d+)_comp_block_output_unit_pos_nunit_1#(\d+)")
# What follows a representation's layer, component, unit, number of units and rank: parts of the stream, groups, links,
# mixtures, other sources. Each changes what an intervention does.
_PLAIN = 5
_FACTS = "training_metadata.json"
# In files beside a kind's own parts; a NodiReFT has the projection's bias, which pyreft never uses.
_INERT = ("embed_dim", "interchange_dim", "proj_layer.bias")
CLASSES = {f"{name}intervention": kind for name, kind in KINDS.items()}


def read_pyreft(path: Path) -> Adapter:
    """Read a pyreft directory of any of the six ReFT kinds, or of bias-only interventions.

    Positions and the base model come from `training_metadata.json` where there is one; else the last prompt token.
    With `fN+lM` and two interventions per layer the first acts on the first N, the second on the last M tokens.

    Raises:
        FormatError: an unknown class or component, missing weights, wrong shapes, or a file that is not plain tensors.
    """
    try:
        config = read_json(path / "config.json")
        keys = list(map(str, config["sorted_keys"]))
        classes = dict(zip(_configured_keys(config), config["intervention_types"], strict=True))
        if any(value is not None for row in config["representations"] for value in row[_PLAIN:]):
            raise ValueError("a representation with more than layer, component, unit and rank; it would be lost")
        if config.get("mode", "parallel") != "parallel":
            raise ValueError(f"mode {config['mode']!r}, expected 'parallel'")
        if not keys or set(keys) != set(classes):
            raise ValueError(f"sorted_keys {keys} are not those of the representations, {list(classes)}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path}: config.json is not pyreft's ({type(error).__name__}: {error})") from error
    facts = _metadata(path)
    positions = as_positions(str(facts["positions"])) if facts.get("positions") else LAST
    activation = facts.get("act_fn") or "linear"  # pyreft's own default is none
    if activation not in ACTIVATIONS:
        raise FormatError(f"{path}: act_fn {activation!r} in {_FACTS}; known are {', '.join(ACTIVATIONS)}")
    interventions: dict[int, tuple[Intervention, ...]] = {}
    kinds = set()
    for key in keys:
        match = KEY.fullmatch(key)
        if not match:
            raise FormatError(f"{path}: intervention {key!r}; only block outputs at positions can be read")
        file = path / f"intkey_{key}.bin"
        if not os.path.isfile(file):
            raise FormatError(f"{path}: the config names {file.name}, which is missing; copy the whole directory")
        tensors = read_torch(file)
        kind = _kind(str(classes[key]), tensors, file)
        kinds.add(kind.name if kind else "bias")
        made = _construct(kind, tensors, activation, file)
        own = positions
        if positions.first and positions.last and sum(k.startswith(f"layer_{match[1]}_") for k in keys) == 2:
            own = Positions(first=positions.first) if match[2] == "0" else Positions(last=positions.last)
        layer = number_of(match[1], most=9999)
        if layer is None:
            raise FormatError(f"{path}: intervention {key[:80]!r}; no model has such a layer")
        interventions[layer] = (*interventions.get(layer, ()), *(replace(one, positions=own) for one in made))
    d_model = next(iter(interventions.values()))[0].d_model
    stated = config.get("intervention_dimensions") or []
    if not isinstance(stated, list) or any(one not in (None, d_model) for one in stated):
        raise FormatError(f"{path}: the config says width {str(stated)[:80]}, the weights have {d_model}")
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
    file = path / _FACTS
    if not os.path.isfile(file):
        return {}
    facts = read_json(file)
    if not isinstance(facts, dict):
        raise FormatError(f"{file}: holds {type(facts).__name__}, expected an object")
    return facts


def _kind(name: str, tensors: Any, file: Path) -> Kind | None:
    """Return the kind of a class, None for bias-only interventions, whose class is the user's own."""
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise FormatError(f"{file}: expected a dictionary of tensors")
    if set(tensors) - {"embed_dim", "interchange_dim"} == {"bias"}:
        return None
    cls = name.removesuffix("'>").rpartition(".")[2].lower()
    if cls not in CLASSES:
        raise FormatError(f"{file}: intervention class {name}; known are {', '.join(CLASSES)} and bias-only ones")
    return CLASSES[cls]


def _construct(kind: Kind | None, tensors: dict[str, Tensor], activation: str, file: Path) -> tuple[Intervention, ...]:
    name = kind.name if kind else "bias-only intervention"
    for key, value in tensors.items():
        if key not in _INERT and not value.is_floating_point():
            raise FormatError(f"{file}: {str(key)[:60]} holds {value.dtype}, expected floating-point numbers")
    try:
        if kind is None:
            return steering_vector(tensors["bias"].float())
        found = {part: _read(tensors, row) for part, row in kind.parts.items()}
        missing = [kind.parts[part].pyreft for part, value in found.items() if value is None]
        if missing:
            raise FormatError(
                f"{file}: a {name} needs {', '.join(missing)}; the file has {', '.join(map(str, tensors))}"
            )
        heads = [part.pyreft for part in kind.parts.values()]
        rotations = [f"{head}.parametrizations.weight.{rest}" for head in heads for rest in ("original", "0.base")]
        if odd := [str(key)[:60] for key in tensors if key not in (*heads, *rotations, *_INERT)]:
            raise FormatError(f"{file}: {', '.join(odd[:4])}: not a part of a {name}, and would be lost")
        return kind.construct({part: value for part, value in found.items() if value is not None}, activation)
    except (ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file}: the weights of this {name} do not fit together: {error}") from error


def _read(tensors: dict[str, Tensor], part: Part) -> Tensor | None:
    """Return one part of a kind in float32, or None where the file lacks it."""
    if f"{part.pyreft}.parametrizations.weight.original" in tensors:
        return _rotation(tensors, part.pyreft)
    if part.pyreft in tensors:
        return tensors[part.pyreft].float()
    if part.optional:
        return torch.zeros_like(tensors["learned_source.bias"]).float() if "learned_source.bias" in tensors else None
    return None


def _rotation(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Rebuild R [d, r] from torch's orthogonal parametrisation (Householder vectors below the diagonal, and a base)."""
    head = f"{name}.parametrizations.weight"
    original, base = tensors[f"{head}.original"].float(), tensors.get(f"{head}.0.base")
    if base is None:
        raise ValueError(f"{head}.0.base is missing")
    reflectors = original.tril(diagonal=-1)
    tau = 2.0 / (1.0 + reflectors.square().sum(-2))
    product = torch.linalg.householder_product(reflectors, tau) * original.diagonal().int()
    return base.float() @ product


# -- writing ----------------------------------------------------------------------------------------------------------


def write_pyreft(adapter: Adapter, path: str | Path) -> Path:
    """Write an adapter as a directory that pyreft's `ReftModel.load` opens.

    Whatever it was made as, each layer becomes one DiReFT intervention, the one kind that holds every linear read,
    bias and write, that pyreft 0.1.0 can load again, and that runs in any dtype: with Wᵀ = Q T (QR decomposition, Q
    [d_model, rank] with orthonormal columns), (h Rᵀ + b) W = (h (T R)ᵀ + (T b)ᵀ) Qᵀ. Its rotation takes d_model²
    numbers a layer in pyreft's own files. pyreft keeps positions nowhere: they are in `training_metadata.json`, and are
    given to each call as unit locations.

    Args:
        adapter: linear interventions on prompt tokens, at the same positions everywhere.
        path: absent or empty directory.

    Raises:
        InputError: the format cannot hold this adapter; the message says why.
        FormatError: `path` holds something.
        StorageError: not writable or disk full.
    """
    path = Path(path)
    layers = {layer: _joined(adapter, layer) for layer in adapter.layers}
    (positions,) = adapter.positions
    with new_directory(path, CONFIG) as folder:
        for layer, one in layers.items():
            torch.save(_direft(one), folder / f"intkey_{_key(layer)}.bin")
        config = {
            "intervention_constant_sources": [True] * len(layers),
            "intervention_dimensions": [adapter.d_model] * len(layers),
            "intervention_types": ["<class 'pyreft.interventions.DireftIntervention'>"] * len(layers),
            "mode": "parallel",
            "representations": [
                [layer, "block_output", "pos", 1, _rank(one), *[None] * 9] for layer, one in layers.items()
            ],
            "sorted_keys": [_key(layer) for layer in layers],
        }
        facts = {"model_name": adapter.model.id, "positions": str(positions), "act_fn": None}
        (folder / CONFIG).write_text(json.dumps(config, indent=2), "utf-8")
        (folder / _FACTS).write_text(json.dumps(facts, indent=2), "utf-8")
    return path


def _key(layer: int) -> str:
    return f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0"


def _joined(adapter: Adapter, layer: int) -> Intervention:
    """Return a layer's interventions as one."""
    what = f"{adapter.name} cannot be a pyreft directory: on layer {layer} it"
    first, *others = (low_rank(one, "a pyreft directory") for one in adapter.interventions[layer])
    for one in (first, *others):
        if one.activation != "linear":
            raise InputError(f"{what} has the activation {one.activation}, which pyreft's files do not record")
        if not one.positions.prefill_only:
            raise InputError(f"{what} acts at positions {one.positions}; pyreft acts on prompt tokens only")
    if len(adapter.positions) > 1:
        many = ", ".join(sorted(map(str, adapter.positions)))
        raise InputError(f"{adapter.name} cannot be a pyreft directory: it acts at several positions ({many})")
    return first.joined(others)


def _rank(one: Intervention) -> int:
    return min(one.rank, one.d_model)


def _direft(one: Intervention) -> OrderedDict[str, Tensor]:
    """Return the state of a DiReFT that adds what a linear intervention adds."""
    read, bias, write = (value.detach().double().cpu() for value in (one.read, one.bias, one.write))
    base, triangle = torch.linalg.qr(write.T, mode="complete")  # Wᵀ = Q T
    rank = _rank(one)
    mix = triangle[:rank]  # [rank of Q, rank]
    # Torch's parametrisation takes base @ (product of reflections); without reflectors that product is -I, and so are
    # the signs on the diagonal.
    original = torch.zeros(one.d_model, rank, dtype=torch.float64)
    original.fill_diagonal_(-1.0)
    width = torch.tensor(one.d_model)
    return OrderedDict(
        {
            "embed_dim": width,
            "interchange_dim": width.clone(),
            "rotate_layer.parametrizations.weight.original": original.float(),
            "rotate_layer.parametrizations.weight.0.base": base.float().contiguous(),
            "learned_source.weight": (mix @ read).float().contiguous(),
            "learned_source.bias": (mix @ bias).float().contiguous(),
        }
    )
