"""Opening an adapter whatever it was saved as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from commandv.adapters.adapter import Adapter
from commandv.adapters.shipped import builtin_path
from commandv.adapters.store import read
from commandv.arguments import checked
from commandv.interop.control_vectors import read_control_vector
from commandv.interop.detect import SUFFIXES, require_adapter_kind
from commandv.interop.pyreft import read_pyreft
from commandv.interop.vectors import read_vector
from commandv.storage.directories import CONFIG
from commandv.storage.hub import fetched, is_repo, require_local


@checked
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
    kind = require_adapter_kind(source)
    if kind == "pyreft":
        return read_pyreft(Path(source))
    if kind == "vector":
        return read_vector(Path(source), layer=layer, convention=convention)
    if kind == "control-vector":
        return read_control_vector(Path(source), layer=layer, convention=convention)
    return read(source)
