"""Opening an adapter whatever it was saved as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from commandv.adapters.adapter import Adapter
from commandv.adapters.shipped import builtin_path
from commandv.adapters.store import read
from commandv.errors import FormatError, InputError
from commandv.interop.control_vectors import Convention, is_control_vector, read_control_vector
from commandv.interop.pyreft import is_pyreft, read_pyreft
from commandv.interop.vectors import SUFFIXES, LayerConvention, read_vector
from commandv.storage.directories import CONFIG
from commandv.storage.hub import fetched, is_repo, require_local
from commandv.storage.reading import no_such_file, read_json


def detect(path: str | Path) -> str:
    """Tell what a path holds: an adapter, a profile, demonstrations, `pyreft`, `vector` or `control-vector`.

    Raises:
        FormatError: none of these; says what was found.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix in SUFFIXES:
            return "vector"
        if path.suffix == ".gguf":
            if is_control_vector(path):
                return "control-vector"
            raise FormatError(f"{path}: a GGUF file of a model, not of a control vector; open it with load_model")
        raise FormatError(f"{path}: a file of type {path.suffix!r}; expected {', '.join(sorted({*SUFFIXES, '.gguf'}))}")
    if not path.is_dir():
        raise FormatError(f"{path}: {no_such_file(path)}")
    if is_pyreft(path):
        return "pyreft"
    if (format := _stated_format(path)) in ("commandv-profile", "commandv-adapter", "commandv-demonstrations"):
        return format
    if list(path.glob("keys*.safetensors")) or list(path.glob("layer-*.safetensors")):
        return "commandv-profile"
    if list(path.glob("tensors*.safetensors")):
        return "commandv-adapter"
    if (path / "sae_weights.safetensors").is_file():
        raise FormatError(f"{path}: a sparse autoencoder; open it with commandv.interop.sae and steer one feature")
    if (path / "config.json").is_file():
        raise FormatError(f"{path}: has a config.json but no weights beside it; copy the whole directory")
    names = ", ".join(sorted(one.name for one in path.iterdir())[:5]) or "nothing"
    raise FormatError(f"{path}: not an adapter or profile; the directory holds {names}")


def load_adapter(
    source: str | Path,
    *,
    layer: int | None = None,
    convention: str | None = None,
    same_as: str = "",
    revision: str | None = None,
) -> Adapter:
    """Load an adapter: `builtin:BEHAVIOUR@MODEL`, a directory of ours, a pyreft directory, a vector file, a control
    vector of llama.cpp, or a repository on the hub that holds one of these.

    Args:
        source: what to load; of a repository `user/name`.
        layer: for a vector file, the layer it acts on; of a stack or a control vector, the only layer to take.
        convention: how a file counts layers. Vector files: `"blocks"` (0 is the output of the first block, as we count;
            the default) or `"hidden-states"` (0 is the embeddings). Control vectors: `"llama.cpp"` or `"from-zero"`.
        same_as: take the model that it is for as the one of this name, whatever the file says.
        revision: branch, tag or commit on the hub.

    Raises:
        FormatError: unsafe, damaged, unknown or of another kind; says what was got and what to do.
        InputError: a bare vector without a layer; a convention that files of this kind do not have.
        HubError: not on the hub, not allowed, or not reachable.
    """
    if is_repo(source):
        name = str(source).rpartition("/")[2]
        found = fetched(
            str(source), "model", lambda folder: _shared(folder, name, layer, convention), revision=revision
        )
    else:
        require_local(revision, source)
        found = _loaded(source, layer, convention)
    return replace(found, model=replace(found.model, id=same_as, revision="", weights="")) if same_as else found


def _shared(folder: Path, name: str, layer: int | None, convention: str | None) -> Adapter:
    """Return what a fetched repository holds: a directory of an adapter, or one file of vectors."""
    single = [one for one in folder.iterdir() if one.suffix in (*SUFFIXES, ".gguf")]
    if len(single) == 1 and not (folder / CONFIG).exists():
        return _loaded(single[0], layer, convention)
    found = _loaded(folder, layer, convention)
    # A directory of another format has no name of its own but its own, and here that is a commit.
    return found if found.name != folder.name else replace(found, name=name)


def _loaded(source: str | Path, layer: int | None, convention: str | None) -> Adapter:
    text = str(source)
    if text.startswith("builtin:"):
        return read(builtin_path(text.removeprefix("builtin:")))
    kind = detect(source)
    if kind == "commandv-adapter":
        return read(source)
    if kind == "pyreft":
        return read_pyreft(Path(source))
    if kind == "vector":
        return read_vector(Path(source), layer=layer, convention=_convention(convention, LayerConvention))
    if kind == "control-vector":
        return read_control_vector(Path(source), layer=layer, convention=_convention(convention, Convention))
    what, opener = (
        ("demonstrations", "distil()") if kind == "commandv-demonstrations" else ("a profile", "load_profile()")
    )
    raise FormatError(f"{source}: {what}, not an adapter; use {opener}")


def _stated_format(target: Path) -> str | None:
    """Return the format that a directory's `config.json` states, None where it states none."""
    try:
        raw = read_json(target / CONFIG)
    except FormatError:
        return None
    format = raw.get("format") if isinstance(raw, dict) else None
    return format if isinstance(format, str) else None


def _convention(given: str | None, known: Any) -> Any:
    """Return a convention if files of this kind have it."""
    if given is not None and given not in get_args(known):
        raise InputError(f"convention={given!r}: expected {' or '.join(map(repr, get_args(known)))}")
    return given
