"""Directories of other projects' formats: filled beside their place, and put there whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from commandv.errors import FormatError
from commandv.storage.files import LOCK, locked, put, real, require_writable, storage_errors, sync

BUILD, MOVING = ".commandv.build", ".commandv.moving"


def require_new(target: Path, last: str) -> None:
    """Raise `FormatError` unless `target` is absent, empty, or what a killed `new_directory` left."""
    with storage_errors(target):
        if not os.path.lexists(target) or not (place := real(target)).exists():
            require_writable(real(target))
            return
        names = set(os.listdir(place)) - {LOCK, BUILD, MOVING, *_moved(place, last)} if place.is_dir() else {"a file"}
        if names:
            raise FormatError(
                f"{target}: holds {', '.join(sorted(names)[:4])}; expected an empty directory or nothing; "
                "choose another place"
            )


@contextlib.contextmanager
def new_directory(target: Path, last: str) -> Iterator[Path]:
    """Yield a directory to fill, whose files go to `target` when the block ends without an error.

    For files that another library writes under names of its own: they cannot be replaced all at once, so an earlier
    directory never is.

    Args:
        target: absent or empty.
        last: the file without which nobody takes the directory for whole; it is put in place after the others.

    Raises:
        FormatError: `target` holds something.
        StorageError: the disk is full or not writable.
    """
    require_new(target, last)
    with storage_errors(target), locked(target) as place:
        require_new(target, last)
        undo(place, last)
        build = place / BUILD
        build.mkdir()
        try:
            yield build
            for file in build.rglob("*"):
                sync(file)
            names = sorted(os.listdir(build), key=lambda name: (name == last, name))
            put(build / MOVING, json.dumps(names).encode())  # a kill while it is written leaves nothing beside it
            os.replace(build / MOVING, place / MOVING)
            for name in names:
                os.replace(build / name, place / name)
            sync(place)
        finally:
            undo(place, last)


def _moved(place: Path, last: str) -> list[str]:
    """Return the names that a killed `new_directory` was putting in place."""
    if (place / last).exists() or not (place / MOVING).is_file():
        return []
    try:
        names = json.loads((place / MOVING).read_bytes())
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str) and os.path.basename(name) == name and name.strip(".")]


def undo(place: Path, last: str) -> None:
    """Remove what a killed `new_directory` left."""
    for name in (*_moved(place, last), BUILD):
        one = place / name
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one)
        else:
            one.unlink(missing_ok=True)
    (place / MOVING).unlink(missing_ok=True)
