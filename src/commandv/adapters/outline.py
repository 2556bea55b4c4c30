"""What can be told of an adapter before its tensors are read and before torch is imported, which takes seconds."""

from __future__ import annotations

import numbers
import os
from pathlib import Path
from typing import NamedTuple, Protocol

from commandv.adapters.shipped import BUILTIN, builtin_path
from commandv.errors import InputError, MismatchError
from commandv.storage.directories import CONFIG, require_whole
from commandv.storage.kinds import ADAPTER
from commandv.storage.reading import read_json

MOST_LAYERS = 9999
LARGEST = 1e16  # beyond this, what a block makes of it overflows float32 when the next one's norm squares it


class Shaped(Protocol):
    """What has a name, the width of the stream it is for, and layers, ascending."""

    @property
    def name(self) -> str:
        """What it does, for people."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream it is for."""

    @property
    def layers(self) -> list[int]:
        """The layers it acts on, ascending."""


class Outline(NamedTuple):
    """What the configuration of an adapter says of its shape."""

    name: str
    d_model: int
    layers: list[int]


def outline_of(source: str) -> Outline | None:
    """Return the outline of a shipped adapter or of a directory of ours; None of what only reading its tensors tells.

    Raises:
        FormatError: a directory of ours that is not whole.
    """
    path = builtin_path(source.removeprefix(BUILTIN)) if source.startswith(BUILTIN) else Path(source)
    if not os.path.isfile(path / CONFIG):
        return None
    config = read_json(path / CONFIG)
    if not isinstance(config, dict) or config.get("format") != ADAPTER.format:
        return None
    require_whole(path, ADAPTER)
    try:
        layers = sorted({int(one["layer"]) for one in config["interventions"]})
        return Outline(str(config["name"]), int(config["model"]["d_model"]), layers) if layers else None
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return None  # what is wrong with it reading it says


def require_scale(scale: float) -> None:
    """Raise `InputError` unless a scale is a finite number of at most `LARGEST` in size."""
    if not isinstance(scale, numbers.Real) or not -LARGEST <= scale <= LARGEST:
        raise InputError(f"scale={scale!r}: expected a finite number of at most {LARGEST:.0e} in size")


def require_shape(adapter: Shaped, d_model: int, n_layers: int, model: str) -> None:
    """Raise `MismatchError` unless an adapter has a model's width and acts on layers that the model has."""
    if adapter.d_model != d_model or adapter.layers[-1] >= n_layers:
        raise MismatchError(
            f"adapter {adapter.name}: width {adapter.d_model}, layers up to {adapter.layers[-1]}; {model} has width "
            f"{d_model} and layers 0 .. {n_layers - 1}. paste() carries an adapter between models"
        )
