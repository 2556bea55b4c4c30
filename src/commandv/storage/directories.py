"""The one writer of directories: what is there is whole at any moment, and no file of others is touched.

A directory of ours stays where it is. Its data files have names that end in a hash of what they hold, and
`config.json`, which names them, is replaced last, by one `os.replace`. So a reader sees the old artefact or the new
one, a writer that is killed leaves at worst files that the next one removes, and the directory may be a link, a mount
point or the current directory.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from commandv.errors import FormatError, InputError, StorageError
from commandv.storage.files import (
    LOCK,
    TRIES,
    is_temporary,
    locked,
    put,
    real,
    require_writable,
    sha256_of,
    storage_errors,
    sync,
)
from commandv.storage.foreign import BUILD, MOVING, undo
from commandv.storage.reading import MOST_CONFIG, parse_json, read_json

CONFIG = "config.json"
FORMER_LOCK = ".lock"  # of earlier versions; a killed one left it behind
VERSION = 2  # of directories of ours; 1 had data files of fixed names without hashes
PARTS = ".parts"  # of long work, in the directory that will hold its result
_PART = re.compile(r"part-\d{5}-[0-9a-f]{16}-[0-9a-f]{12}\.safetensors")
T = TypeVar("T")
Buffer: TypeAlias = bytes | memoryview

log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """A kind of directory of ours."""

    format: str  # what its `config.json` states
    parts: str  # regular expression of the names of its data files, without hash and suffix
    first: Callable[[Mapping[str, Any]], list[str]]  # the parts that a configuration of version 1 has
    # the data files are checked by CRC-32 when they are read, which a changed byte does not escape either and which
    # takes a quarter of the time
    large: bool = False

    def is_data(self, name: str, *, hashed: bool = False) -> bool:
        """Tell whether a name is one that a data file of this kind has."""
        tail = r"-[0-9a-f]{12}" if hashed else r"(-[0-9a-f]{12})?"
        return re.fullmatch(rf"({self.parts}){tail}\.safetensors", name) is not None

    def is_leftover(self, file: Path) -> bool:
        """Tell whether a killed writer of this kind may have left a file or directory."""
        if file.name == PARTS and not file.is_symlink() and file.is_dir():
            return all(_PART.fullmatch(one.name) or is_temporary(one.name, _PART) for one in file.iterdir())
        whole = rf"({self.parts})-[0-9a-f]{{12}}\.safetensors|config\.json"
        return file.name == LOCK or is_temporary(file.name, whole) or self.is_data(file.name, hashed=True)


# -- directories of ours ----------------------------------------------------------------------------------------------


def require_place(target: Path, kind: Kind) -> None:
    """Raise `FormatError` unless writing to `target` destroys nothing but a whole artefact of the same kind.

    Free are: nothing, an empty directory, a directory that holds a whole artefact of the kind and no other file, and
    what a killed writer of the kind left.
    """
    with storage_errors(target):
        if not os.path.lexists(target) or not (place := real(target)).exists():
            require_writable(real(target))
            return
        if not place.is_dir():
            raise FormatError(f"{target}: a file, expected a directory or nothing; choose another place")
        found = list(place.iterdir())
        has_config = (place / CONFIG).exists()
        foreign = [
            one.name
            for one in found
            if not kind.is_leftover(one) and not (has_config and (one.name == CONFIG or kind.is_data(one.name)))
        ]
        if foreign:
            names = ", ".join(sorted(foreign)[:4])
            raise FormatError(
                f"{target}: holds what is no part of a {kind.format} ({names}), so it is left alone; "
                "choose another place"
            )
        if has_config:
            try:
                require_whole(place, kind)
            except FormatError as error:
                raise FormatError(
                    f"{target}: not a whole {kind.format} ({error}), so it is not replaced; "
                    "choose another place, or delete the directory"
                ) from error


def require_whole(target: Path, kind: Kind) -> None:
    """Raise `FormatError` unless a directory is of a kind and its files have their full size; they are not read."""
    _unchanged(target, kind, lambda config: _files(target, kind, config))


def write_artefact(target: Path, kind: Kind, config: Mapping[str, Any], parts: Iterable[tuple[str, Buffer]]) -> None:
    """Write a directory of ours, or replace one of the same kind.

    Args:
        target: the directory.
        kind: what it will hold.
        config: goes into `config.json`, with format, version and the names, sizes and hashes of the data files.
        parts: names and contents of the data files.

    Raises:
        FormatError: `target` holds something else; see `require_place`.
        StorageError: the disk is full or not writable; what was there is untouched.
    """
    require_place(target, kind)
    stated = {"format": kind.format, "format_version": VERSION, **config}
    _config_bytes(target, stated)  # before anything is made, and before an earlier artefact is touched
    with storage_errors(target), locked(target) as place:
        require_place(target, kind)
        try:
            _sweep(place, kind)
            files = {}
            for part, data in parts:
                sha256 = hashlib.sha256(data).hexdigest()
                name = f"{part}-{sha256[:12]}.safetensors"
                put(place / name, data)
                files[part] = {"file": name, "sha256": sha256, "size": memoryview(data).nbytes}
                if kind.large:
                    files[part]["crc32"] = zlib.crc32(data)
                del data  # before the next is made
            put(place / CONFIG, _config_bytes(target, {**stated, "files": files}))
            sync(place)
            shutil.rmtree(place / PARTS, ignore_errors=True)
        finally:
            with contextlib.suppress(OSError, FormatError):
                _sweep(place, kind)


def _config_bytes(target: Path, config: Mapping[str, Any]) -> bytes:
    """Return a configuration as it is written."""
    try:
        data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        said = f"{target}: what {CONFIG} would state is not plain JSON ({error}); nothing is written"
        raise FormatError(said) from error
    if len(data) > MOST_CONFIG:
        raise FormatError(
            f"{target}: {CONFIG} would have {len(data)} bytes, of which at most {MOST_CONFIG} are read again; nothing "
            "is written. Save less in one directory"
        )
    parse_json(data, f"{target}: nothing is written: what {CONFIG} would state")
    return data


def read_artefact(target: Path, kind: Kind, build: Callable[[dict[str, Any], dict[str, Path]], T]) -> T:
    """Read a directory of ours: `build` gets the configuration and the data files by part, their hashes verified.

    A directory that is replaced meanwhile is read again.

    Raises:
        FormatError: not of this kind, of an unknown version, damaged or not whole.
    """

    def verified(config: dict[str, Any]) -> T:
        files = _files(target, kind, config)
        _verify(files, config)
        return build(config, files)

    return _unchanged(target, kind, verified)


def _unchanged(target: Path, kind: Kind, use: Callable[[dict[str, Any]], T]) -> T:
    """Return what `use` makes of a configuration; what was replaced meanwhile is read again."""
    for _ in range(TRIES):
        written = _written(target)
        config = read_config(target, kind)
        try:
            return use(config)
        except (FileNotFoundError, FormatError) as error:
            if _written(target) != written or read_config(target, kind) != config:
                continue
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                f"{target}: the {kind.format} is damaged: {CONFIG} is there but {Path(error.filename).name} is "
                "missing; copy the whole directory"
            ) from error
    raise FormatError(f"{target}: is being replaced again and again; read it when its writer has ended")


def _written(target: Path) -> tuple[int, int] | None:
    """Return what changes whenever a configuration is replaced, even twice and by what was there before."""
    try:
        found = os.stat(target / CONFIG)
    except (OSError, ValueError):
        return None  # reading it says why
    return found.st_ino, found.st_mtime_ns


def read_config(target: Path, kind: Kind) -> dict[str, Any]:
    """Read the configuration of a directory of ours."""
    try:
        raw = read_json(target / CONFIG)
    except FormatError as error:
        raise FormatError(f"{target}: not a {kind.format}: cannot read {CONFIG} ({error})") from error
    if not isinstance(raw, dict):
        raise FormatError(f"{target}: not a {kind.format}: {CONFIG} holds a {type(raw).__name__}, expected an object")
    version = raw.get("format_version")
    if raw.get("format") != kind.format or isinstance(version, bool) or version not in range(1, VERSION + 1):
        raise FormatError(
            f"{target}: expected a {kind.format} of version 1 to {VERSION}, got {raw.get('format')!r} version "
            f"{version!r}; a newer version needs a newer commandv"
        )
    return raw


def _files(target: Path, kind: Kind, config: Mapping[str, Any]) -> dict[str, Path]:
    """Return the data files by part after comparing their sizes."""
    if config["format_version"] == 1:
        try:
            parts = [part for part in kind.first(config) if re.fullmatch(kind.parts, part)]
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise FormatError(f"{target}: {CONFIG} is not that of a {kind.format} ({error})") from error
        found = {part: target / f"{part}.safetensors" for part in parts}
        for file in found.values():
            os.stat(file)
        return found
    stated, found = config.get("files"), {}
    if not isinstance(stated, dict):
        raise FormatError(f"{target}: {CONFIG} names no files; copy the whole directory")
    for part, one in stated.items():
        if (
            not isinstance(one, dict)
            or set(one) - {"crc32"} != {"file", "sha256", "size"}
            or not re.fullmatch(kind.parts, part)
        ):
            raise FormatError(f"{target}: {CONFIG}, files.{part}: expected file, sha256 and size of a data file")
        if one["file"] != f"{part}-{str(one['sha256'])[:12]}.safetensors" or not kind.is_data(one["file"]):
            raise FormatError(f"{target}: {CONFIG}, files.{part}: {one['file']!r} is not the name of its data file")
        file = target / one["file"]
        facts = os.stat(file)
        if not stat.S_ISREG(facts.st_mode) or not facts.st_size == one["size"] > 0:
            raise FormatError(
                f"{file}: damaged: truncated or not safetensors ({facts.st_size} bytes, expected {one['size']}); "
                "copy it again"
            )
        found[part] = file
    return found


def _verify(files: Mapping[str, Path], config: Mapping[str, Any]) -> None:
    """Compare the hashes; version 1 has none."""
    if config["format_version"] == 1:
        return

    def check(part: str) -> None:
        stated, file = config["files"][part], files[part]
        same = _crc32(file) == stated["crc32"] if "crc32" in stated else sha256_of(file) == stated["sha256"]
        if not same:
            raise FormatError(f"{file}: damaged: its content has changed since it was written; copy it again")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(check, files))


def _crc32(path: Path) -> int:
    """Read piece by piece: pages of a mapped file would count as this process's memory."""
    found, piece = 0, bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            found = zlib.crc32(memoryview(piece)[:count], found)
    return found


