"""Where a model can go."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import Any

from commandv.errors import InputError, did_you_mean

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that transformers makes
_DEVICES = ("cpu", "cuda", "mps", "xpu", "npu", "hpu", "mtia", "xla", "meta")  # that PyTorch knows


def require_device(device_map: Any) -> None:
    """Raise `InputError` unless transformers can put a model there."""
    if device_map is None or not isinstance(device_map, str) or device_map in (*_SPREAD, "cpu"):
        return
    named = re.fullmatch(r"([a-z]+)(?::([0-9]{1,3}))?", device_map)
    if not named or named[1] not in _DEVICES:
        near = did_you_mean(device_map, (*_SPREAD, "cuda", "mps"))
        raise InputError(f"device_map={device_map!r}{near}: expected {', '.join(_SPREAD)}, cpu, cuda, cuda:1 or mps")
    if named[1] in ("cuda", "mps") and int(named[2] or 0) >= (here := _count(named[1])):
        raise InputError(
            f"device_map={device_map!r}: PyTorch sees {here or 'no'} such device{'s' if here > 1 else ''} here; leave "
            "it out for the CPU"
        )


def _count(kind: str) -> int:
    """Return how many devices of a kind there are, without importing torch where its build or the system has none."""
    if sys.platform != "darwin" if kind == "mps" else importlib.metadata.version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count() if kind == "cuda" else int(torch.backends.mps.is_available())
