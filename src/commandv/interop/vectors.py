"""Steering vectors as people publish them: tensors, lists and dictionaries in `.pt`, `.npy`, `.npz`, `.safetensors`
and `.svec` files.

Layers are counted by one of two conventions, which `layer=` never changes: it always means our layer, the output of
that block, counted from 0.

- `"blocks"` (what is read unless told otherwise): row, key or field l is the output of block l.
- `"hidden-states"`: as transformers counts what it returns, 0 is the embeddings and l + 1 the output of block l. The
  embeddings' vector is left out, because an adapter changes the outputs of blocks.

Names are unambiguous: `blocks.N.hook_resid_post`, `model.layers.N`, `layer_N` are block N, `blocks.N.hook_resid_pre` is
block N - 1, in either convention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.edit import require_numbers
from commandv.adapters.kinds import steering_vector
from commandv.adapters.outline import MOST_LAYERS
from commandv.errors import FormatError, InputError
from commandv.interop.detect import require_convention
from commandv.models.identity import ModelRef
from commandv.positions import EVERYWHERE
from commandv.storage.reading import number_of, read_json
from commandv.storage.tensors import Stored, read_numpy, read_safetensors, read_torch

# TransformerLens' names (of hooks and of its bridge), transformers' modules, and what people make of them.
_NAME = re.compile(
    r"blocks\.(?P<block>\d+)\.hook_(?P<hook>resid_post|resid_pre|out|in)|"
    r"(?:\w+\.)*(?:layers?|h|blocks)[._]?(?P<layer>\d+)"
)
_PLACES = ("layer", "layer_idx", "layer_index", "layer_id", "hook_point", "hook_name", "hookpoint")
_LISTED = ("layers", "layer_ids", "layer_indices", "layer_idxs", "target_layers")
_MODELS = ("base_model", "model_name", "model", "model_id")
# What says how a vector is applied. Only an addition of the vector as it is can be read without knowing the program.
_FACTORS = ("steering_coefficient", "coefficient", "coeff", "coef", "scale", "strength", "multiplier", "alpha")
_ACTIONS = ("action", "mode", "operation", "operator", "intervention")
_ADDED = ("add", "addition", "additive", "steer", "actadd")
_INNER = ("directions", "vectors", "steering_vectors", "layer_activations", "layers")  # mappings of layers to vectors
_LM_EVAL = {"steering_vector", "steering_coefficient", "action", "bias", "head_index"}


def read_vector(path: Path, *, layer: int | None = None, convention: str | None = None) -> Adapter:
    """Read a vector file as a steering adapter that acts on every token.

    It may hold one vector [d_model] or [1, d_model] (whose layer the file's metadata or `layer` says), a stack
    [layers, d_model] or [layers, 1, d_model] or a list (all rows act that are not zero, unless `layer` picks one), or
    vectors by layer: by number, by name (`layer_12`, `model.layers.12`, `blocks.12.hook_resid_post`), or with the
    fields of lm-eval's steered models.

    Args:
        path: the file.
        layer: the layer a single vector acts on; of several, the only layer to take.
        convention: how the file counts layers, see above. Default: `"blocks"`.

    Raises:
        FormatError: none of these, not floating-point or not finite, all zero, or with a statement that it is not
            simply added (a factor, a projection).
        InputError: one vector, and neither the file nor `layer` says at which layer; no vector at `layer`.
    """
    require_convention("vector", convention)
    if layer is not None and not (type(layer) is int and 0 <= layer <= MOST_LAYERS):
        raise InputError(f"layer={layer}: expected 0 .. {MOST_LAYERS}")
    content, facts = _content(path)
    shift = 1 if convention == "hidden-states" else 0
    vectors, is_stack = _vectors(content, facts, path, layer, shift)
    checked = {at: _checked(vector, path) for at, vector in vectors.items() if at >= 0}
    kept = {at: vector for at, vector in checked.items() if vector.any()}
    if not kept:
        raise FormatError(f"{path}: every vector in it is zero, or that of the embeddings; there is nothing to add")
    widths = sorted({len(vector) for vector in kept.values()})
    if len(widths) > 1:
        raise FormatError(f"{path}: vectors of widths {widths}, expected one width")
    model = next((facts[key] for key in _MODELS if isinstance(facts.get(key), str)), "")
    # A stack says how deep its model is; one layer of it may as well be of a stack that begins with the embeddings.
    depth = max(vectors) + 1 if is_stack and layer is None else 0
    provenance = {
        "made_by": "import",
        "format": f"vector {path.suffix}",
        "convention": convention or "blocks",
        "metadata": {key: value for key, value in facts.items() if isinstance(value, (str, int, float, bool, list))},
    }
    made = {at: steering_vector(vector) for at, vector in sorted(kept.items())}
    return Adapter(made, ModelRef(id=model, d_model=widths[0], n_layers=depth), path.stem, provenance).at(EVERYWHERE)


def _content(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return what a file holds, a tensor or a mapping of them, and what it says about them."""
    if path.suffix == ".svec":
        return _directions(read_json(path, most=1 << 28), path)
    if path.suffix in (".npy", ".npz"):
        stored = read_numpy(path)
    else:
        stored = read_safetensors(path) if path.suffix == ".safetensors" else Stored(read_torch(path), {})
    content, facts = stored.content, dict(stored.metadata)
    if not isinstance(content, dict):
        return content, facts
    tensors = {key: value for key, value in content.items() if isinstance(value, (Tensor, dict, list)) and key != ""}
    small = {key: value.item() for key, value in tensors.items() if isinstance(value, Tensor) and value.numel() == 1}
    small = small if len(small) < len(tensors) else {}  # numbers beside a vector, such as its layer
    tensors = {key: value for key, value in tensors.items() if key not in small and _is_vectors(value)}
    return tensors, {**facts, **{str(key): value for key, value in {**content, **small}.items() if key not in tensors}}


def _is_vectors(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, Tensor) or any(isinstance(one, (Tensor, dict)) for one in inner)


def _directions(raw: Any, path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the directions of a file of IBM's activation-steering, which are those of blocks' outputs."""
    if not isinstance(raw, dict) or not isinstance(raw.get("directions"), dict):
        raise FormatError(f"{path}: no directions by layer; expected a file of activation-steering")
    try:
        found = {key: torch.tensor(numbers, dtype=torch.float32) for key, numbers in raw.pop("directions").items()}
    except (ValueError, TypeError, RuntimeError) as error:
        raise FormatError(f"{path}: its directions are not lists of numbers ({error})") from error
    return found, raw


def _vectors(
    content: Any, facts: dict[str, Any], path: Path, layer: int | None, shift: int
) -> tuple[dict[int, Tensor], bool]:
    """Return vectors by our layer, and whether they are the rows of a stack."""
    _require_added(facts, path)
    if isinstance(content, dict) and len(content) == 1:
        key, value = next(iter(content.items()))
        if isinstance(value, dict) and key in _INNER:
            return _vectors(value, facts, path, layer, shift)
        if isinstance(value, (Tensor, list)) and _layer_of(key, shift) is None:  # under whatever name
            content = value
    if isinstance(content, list) and content and all(isinstance(one, Tensor) for one in content):
        if len({tuple(one.shape) for one in content}) > 1:
            raise FormatError(f"{path}: a list of tensors of different shapes, expected one vector per layer")
        content = torch.stack(content)
    if isinstance(content, dict) and content:
        keys = {key: _required_layer(key, shift, path) for key in content}
        if twice := sorted(str(key) for key, at in keys.items() if list(keys.values()).count(at) > 1):
            raise FormatError(f"{path}: {' and '.join(twice)[:80]} are one layer; save the vector that is meant alone")
        return _picked({at: _of_layer(content[key], path) for key, at in keys.items()}, path, layer), False
    if not isinstance(content, Tensor):
        kind = "no tensors" if isinstance(content, dict) else type(content).__name__
        raise FormatError(f"{path}: holds {kind}; expected a vector, a stack of them, or vectors by layer")
    rows = _squeezed(content, path)
    if rows.ndim == 2:
        if named := [key for key in _LISTED if facts.get(key) is not None]:
            raise FormatError(
                f"{path}: {named[0]} = {str(facts[named[0]])[:60]} beside a stack, whose rows are read as layers 0, 1 "
                "...; save the vectors by layer, {layer: vector}"
            )
        return _picked({number - shift: row for number, row in enumerate(rows)}, path, layer), True
    stated = next((found for key in _PLACES if (found := _layer_of(facts.get(key), shift)) is not None), None)
    at = layer if layer is not None else stated
    if at is None:
        said = {key: facts[key] for key in _PLACES if facts.get(key) is not None}
        hint = f"; {said} is no layer" if said else ""
        raise InputError(f"{path}: one vector of width {len(rows)}; say where it acts: layer={hint}")
    return {at: rows}, False


def _picked(vectors: dict[int, Tensor], path: Path, layer: int | None) -> dict[int, Tensor]:
    if layer is None:
        return vectors
    if layer not in vectors:
        raise InputError(f"{path}: no vector at layer {layer}; the layers are {_ranges(vectors)}")
    return {layer: vectors[layer]}


def _ranges(layers: Iterable[int]) -> str:
    ordered = sorted(layers)
    whole = ordered == list(range(ordered[0], ordered[-1] + 1))
    return f"{ordered[0]} .. {ordered[-1]}" if whole else ", ".join(map(str, ordered))


def _of_layer(value: Any, path: Path) -> Tensor:
    """Return one layer's vector, given as such or with the fields of lm-eval's steered models."""
    if isinstance(value, Mapping):
        if "steering_vector" not in value or set(map(str, value)) - _LM_EVAL:
            raise FormatError(
                f"{path}: a layer with the fields {', '.join(map(str, value))[:80]}; expected a vector, or "
                f"{', '.join(sorted(_LM_EVAL))}"
            )
        fixed = {key: value[key] for key in ("bias", "head_index") if value.get(key) is not None}
        if fixed or value.get("action", "add") != "add":
            raise FormatError(f"{path}: {fixed or value.get('action')!r}: not a vector that is added to the stream")
        factor = value.get("steering_coefficient", 1.0)
        factor = factor.item() if isinstance(factor, Tensor) and factor.numel() == 1 else factor
        if not isinstance(factor, (int, float)) or not isinstance(value["steering_vector"], Tensor):
            raise FormatError(f"{path}: expected steering_vector as a tensor and steering_coefficient as a number")
        return _as_vector(value["steering_vector"], path) * factor
    if not isinstance(value, Tensor):
        raise FormatError(f"{path}: a layer holds {type(value).__name__}, expected a vector")
    return _as_vector(value, path)


def _as_vector(value: Tensor, path: Path) -> Tensor:
    rows = _squeezed(value, path)
    if rows.ndim != 1:
        raise FormatError(f"{path}: a layer with shape {tuple(value.shape)}, expected [d_model]")
    return rows


def _squeezed(tensor: Tensor, path: Path) -> Tensor:
    """Return [d_model] or [layers, d_model] for a tensor with axes of length 1 before the last."""
    if not tensor.is_floating_point():
        raise FormatError(f"{path}: holds {tensor.dtype}, expected floating-point numbers")
    shape = tuple(tensor.shape)
    kept = [length for length in shape[:-1] if length != 1]
    if not shape or shape[-1] < 2 or len(kept) > 1 or 0 in kept:
        raise FormatError(f"{path}: got shape {shape}, expected [d_model] or [layers, d_model]")
    return tensor.detach().reshape(*kept, shape[-1])


def _checked(vector: Tensor, path: Path) -> Tensor:
    vector = vector.to(torch.float32, copy=True)
    try:
        require_numbers(vector, "a vector")
    except InputError as error:
        raise FormatError(f"{path}: {error}") from error
    return vector


def _required_layer(key: Any, shift: int, path: Path) -> int:
    at = _layer_of(key, shift)
    if at is None:
        raise FormatError(
            f"{path}: {str(key)[:60]!r} among several tensors names no layer; expected numbers, layer_N, "
            "model.layers.N or blocks.N.hook_resid_post. Save the vector that is meant alone, and say layer="
        )
    return at


def _layer_of(value: Any, shift: int) -> int | None:
    """Return our layer for a number or a name, -1 for the embeddings, None for what is neither."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value - shift if 0 <= value <= MOST_LAYERS else None
    if not isinstance(value, str):
        return None
    number = number_of(value.strip(), most=MOST_LAYERS)
    if number is not None:
        return number - shift
    if not (match := _NAME.fullmatch(value.strip())):
        return None
    number = number_of(match["block"] or match["layer"], most=MOST_LAYERS)
    return None if number is None else number - (match["hook"] in ("resid_pre", "in"))


def _require_added(facts: Mapping[str, Any], path: Path) -> None:
    """Raise `FormatError` where a file says that its vector is not added as it is."""
    for key in _FACTORS:
        if facts.get(key) not in (None, "", 1, "1", "1.0"):
            raise FormatError(
                f"{path}: says {key} = {str(facts[key])[:40]!r}, and not whether the vector holds this factor already; "
                "save the vector as it is to be added, without the factor, or scale the adapter yourself"
            )
    for key in _ACTIONS:
        if facts.get(key) is not None and str(facts[key]).lower() not in _ADDED:
            raise FormatError(f"{path}: says {key} = {str(facts[key])[:40]!r}; only vectors that are added can be read")
