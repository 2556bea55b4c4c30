"""Finished parts of a profile that is being made, kept in the directory that will hold it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from commandv.storage.directories import PARTS
from commandv.storage.files import put, real, storage_errors

log = logging.getLogger(__name__)


def write_part(target: Path, number: int, stamp: str, data: bytes) -> None:
    """Keep a part; the directory must be locked.

    Args:
        target: where the profile will be.
        number: of the part.
        stamp: hash of all that decides what is in it.
        data: what is in it.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with storage_errors(target):
        folder = real(target) / PARTS
        folder.mkdir(exist_ok=True)
        put(folder / f"part-{number:05d}-{stamp}-{hashlib.sha256(data).hexdigest()[:12]}.safetensors", data)


def read_part(target: Path, number: int, stamp: str) -> bytes | None:
    """Return a part that was kept, None when there is none or it is damaged."""
    for file in sorted((target / PARTS).glob(f"part-{number:05d}-{stamp}-*.safetensors")):
        data = file.read_bytes()
        if file.stem.rpartition("-")[2] == hashlib.sha256(data).hexdigest()[:12]:
            return data
        log.warning("%s is damaged and made again", file)
    return None
