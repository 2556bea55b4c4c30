"""Reading files of others: what is read is bounded before it is parsed, and every refusal is of our own kind.

A file is regular (a FIFO would wait for ever, a device never ends), text is UTF-8 of bounded size, JSON and YAML are
bounded in depth and in the length of numbers and hold no half of a surrogate pair. Tensors: `commandv.storage.tensors`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import re
import stat
import struct
import tokenize
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import yaml

from commandv.errors import CommandVError, FormatError, did_you_mean

MOST_TEXT = 1 << 28  # bytes of a file that is read as text, such as a set of prompts
MOST_CONFIG = 1 << 24  # bytes of a JSON file of settings
MOST_YAML = 1 << 18  # bytes; the parser is slow, and files of settings have a few thousand
DEPTH = 64  # of objects in objects
DIGITS = 20  # of a whole number: 2^64 has so many
_POINTER = b"version https://git-lfs"

# What the packages below raise on damaged or hostile bytes, each of a dozen kinds.
DAMAGED = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    EOFError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    yaml.YAMLError,
)


def first_line(error: BaseException) -> str:
    """Return what an error says in one short line."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def no_such_file(path: Path) -> str:
    """Return that a file or directory is not there, with what is there under a similar name."""
    folder = next(one for one in (*path.parents, Path()) if os.path.isdir(one))
    if folder != path.parent:
        path = path.parents[path.parents.index(folder) - 1]
        return f"no such file, nor is there a directory {path}{did_you_mean(path.name, _names(folder))}"
    return f"no such file{did_you_mean(path.name, _names(folder))}"


def _names(folder: Path) -> list[str]:
    try:
        return [one.name for one in folder.iterdir()]
    except OSError:
        return []


def require_regular(path: Path, *, most: int | None = None, error: type[CommandVError] = FormatError) -> int:
    """Return a file's size after checking that it can be read to an end."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            what = "a directory" if stat.S_ISDIR(facts.st_mode) else "not a regular file (a device, a pipe)"
            raise error(f"{path}: {what}, expected a file")
        with path.open("rb") as file:
            head = file.read(len(_POINTER))
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        if isinstance(problem, CommandVError):
            raise
        missing = isinstance(problem, FileNotFoundError)
        raise error(f"{path}: {no_such_file(path) if missing else f'cannot be read ({problem})'}") from problem
    if not head:
        raise error(f"{path}: the file is empty; copy it again")
    if head == _POINTER:
        raise error(f"{path}: a git-LFS pointer, not the file itself; run `git lfs pull` where it came from")
    if most is not None and facts.st_size > most:
        raise error(f"{path}: {facts.st_size} bytes, expected at most {most} of a file like this")
    return facts.st_size


def read_bytes(path: Path, *, most: int = MOST_CONFIG, error: type[CommandVError] = FormatError) -> bytes:
    """Return a file's content; raises as `require_regular` does."""
    require_regular(path, most=most, error=error)
    try:
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem})") from problem


def read_text(path: Path, *, most: int = MOST_TEXT, error: type[CommandVError] = FormatError) -> str:
    """Return a file's text, without a byte-order mark."""
    try:
        return read_bytes(path, most=most, error=error).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 text ({problem.reason} at byte {problem.start})") from problem


# -- JSON and YAML -----------------------------------------------------------------------------------------------------


def parse_json(
    text: str | bytes, where: str, *, digits: int = DIGITS, once: bool = True, error: type[CommandVError] = FormatError
) -> Any:
    """Parse JSON; `where` opens the messages."""
    hook = _once if once else None
    try:
        value = json.loads(
            text, parse_int=functools.partial(_whole, most=digits), parse_float=_finite, object_pairs_hook=hook
        )
        require_plain(value, digits=digits)
    except (ValueError, RecursionError) as problem:
        reason = "nested too deeply" if isinstance(problem, RecursionError) else first_line(problem)
        raise error(f"{where}: not valid JSON ({reason})") from problem
    return value


def read_json(
    path: Path,
    *,
    most: int = MOST_CONFIG,
    digits: int = DIGITS,
    once: bool = True,
    error: type[CommandVError] = FormatError,
) -> Any:
    """Read a JSON file; raises as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, most=most, error=error), str(path), digits=digits, once=once, error=error)


def read_yaml(path: Path, *, error: type[CommandVError] = FormatError) -> Any:
    """Read a YAML file of settings: plain values only, a date is a text."""
    text = read_text(path, most=MOST_YAML, error=error)
    try:
        _require_shallow(text)  # the parser takes quadratic time for what is open
        value = yaml.load(text, _Loader)
        require_plain(value, budget=MOST_YAML)
    except CommandVError:
        raise
    except DAMAGED as problem:
        reason = "nested too deeply" if isinstance(problem, RecursionError) else str(problem)[:500]
        raise error(f"{path}: not YAML: {reason}") from problem
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without dates, with bounded numbers, and each key once."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {
        first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):  # the parser would take the last
            twice = next(key for key in keys if keys.count(key) > 1)[1]
            raise yaml.MarkedYAMLError(problem=f"{twice[:40]!r} twice in one mapping", problem_mark=node.start_mark)
        return node


def require_plain(value: Any, *, digits: int = DIGITS, budget: int | None = None) -> None:
    """Raise `ValueError` for a value that is nested too deeply, too large a number, or no text that a file can hold."""
    seen = 0
    level = [value]
    for _ in range(DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                _require_encodable(one)
            elif isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, (list, tuple, set)):
                below += one
            elif isinstance(one, int) and abs(one) >= 10**digits:
                raise ValueError(f"a whole number of more than {digits} digits")
        seen += len(below)
        if budget is not None and seen > budget:
            raise ValueError("repeated parts make it larger than a file of settings may be")
        if not below:
            return
        level = below
    raise ValueError(f"nested more than {DEPTH} deep")


def _require_shallow(text: str) -> None:
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        if depth > DEPTH:
            raise ValueError(f"more than {DEPTH} brackets are open at once")


def _require_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start} of a text") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):  # which of the values is meant nobody can tell
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in made if names.count(name) > 1)[:40]!r} twice in one object")
    return made


def _whole(digits: str, most: int) -> int:
    if len(digits) > most:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number beyond float64")
    return value


def number_of(text: str, *, most: int) -> int | None:
    """Return the number that a text of ASCII digits stands for, None for another text or one above `most`."""
    value = int(text) if len(text) <= DIGITS and text.isascii() and text.isdigit() else None
    return value if value is not None and value <= most else None
