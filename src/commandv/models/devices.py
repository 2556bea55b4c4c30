"""Where a model can go."""

from __future__ import annotations

from typing import Any

from commandv.errors import InputError

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that transformers makes


def require_device(device_map: Any) -> None:
    """Raise `InputError` unless transformers can put a model there."""
    if device_map is None or not isinstance(device_map, str) or device_map in (*_SPREAD, "cpu"):
        return
    import torch

    try:
        device = torch.device(device_map)
    except RuntimeError:
        raise InputError(
            f"device_map={device_map!r}: expected {', '.join(_SPREAD)}, cpu, cuda, cuda:1 or mps"
        ) from None
    here = torch.cuda.device_count() if device.type == "cuda" else int(torch.backends.mps.is_available())
    if device.type in ("cuda", "mps") and (device.index or 0) >= here:
        raise InputError(
            f"device_map={device_map!r}: PyTorch sees {here or 'no'} such device{'s' if here > 1 else ''} here; leave "
            "it out for the CPU"
        )
