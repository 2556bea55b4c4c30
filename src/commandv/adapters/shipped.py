"""Which adapters come with the library, and whether there can be one of a name; found out without opening any."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from commandv.errors import FormatError, did_you_mean
from commandv.storage.hub import is_repo
from commandv.storage.reading import no_such_file

BUILTIN = "builtin:"


def builtin_adapters() -> list[str]:
    """Return the names of the shipped adapters, `BEHAVIOUR@MODEL`."""
    return sorted(one.name for one in _folder().glob("*@*"))


def builtin_path(name: str) -> Path:
    """Return the directory of a shipped adapter, `BEHAVIOUR@MODEL`."""
    known = builtin_adapters()
    if name not in known:
        raise FormatError(
            f"{BUILTIN}{name}: no such adapter{did_you_mean(name, known)}; there are "
            f"{', '.join(BUILTIN + one for one in known)}"
        )
    return _folder() / name


def require_adapter_source(source: str) -> None:
    """Raise `FormatError` where there can be no adapter: no shipped one of the name, no such file or directory."""
    if source.startswith(BUILTIN):
        builtin_path(source.removeprefix(BUILTIN))
    elif not os.path.exists(source) and not is_repo(source):
        near = did_you_mean(BUILTIN + source, [BUILTIN + one for one in builtin_adapters()])
        raise FormatError(f"{source}: {no_such_file(Path(source))}{near}")


def _folder() -> Path:
    return Path(str(importlib.resources.files("commandv.adapters") / "data"))
