"""Behaviours by name: `base`, `base+pirate`, `base+pirate@0.6+list`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple, TypeAlias

from commandv.adapters.outline import require_scale
from commandv.errors import InputError, did_you_mean

BASE = "base"  # the model with nothing attached
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Part(NamedTuple):
    """One adapter of a behaviour, by its name, and the factor on its deltas."""

    adapter: str
    scale: float = 1.0


Behaviour: TypeAlias = tuple[Part, ...]
"""Adapters in the order in which they act; none is the model as it is."""


class UnknownBehaviour(InputError):
    """A model name that names no behaviour served here."""


def parse_behaviour(text: str, known: Collection[str]) -> Behaviour:
    """Read a model name, `base[+ADAPTER[@SCALE]]...`.

    Args:
        text: the name.
        known: names of adapters.
    """
    first, *words = text.split("+")
    if first != BASE:
        raise UnknownBehaviour(f"model {text[:80]!r}: expected {BASE!r} and behaviours, {_listed(first, known)}")
    parts = []
    for word in words:
        name, at, scale = word.partition("@")
        if name not in known:
            raise UnknownBehaviour(f"model {text[:80]!r}: no behaviour {name[:40]!r}, {_listed(name, known)}")
        parts.append(Part(name, _scale(scale, text) if at else 1.0))
    names = [one.adapter for one in parts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"model {text[:80]!r}: {', '.join(twice)} twice; name each behaviour once, with one scale")
    return tuple(parts)


def behaviour_name(behaviour: Behaviour) -> str:
    """Return the model name of a behaviour, as `parse_behaviour` reads it."""
    words = (one.adapter if one.scale == 1 else f"{one.adapter}@{one.scale:g}" for one in behaviour)
    return "+".join([BASE, *words])


def require_names(names: Iterable[str]) -> None:
    """Raise `InputError` unless model names can hold adapters of these names."""
    for name in names:
        if not _NAME.fullmatch(name) or name == BASE:
            raise InputError(
                f"adapter name {name[:80]!r}: expected letters, digits, '.', '_' and '-', at most 64 of them, and not "
                f"{BASE!r}: it becomes part of a model name, {BASE}+NAME@SCALE"
            )


def _scale(text: str, whole: str) -> float:
    try:
        scale = float(text)
        require_scale(scale)
    except ValueError:
        raise InputError(f"model {whole[:80]!r}: scale {text[:40]!r}, expected a number, as in pirate@0.6") from None
    return scale


def _listed(word: str, known: Collection[str]) -> str:
    names = ", ".join([BASE, *(f"{BASE}+{name}" for name in sorted(known)[:20])])
    return f"known: {names}{did_you_mean(word, known, f'{BASE}+')}"
