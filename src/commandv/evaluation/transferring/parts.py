"""Finished parts of a transfer, kept by content, so that one that is cut off goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from commandv.adapters.adapter import Adapter
from commandv.adapters.store import read, save
from commandv.evaluation.results import result
from commandv.profiles.profile import Profile
from commandv.storage.directories import CONFIG, kept
from commandv.storage.files import digest, file_name
from commandv.storage.kinds import ADAPTER, DEMONSTRATIONS
from commandv.transfer.distil.demonstrations import (
    Demonstrations,
    load_demonstrations,
    save_demonstrations,
)

M = TypeVar("M", bound=pydantic.BaseModel)


class _Places(pydantic.BaseModel):
    """Where profiles are, which the cache keeps by their own content."""

    paths: list[Path]


@dataclass(frozen=True)
class Parts:
    """Parts in one folder; the name of each holds a hash of all that decides it.

    Attributes:
        folder: where they are.
        content: what all of them depend on.
    """

    folder: Path
    content: dict[str, Any]

    def place(self, name: str, *more: Any) -> Path:
        """Return where a part is or would be."""
        return self.folder / f"{file_name(name)}-{digest(self.content, name, *more)}"

    def result(self, kind: type[M], make: Callable[[], M], name: str, *more: Any) -> M:
        """Return figures, made where they are not there."""
        place = self.place(name, *more)
        return result(place.with_name(f"{place.name}.json"), kind, make)

    def has_result(self, name: str, *more: Any) -> bool:
        """Tell whether figures are there."""
        place = self.place(name, *more)
        return place.with_name(f"{place.name}.json").exists()

    def has(self, name: str) -> bool:
        """Tell whether an adapter or demonstrations are there."""
        return (self.place(name) / CONFIG).exists()

    def adapter(self, make: Callable[[], Adapter], name: str) -> Adapter:
        """Return an adapter, made where it is not there."""
        place = self.place(name)

        def made() -> Adapter:
            save(make(), place)
            return read(place)

        return kept(place, CONFIG, lambda: read(place), made, kind=ADAPTER)

    def demonstrations(self, make: Callable[[], Demonstrations]) -> Demonstrations:
        """Return the donor's demonstrations, made where they are not there."""
        place = self.place("demonstrations")

        def made() -> Demonstrations:
            save_demonstrations(make(), place)
            return load_demonstrations(place)

        return kept(place, CONFIG, lambda: load_demonstrations(place), made, kind=DEMONSTRATIONS)

    def note(self, profiles: Iterable[Profile]) -> None:
        """Note where the profiles are."""
        self.result(_Places, lambda: _Places(paths=[one.path for one in profiles if one.path]), "profiles")

    def profiled(self) -> bool:
        """Tell whether profiles were made for this transfer, and are still there."""
        if not self.has_result("profiles"):
            return False
        found = self.result(_Places, lambda: _Places(paths=[]), "profiles").paths
        return len(found) > 1 and all(one.exists() for one in found)
