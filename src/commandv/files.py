"""Where files go: the cache directory, atomic writes, content hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from commandv.errors import StorageError

CACHE_VARIABLE = "COMMANDV_CACHE"


def cache_dir() -> Path:
    """Return the cache directory: `$COMMANDV_CACHE`, or the platform's cache directory for commandv."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("commandv"))


def digest(*parts: Any) -> str:
    """Hash JSON-serialisable values into 16 hexadecimal characters; equal values give equal hashes."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Hash a file's whole content into 16 hexadecimal characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `target` that replaces it when the block ends without an error.

    A reader sees the old directory or the new one, never a half-written one.

    Raises:
        StorageError: the disk is full or not writable; an earlier `target` is left untouched.
    """
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
    try:
        with storage_errors(target):
            yield temporary
            if target.exists():
                retired = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
                target.rename(retired)
                temporary.rename(target)
                shutil.rmtree(retired)
            else:
                temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write a file; a reader sees the old content or the new, never a part.

    Raises:
        StorageError: the disk is full or not writable; an earlier `target` is left untouched.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, "utf-8")
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn an operating-system error while writing `target` into a `StorageError` that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error}. Free some space or choose another place "
            f"(for cached files: the environment variable {CACHE_VARIABLE}), then run the same command again."
        ) from error
