"""What a path holds and how it may count layers, told by names and headers, without torch but for a GGUF file."""

from __future__ import annotations

import os
import pickletools
import zipfile
from pathlib import Path
from typing import Literal, get_args

from commandv.errors import FormatError, InputError
from commandv.storage.directories import CONFIG
from commandv.storage.kinds import ADAPTER, DEMONSTRATIONS, PROFILE
from commandv.storage.reading import no_such_file, read_json

SUFFIXES = {".pt", ".pth", ".bin", ".npy", ".npz", ".safetensors", ".svec"}  # of vector files
_PICKLE = 1 << 16  # bytes, far more than one tensor takes
_OPENERS = {
    PROFILE.format: "a profile, not an adapter; use load_profile()",
    DEMONSTRATIONS.format: "demonstrations, not an adapter; use distil()",
}
LayerConvention = Literal["blocks", "hidden-states"]
Convention = Literal["llama.cpp", "from-zero"]
# How files of a kind may count layers; those of the others say it.
CONVENTIONS: dict[str, tuple[str, ...]] = {"vector": get_args(LayerConvention), "control-vector": get_args(Convention)}


def detect(path: str | Path) -> str:
    """Tell what a path holds: an adapter, a profile, demonstrations, `pyreft`, `vector` or `control-vector`."""
    path = Path(path)
    if os.path.isfile(path):
        if path.suffix in SUFFIXES:
            return "vector"
        if path.suffix == ".gguf":
            from commandv.interop.control_vectors import is_control_vector

            if is_control_vector(path):
                return "control-vector"
            raise FormatError(f"{path}: a GGUF file of a model, not of a control vector; open it with load_model")
        raise FormatError(f"{path}: a file of type {path.suffix!r}; expected {', '.join(sorted({*SUFFIXES, '.gguf'}))}")
    if not os.path.isdir(path):
        odd = os.path.exists(path)  # a pipe, a device
        raise FormatError(f"{path}: {'neither a file nor a directory' if odd else no_such_file(path)}")
    if os.path.isfile(path / CONFIG) and any(path.glob("intkey_*.bin")):
        return "pyreft"
    if (format := _stated_format(path)) in (ADAPTER.format, PROFILE.format, DEMONSTRATIONS.format):
        return format
    if list(path.glob("keys*.safetensors")) or list(path.glob("layer-*.safetensors")):
        return "commandv-profile"
    if list(path.glob("tensors*.safetensors")):
        return "commandv-adapter"
    if os.path.isfile(path / "sae_weights.safetensors"):
        raise FormatError(f"{path}: a sparse autoencoder; open it with commandv.interop.sae and steer one feature")
    if os.path.isfile(path / "config.json"):
        raise FormatError(f"{path}: has a config.json but no weights beside it; copy the whole directory")
    names = ", ".join(sorted(one.name for one in path.iterdir())[:5]) or "nothing"
    raise FormatError(f"{path}: not an adapter or profile; the directory holds {names}")


def require_adapter_kind(source: str | Path) -> str:
    """Return what kind of file or directory an adapter is in, as `detect` tells it."""
    kind = detect(source)
    if kind in _OPENERS:
        raise FormatError(f"{source}: {_OPENERS[kind]}")
    return kind


def require_layer(source: str | Path, layer: int | None) -> None:
    """Raise `InputError` for a torch file of one bare tensor that is one vector, where nobody says at which layer.

    The tensor's size is read from the pickle's operations, which are not run.
    """
    path = Path(source)
    if layer is not None or path.suffix != ".pt" or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        held = [one for one in archive.infolist() if one.filename.endswith("/data.pkl") and one.file_size < _PICKLE]
        data = archive.read(held[0]) if len(held) == 1 else b""
    try:
        operations = [(one.name, value) for one, value, _ in pickletools.genops(data)]
    except ValueError:
        return  # what is wrong with it reading it says
    names = [name for name, _ in operations]
    if names.count("BINPERSID") == 1 and not {"EMPTY_DICT", "EMPTY_LIST"} & set(names):  # one tensor, and bare
        place = names.index("BINPERSID")  # its offset, its size and its stride follow
        if names[place + 3 : place + 4] == ["TUPLE1"]:
            raise InputError(f"{path}: one vector of width {operations[place + 2][1]}; say where it acts: layer=")


def _stated_format(target: Path) -> str | None:
    """Return the format that a directory's `config.json` states, None where it states none."""
    try:
        raw = read_json(target / CONFIG)
    except FormatError:
        return None
    format = raw.get("format") if isinstance(raw, dict) else None
    return format if isinstance(format, str) else None


def require_convention(kind: str, convention: str | None) -> None:
    """Raise `InputError` for a convention of counting layers that files of a kind, where they have any, do not have."""
    known = CONVENTIONS.get(kind)
    if convention is not None and known is not None and convention not in known:
        raise InputError(f"convention={convention!r}: expected {' or '.join(map(repr, known))}")
