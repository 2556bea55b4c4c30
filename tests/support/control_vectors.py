"""Steering vectors to export, and control vectors in files written as other programs write them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

import commandv as cv
import tiny
from commandv.adapters.adapter import Adapter
from commandv.models.identity import ModelRef
from commandv.positions import EVERYWHERE

D = tiny.D


def steering(*layers: int, d: int = D, **fields) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    made = {layer: cv.steering_vector(torch.randn(d, generator=generator)) for layer in layers}
    return Adapter(made, ModelRef(d_model=d, **fields), "push").at(EVERYWHERE)


def write(path: Path, tensors: dict[str, np.ndarray], *, arch: str = "controlvector", **changes) -> Path:
    """Write a GGUF file as llama.cpp's generator and repeng do; a key that is None is left out."""
    writer = gguf.GGUFWriter(path, arch)
    keys = {"model_hint": "llama", "layer_count": len(tensors), **changes}
    for name, value in keys.items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"controlvector.{name}", value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def directions(*numbers: int, d: int = D) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"direction.{number}": rng.standard_normal(d).astype(np.float32) for number in numbers}
