"""Where files go, and how one is written: beside its place, and put there by one `os.replace`."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import stat
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from commandv.errors import FormatError, InputError, StorageError

CACHE_VARIABLE = "COMMANDV_CACHE"
LOCK = ".commandv.lock"  # while a directory is written it lies in it; a file's is named after the file
TRIES = 100  # of what fails only because another process writes the same place at the same moment
_held = threading.local()

log = logging.getLogger(__name__)


# -- names ------------------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Return the cache directory: `$COMMANDV_CACHE`, or the platform's cache directory for commandv."""
    override = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("commandv"))
    except RuntimeError as error:
        raise InputError(f"{CACHE_VARIABLE}={override!r}: no such user; name a directory") from error


def digest(*parts: Any) -> str:
    """Hash JSON-serialisable values into 16 hexadecimal characters; equal values give equal hashes."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Hash a file's whole content into 16 hexadecimal characters."""
    return sha256_of(path)[:16]


def file_name(text: str) -> str:
    """Return a text as part of a file name: what is no letter, digit, `.`, `_`, `+`, `@` or `-` becomes `-`."""
    return re.sub(r"[^A-Za-z0-9._+@-]", "-", text).lstrip(".")[:80] or "unnamed"


# -- single files -----------------------------------------------------------------------------------------------------


def require_file(target: Path) -> None:
    """Raise `FormatError` where a file cannot be written because something that is no file is in the way."""
    with storage_errors(target):
        place = real(target)
        if place.exists() and not place.is_file():
            what = "a directory" if place.is_dir() else "not a regular file"
            raise FormatError(f"{target}: {what}, expected a file or nothing; choose another place")


@contextlib.contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yield the path of a temporary file beside `target` that replaces it when the block ends without an error.

    A reader sees the old file or the new one. Of two writers the last wins; what a killed one left is removed.

    Raises:
        StorageError: the disk is full or not writable; an earlier `target` is left untouched.
        FormatError: `target` is no regular file.
    """
    require_file(target)
    with storage_errors(target):
        place = real(target)
        with _alone(place) as stem:
            temporary = _temporary(place.with_name(stem))
            try:
                yield temporary
                sync(temporary)
                os.replace(temporary, place)
                sync(place.parent)
            finally:
                temporary.unlink(missing_ok=True)


def tidy(target: Path) -> None:
    """Remove what a killed writer of a file has left; raises as `writing` does."""
    with storage_errors(target):
        place = real(target)
        if any(place.parent.glob(f".{glob.escape(_stem(place))}.*")):
            with _alone(place):
                pass


def remove(target: Path) -> None:
    """Remove a file and what a killed writer of it has left; raises as `writing` does."""
    with storage_errors(target):
        place = real(target)
        with _alone(place):
            place.unlink(missing_ok=True)


def _stem(place: Path) -> str:
    """Return what the names of the files beside one begin with: the system's limit for a name is 255 bytes."""
    return place.name if len(place.name.encode()) < 200 else digest(place.name)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[str]:
    """Keep other writers of a file out and remove what killed ones have left."""
    stem = _stem(place)
    with exclusive(place.with_name(f".{stem}{LOCK}")):
        for left in place.parent.glob(f".{glob.escape(stem)}.*.tmp"):
            if is_temporary(left.name, re.escape(stem)):
                left.unlink(missing_ok=True)
        yield stem


def write_bytes(target: Path, data: bytes) -> None:
    """Write a file; a reader sees the old content or the new, never a part. Raises as `writing` does."""
    with writing(target) as temporary:
        temporary.write_bytes(data)


def write_text(target: Path, text: str) -> None:
    """Write a file; a reader sees the old content or the new, never a part. Raises as `writing` does."""
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{target}: its text holds half of a surrogate pair at character {error.start}, which no file can hold"
        ) from error
    write_bytes(target, data)


# -- underneath -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file; it is removed afterwards, which those who wait for it notice."""
    held: set[Path] = _held.__dict__.setdefault("files", set())
    if file in held:
        yield
        return
    lock, patience = filelock.FileLock(file), 1 if wait else 0  # seconds before it is said that this waits
    with storage_errors(file.parent):
        if os.path.lexists(file) and (not stat.S_ISREG((facts := file.lstat()).st_mode) or facts.st_size):
            raise FormatError(f"{file}: not a lock of commandv, so it is left alone; move it away")
        for left in range(TRIES, 0, -1):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=patience)
                break
            except filelock.Timeout:
                if not wait:
                    raise InputError(
                        f"{file.parent}: another process is writing there; wait for it, or choose another directory"
                    ) from None
                log.info("%s: another process is writing there; waiting for it", file.parent)
                patience = -1
            except FileNotFoundError:  # another process has removed the empty directory
                if left == 1:
                    raise
    held.add(file)
    try:
        yield
    finally:
        held.discard(file)
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def locked(target: Path, *, wait: bool = True) -> Iterator[Path]:
    """Make a directory, keep other writers out of it, and yield its real path; it is removed if it stays empty.

    The same thread may lock it again.

    Raises:
        InputError: not to `wait`, and another process is writing there.
        StorageError: the directory cannot be made or written.
    """
    place = real(target)
    was_there = os.path.isdir(place)
    try:
        with exclusive(place / LOCK, wait=wait):
            yield place
    finally:
        if not was_there:
            with contextlib.suppress(OSError):  # only an empty directory can be removed
                place.rmdir()


def require_free(target: Path) -> None:
    """Raise `InputError` where another process is writing in a directory; the same thread may have locked it."""
    if (real(target) / LOCK).exists():
        with locked(target, wait=False):
            pass


def require_writable(place: Path) -> None:
    """Raise `OSError` where a directory cannot be made."""
    folder = next(one for one in place.parents if one.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def real(target: Path) -> Path:
    """Return where a path leads, links followed."""
    name = str(target)
    if "\0" in name or name != name.encode("utf-8", "ignore").decode():
        raise InputError(f"{name!r}: a path can hold neither a NUL character nor bytes that are no UTF-8; rename it")
    return Path(os.path.realpath(target))


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")


def is_temporary(name: str, whole: str | re.Pattern[str]) -> bool:
    """Tell whether a name is one of a temporary file for a file whose name is `whole`."""
    match = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.tmp", name, re.DOTALL)
    return match is not None and re.fullmatch(whole, match[1]) is not None


def put(file: Path, data: bytes | memoryview) -> None:
    """Write a file of a locked directory."""
    temporary = _temporary(file)
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the system write a file or a directory's names to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no directories
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
