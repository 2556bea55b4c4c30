"""Finished parts of a transfer, kept by content, so that one that is cut off goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from commandv.evaluation.results import result
from commandv.profiles.profile import Profile
from commandv.storage.directories import CONFIG, Kind, kept
from commandv.storage.files import digest, file_name

M = TypeVar("M", bound=pydantic.BaseModel)
T = TypeVar("T")


class _Places(pydantic.BaseModel):
    """Where profiles are, which the cache keeps by their own content."""

    paths: list[Path]


@dataclass(frozen=True)
class Parts:
    """Parts in one folder; the name of each holds a hash of all that decides it: what all depend on, and its own."""

    folder: Path
    content: dict[str, Any]

    def _place(self, name: str, *more: Any) -> str:
        return f"{file_name(name)}-{digest(self.content, name, *more)}"

    def result(self, kind: type[M], make: Callable[[], M], name: str, *more: Any) -> M:
        """Return figures, made where they are not there."""
        return result(self.folder / f"{self._place(name, *more)}.json", kind, make)

    def has_result(self, name: str, *more: Any) -> bool:
        """Tell whether figures are there."""
        return (self.folder / f"{self._place(name, *more)}.json").exists()

    def directory(
        self, name: str, kind: Kind, read: Callable[[Path], T], save: Callable[[T, Path], Any], make: Callable[[], T]
    ) -> T:
        """Return what a directory of ours holds, made where it is not there."""
        place = self.folder / self._place(name)

        def made() -> T:
            save(make(), place)
            return read(place)

        return kept(place, CONFIG, lambda: read(place), made, kind=kind)

    def has(self, name: str) -> bool:
        """Tell whether a directory is there."""
        return (self.folder / self._place(name) / CONFIG).exists()

    def note(self, profiles: Iterable[Profile]) -> None:
        """Note where the profiles are."""
        self.result(_Places, lambda: _Places(paths=[one.path for one in profiles if one.path]), "profiles")

    def profiled(self) -> bool:
        """Tell whether profiles were made for this transfer, and are still there."""
        if not self.has_result("profiles"):
            return False
        found = self.result(_Places, lambda: _Places(paths=[]), "profiles").paths
        return len(found) > 1 and all(one.exists() for one in found)
