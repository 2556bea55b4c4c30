"""Identities of models' weights, from samples of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from commandv.files import digest


def directory_fingerprint(directory: Path) -> str:
    """Hash a model directory: its configuration and, per weight file, size, header and evenly spaced samples."""
    parts: list[Any] = []
    for path in sorted(directory.glob("*.json")):
        if path.name in ("config.json", "tokenizer.json"):
            parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        size = path.stat().st_size
        sampled = hashlib.sha256()
        with path.open("rb") as file:
            for start in range(0, size, max(1 << 16, size // 64)):
                file.seek(start)
                sampled.update(file.read(1 << 16))
        parts.append((path.name, size, sampled.hexdigest()))
    return digest(parts)


def weights_fingerprint(model: nn.Module) -> str:
    """Hash samples of every parameter of a model in memory."""
    sampled = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        sampled.update(name.encode() + values.numpy().tobytes())
    return sampled.hexdigest()[:16]
