"""How files of a kind count layers, for those that do not say it."""

from __future__ import annotations

from typing import Literal, get_args

from commandv.errors import InputError

LayerConvention = Literal["blocks", "hidden-states"]
Convention = Literal["llama.cpp", "from-zero"]
# How files of a kind may count layers; those of the others say it.
CONVENTIONS: dict[str, tuple[str, ...]] = {"vector": get_args(LayerConvention), "control-vector": get_args(Convention)}


def require_convention(kind: str, convention: str | None) -> None:
    """Raise `InputError` for a convention of counting layers that files of a kind, where they have any, do not have."""
    known = CONVENTIONS.get(kind)
    if convention is not None and known is not None and convention not in known:
        raise InputError(f"convention={convention!r}: expected {' or '.join(map(repr, known))}")
