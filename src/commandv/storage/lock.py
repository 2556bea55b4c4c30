"""Keeping other writers out of a directory."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from commandv.storage.files import LOCK, exclusive, real


@contextlib.contextmanager
def locked(target: Path, *, wait: bool = True) -> Iterator[Path]:
    """Make a directory, keep other writers out of it, and yield its real path; it is removed if it stays empty.

    The same thread may lock it again.

    Raises:
        InputError: not to `wait`, and another process is writing there.
        StorageError: the directory cannot be made or written.
    """
    place = real(target)
    was_there = place.is_dir()
    try:
        with exclusive(place / LOCK, wait=wait):
            yield place
    finally:
        if not was_there:
            with contextlib.suppress(OSError):  # only an empty directory can be removed
                place.rmdir()


def require_writable(place: Path) -> None:
    """Raise `OSError` where a directory cannot be made."""
    folder = next(one for one in place.parents if one.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
