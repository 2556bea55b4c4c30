"""Choices of a model's layers."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable

from commandv.arguments import checked
from commandv.errors import InputError

LayerChoice = Callable[[int], list[int]] | str | Iterable[int]  # see `choose_layers`


@checked
def all_layers(n_layers: int) -> list[int]:
    """Every layer."""
    return list(range(n_layers))


@checked
def last_third(n_layers: int) -> list[int]:
    """The last third of the layers, where pasted adapters compound least."""
    return list(range(n_layers - max(1, n_layers // 3), n_layers))


@checked
def last_half(n_layers: int) -> list[int]:
    """The last half of the layers."""
    return list(range(n_layers - max(1, n_layers // 2), n_layers))


@checked
def middle_third(n_layers: int) -> list[int]:
    """The middle third of the layers."""
    return list(range(n_layers // 3, n_layers - n_layers // 3))


@checked
def every_other(n_layers: int) -> list[int]:
    """Layers 0, 2, 4, ...: where the paper trains its adapters."""
    return list(range(0, n_layers, 2))


AUTO_LAYERS = "auto"  # what pasting makes of it: see `Link.layer_pairs`

LAYER_CHOICES: dict[str, Callable[[int], list[int]]] = {
    "all_layers": all_layers,
    "last_third": last_third,
    "last_half": last_half,
    "middle_third": middle_third,
    "every_other": every_other,
}


def choose_layers(choice: LayerChoice, n_layers: int) -> list[int]:
    """Return the layers that a choice names: a function, a name in `LAYER_CHOICES`, or the layers themselves.

    A choice in words may also be numbers, `"4,8,12"`, or a depth, `"60%"`: the one layer that ends there or beyond.
    """
    if isinstance(choice, str):
        choice = LAYER_CHOICES[choice] if choice in LAYER_CHOICES else _in_words(choice, n_layers)
    found = choice(n_layers) if callable(choice) else choice
    try:
        chosen = [operator.index(layer) for layer in found]
        if any(isinstance(layer, bool) for layer in found):
            raise TypeError
    except TypeError:
        names = ", ".join(LAYER_CHOICES)
        raise InputError(f"layers {str(found)[:60]}: expected whole numbers, or one of {names}") from None
    outside = [layer for layer in chosen if not 0 <= layer < n_layers]
    if outside or not chosen:
        raise InputError(f"layers {outside or chosen}: expected some among 0 .. {n_layers - 1}")
    return sorted(set(chosen))


def _in_words(choice: str, n_layers: int) -> list[int]:
    """Return the layers of `"4,8,12"` or `"60%"`."""
    if depth := re.fullmatch(r"([0-9]{1,2}|100)%", choice):
        return [min(n_layers - 1, n_layers * int(depth[1]) // 100)]
    parts = [part.strip() for part in choice.split(",")]
    if not all(re.fullmatch(r"-?[0-9]{1,7}", part) for part in parts):
        raise InputError(
            f"layers {choice[:60]!r}: expected layer numbers like '4,8,12', a depth like '60%' or one of "
            f"{', '.join(LAYER_CHOICES)}"
        )
    return list(map(int, parts))
