"""Finished parts of a profile that is being made, kept in the directory that will hold it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from commandv.errors import FormatError
from commandv.storage.directories import PARTS
from commandv.storage.files import file_digest, put, real, storage_errors

log = logging.getLogger(__name__)


def write_part(target: Path, number: int, stamp: str, data: bytes) -> Path:
    """Keep a part and return its file; the directory must be locked, and `stamp` hashes all that decides what is in it.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with storage_errors(target):
        folder = real(target) / PARTS
        folder.mkdir(exist_ok=True)
        file = folder / f"part-{number:05d}-{stamp}-{hashlib.sha256(data).hexdigest()[:12]}.safetensors"
        put(file, data)
        return file


def find_part(target: Path, number: int, stamp: str) -> Path | None:
    """Return the file of a part that was kept, None when there is none or it is damaged."""
    for file in sorted((target / PARTS).glob(f"part-{number:05d}-{stamp}-*.safetensors")):
        if file.stem.rpartition("-")[2] == file_digest(file)[:12]:
            return file
        log.warning("%s is damaged and made again", file)
    return None


def tensor_of(file: Path, name: str) -> Tensor:
    """Return one tensor of a part, mapped for as long as it is in use."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return opened.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise FormatError(f"{file}: gone or damaged ({error}); profile again") from error


def joined(files: Sequence[Path], places: Sequence[Tensor], name: str) -> Tensor:
    """Return the rows that parts hold under a name, [rows, d], each part's at its places; memory holds the result."""
    rows = sum(map(len, places))
    whole: Tensor | None = None
    for file, place in zip(files, places, strict=True):
        part = tensor_of(file, name)
        if whole is None:
            whole = torch.empty(rows, part.shape[1], dtype=part.dtype)
        whole[place] = part
    assert whole is not None
    return whole
