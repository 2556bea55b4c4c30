"""Bare steering vectors: `.pt`, `.npy` and `.safetensors` files of [d_model] or [layers, d_model]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.kinds import steering_vector
from commandv.errors import FormatError, InputError
from commandv.interop.pickles import load_tensors, refuse_pointer
from commandv.models.identity import ModelRef
from commandv.positions import EVERYWHERE

SUFFIXES = {".pt", ".pth", ".bin", ".npy", ".safetensors"}


def read_vector(path: Path, *, layer: int | None = None) -> Adapter:
    """Read a vector file as a steering adapter that acts on every token.

    A stack [layers, d_model] acts on all its layers, row l at layer l, unless `layer` picks one. A file that holds
    one tensor among plain metadata takes its layer and base model from there.

    Raises:
        FormatError: not a vector, more than one tensor, not finite, or not plain tensors.
        InputError: one vector, and neither the file nor `layer` says at which layer.
    """
    tensor, facts = _tensor(path)
    if not torch.isfinite(tensor).all():
        raise FormatError(f"{path}: holds NaN or infinity")
    if tensor.ndim not in (1, 2) or tensor.numel() < 2:
        raise FormatError(f"{path}: got shape {tuple(tensor.shape)}, expected [d_model] or [layers, d_model]")
    tensor = tensor.float()
    n_layers = len(tensor) if tensor.ndim == 2 else 0
    layer = facts.get("layer") if layer is None else layer
    if tensor.ndim == 1:
        if not isinstance(layer, int):
            raise InputError(f"{path}: one vector of width {len(tensor)}; say where it acts: layer=")
        vectors = {layer: tensor}
    elif layer is not None:
        if not 0 <= layer < n_layers:
            raise InputError(f"{path}: layer {layer} is outside the stack's 0 .. {n_layers - 1}")
        vectors = {layer: tensor[layer]}
    else:
        vectors = {number: row for number, row in enumerate(tensor) if row.any()}
    ref = ModelRef(id=str(facts.get("base_model", "")), d_model=tensor.shape[-1], n_layers=n_layers)
    provenance = {"made_by": "import", "format": f"vector {path.suffix}", "metadata": facts}
    made = {at: steering_vector(vector) for at, vector in vectors.items()}
    return Adapter(made, ref, path.stem, provenance).at(EVERYWHERE)


def _tensor(path: Path) -> tuple[Tensor, dict[str, Any]]:
    if path.suffix == ".npy":
        refuse_pointer(path)
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise FormatError(f"{path}: not a plain NumPy array ({error}); pickled arrays are refused") from error
        if not isinstance(array, np.ndarray):
            raise FormatError(f"{path}: an archive of several arrays, expected one array")
        if array.dtype.kind != "f":
            raise FormatError(f"{path}: holds {array.dtype}, expected floating-point numbers")
        return torch.from_numpy(array.astype(np.float32)), {}
    if path.suffix == ".safetensors":
        refuse_pointer(path)
        try:
            loaded: Any = load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise FormatError(f"{path}: truncated or not safetensors ({error})") from error
    else:
        loaded = load_tensors(path)
    if isinstance(loaded, Tensor):
        return loaded, {}
    if isinstance(loaded, dict):
        tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
        if len(tensors) == 1:
            facts = {
                str(key): value for key, value in loaded.items() if isinstance(value, (str, int, float, bool, list))
            }
            return next(iter(tensors.values())), facts
        raise FormatError(f"{path}: holds {len(tensors)} tensors ({', '.join(map(str, tensors))}), expected one vector")
    raise FormatError(f"{path}: holds {type(loaded).__name__}, expected one tensor")
