"""Reading third-party `.bin` / `.pt` files without ever running what they may contain."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import torch

from commandv.errors import FormatError

# What torch's restricted unpickler raises on damaged bytes, beside UnpicklingError.
_DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AssertionError,
    AttributeError,
    TypeError,
    struct.error,
)


def refuse_pointer(path: Path) -> None:
    """Raise `FormatError` for a missing or empty file, or a git-LFS pointer standing in for it."""
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise FormatError(f"{path}: the file is empty; copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise FormatError(f"{path}: a git-LFS pointer, not the file itself; run `git lfs pull` where it came from")


def load_tensors(path: Path) -> Any:
    """Load a torch file that holds plain tensors, numbers and text only.

    Raises:
        FormatError: it holds other Python objects (refused, they could run code), or is damaged.
    """
    refuse_pointer(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = _first_line(error)
        raise FormatError(
            f"{path}: holds more than plain tensors, and loading it could run code, so it is refused ({reason}). "
            "Ask its author for a safetensors file"
        ) from error
    except _DAMAGED as error:
        raise FormatError(f"{path}: truncated or not a torch file ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