def _sweep(place: Path, kind: Kind) -> None:
    """Remove what no configuration names: data files of earlier or killed writers and temporary files."""
    try:
        config = read_config(place, kind)
        kept = {file.name for file in _files(place, kind, config).values()}
    except (FormatError, FileNotFoundError):
        if (place / CONFIG).exists():
            return
        kept = set()
    for one in place.iterdir():
        data = kind.is_data(one.name) and one.name not in kept
        if data or (kind.is_leftover(one) and one.name not in {*kept, LOCK, PARTS}):
            one.unlink(missing_ok=True)


# -- what can be made again --------------------------------------------------------------------------------------------


def kept(
    target: Path,
    last: str,
    load: Callable[[], T],
    make: Callable[[], T],
    *,
    kind: Kind | None = None,
    cache: bool = True,
) -> T:
    """Return what a directory holds; make it, while other processes wait, where it is not there.

    Args:
        target: the directory.
        last: the file without which it is not whole.
        load: reads it; a `FormatError` says that it is damaged.
        make: writes it and returns what it holds.
        kind: of a directory of ours.
        cache: remove a damaged one with a warning and make it again; otherwise it is an error.
    """
    try:
        if os.path.exists(target / last):
            found = load()
            _tidy(target, last, kind)
            return found
    except FormatError:
        if not cache:
            raise
    with locked(target) as place:
        if cache:  # where no file is the user's
            (place / FORMER_LOCK).unlink(missing_ok=True)
        if (place / last).exists():  # another process may just have made it
            try:
                return load()
            except FormatError as error:
                if not cache:
                    raise
                log.warning("%s. It is made again", error)
                for one in place.iterdir():
                    if one.name != LOCK:
                        shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()
        return make()


def _tidy(target: Path, last: str, kind: Kind | None) -> None:
    """Remove what a writer has left that was killed after its result was in place, unless nothing can be written."""
    if any(os.path.exists(target / name) for name in (LOCK, PARTS, BUILD, MOVING)):
        with contextlib.suppress(InputError, StorageError), locked(target, wait=False) as place:
            undo(place, last)
            shutil.rmtree(place / PARTS, ignore_errors=True)
            if kind is not None:
                _sweep(place, kind)
