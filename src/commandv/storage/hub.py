"""What lies on the Hugging Face hub: found, fetched into the hub's own cache, and what it refuses told as our errors.

Fetching is `huggingface_hub`'s: its cache, its offline mode (`HF_HUB_OFFLINE`), its tokens (`hf auth login`); a
download that is cut off goes on with the files that are missing.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from commandv.errors import FormatError, HubError, InputError
from commandv.storage.files import sha256_of, storage_errors
from commandv.storage.reading import first_line

RepoType = Literal["model", "dataset"]
CARD = "README.md"
# What is fetched: our data files and those of formats that we read, none of which is unpickled.
FILES = ("*.json", "*.md", "*.safetensors", "*.bin", "*.gguf", "*.pt", "*.npy", "*.npz", "*.svec")
_PICKLES = ("*.pkl", "*.pickle", "*.joblib", "*.dill", "*.ckpt", "*.pth")
_MODELS = ("model.safetensors", "model-*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
T = TypeVar("T")

log = logging.getLogger(__name__)


class Listed(NamedTuple):
    """What the hub says of a repository."""

    commit: str  # of the revision that was asked for
    private: bool  # only its owner sees it
    files: dict[str, tuple[int | None, str]]  # name -> (size, SHA-256 where it is a large file, else git's hash)


def is_repo_id(text: str) -> bool:
    """Tell whether a text has the form of a hub id, `user/name`."""
    return _ID.fullmatch(text) is not None


def is_repo(source: str | Path) -> bool:
    """Tell whether a source is a hub id and not something on this disk."""
    return isinstance(source, str) and is_repo_id(source) and not os.path.lexists(source)


def require_repo_id(repo_id: str) -> None:
    """Raise `InputError` unless a text has the form of a hub id."""
    if not is_repo_id(repo_id):
        raise InputError(f"{repo_id!r}: expected the hub's user/name, such as anna/numbered-list-llama-3.2-3b")


def opened(source: str | Path, repo_type: RepoType, read: Callable[[Path], T], *, revision: str | None = None) -> T:
    """Read what is on this disk, or a repository of the hub; arguments and errors as in `fetched`.

    Raises:
        InputError: a revision of what is on this disk.
    """
    if is_repo(source):
        return fetched(str(source), repo_type, read, revision=revision)
    require_local(revision, source)
    return read(Path(source))


def fetched(source: str, repo_type: RepoType, read: Callable[[Path], T], *, revision: str | None = None) -> T:
    """Fetch a repository, or take it from the hub's cache, and have its directory read.

    Files that the hub's hashes say are damaged in the cache are fetched again, once. `revision` is a branch, tag or
    commit.

    Raises:
        HubError: not found, not allowed, not reachable and not in the cache.
        FormatError: it holds nothing of ours or of a format that we read, or `read` says so.
    """
    try:
        listed = list_repo(source, repo_type, revision=revision)
    except _UnreachableError as error:
        folder = _cached(source, repo_type, revision, error)
        log.warning("%s: the hub cannot be reached; the copy in its cache is used", source)
        return read(folder)
    _require_readable(source, repo_type, listed)
    folder = _fetch(source, repo_type, revision)
    try:
        return read(folder)
    except FormatError:
        if not any(_damaged(folder / name, *facts) for name, facts in listed.files.items()):
            raise
    log.warning("%s: the copy in the hub's cache is damaged and fetched again", source)
    return read(_fetch(source, repo_type, revision, force=True))


def require_there(source: str, *repo_types: RepoType, revision: str | None = None) -> None:
    """Raise what fetching a repository would raise, of the first of some types, as far as its list of files tells.

    Raises:
        HubError: of none of the types found, allowed or, where the hub cannot be reached, in its cache.
        FormatError: it holds nothing of ours or of a format that we read.
    """
    first, *others = repo_types
    try:
        listed = list_repo(source, first, revision=revision)
    except _UnreachableError as error:
        _cached(source, first, revision, error)
    except HubError as error:
        if not others:
            raise
        try:
            require_there(source, *others, revision=revision)
        except HubError:
            raise error from None
    else:
        _require_readable(source, first, listed)


def require_local(revision: str | None, source: str | Path) -> None:
    """Raise `InputError` where a revision is given for what lies on this disk."""
    if revision is not None:
        raise InputError(f"{source}: revision={revision!r} is for repositories on the hub; leave it out")


def list_repo(repo_id: str, repo_type: RepoType, *, revision: str | None = None) -> Listed:
    """Return what the hub says of a repository.

    Raises:
        HubError: not found, not allowed, or not reachable.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo_id, repo_type):
        found: Any = HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, files_metadata=True)
    files = {one.rfilename: (one.size, one.lfs.sha256 if one.lfs else one.blob_id or "") for one in found.siblings}
    return Listed(found.sha, bool(found.private), files)


def holds_model(repo_id: str) -> bool:
    """Tell whether there is a repository of this name on the hub, or in its cache, that holds a model.

    Raises:
        HubError: the hub cannot be reached, and the repository is not in its cache.
    """
    try:
        names = list(list_repo(repo_id, "model").files)
    except _UnreachableError as error:
        names = [one.name for one in _cached(repo_id, "model", None, error).iterdir()]
    except HubError:
        return False
    return _are_a_models(names)


def _are_a_models(names: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, one) for name in names for one in _MODELS)


class _UnreachableError(HubError):
    """Nobody answers, the hub is out of order, or offline mode is on."""


@contextlib.contextmanager
def hub_errors(repo_id: str, repo_type: RepoType = "model", *, doing: str = "read") -> Iterator[None]:
    """Turn what `huggingface_hub` raises into a `HubError` that says what to do."""
    import httpx2
    from huggingface_hub import errors

    other = "model repository" if repo_type == "dataset" else "data set"
    where = f"the hub's {'data set' if repo_type == 'dataset' else 'repository'} {repo_id}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token that may " + doing
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{where} is gated: ask for access at {_page(repo_id, repo_type)}, then {log_in} it") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{where} has no such revision; its branches and tags are on {_page(repo_id, repo_type)}") from (
            error
        )
    except errors.RepositoryNotFoundError as error:  # what an anonymous reader of a private one is told as well
        raise HubError(
            f"{where} is not there, or is private: check the name (a {other} of this name would be "
            f"another repository), and {log_in} it"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(error, where, log_in) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise _UnreachableError(
            f"{where} cannot be reached and is not whole in the hub's cache ({first_line(error)}); go online, unset "
            "HF_HUB_OFFLINE, or check HF_ENDPOINT, and run the same again"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{repo_id!r}: no name of a repository ({first_line(error)})") from error
    except (httpx2.HTTPError, ConnectionError) as error:
        raise _UnreachableError(
            f"{where} cannot be reached ({first_line(error)}); check the connection and HF_ENDPOINT, and run the same "
            "again: what has been fetched is kept"
        ) from error
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        broke = "the upload broke off, and nothing was committed" if doing == "write" else "no answer that a hub gives"
        raise HubError(
            f"{where}: {broke} ({first_line(error.__cause__ or error)}); check HF_ENDPOINT and run the same again"
        ) from error
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        raise HubError(
            f"{where}: a file came incomplete ({first_line(error)}); nothing of it is kept, run the same again"
        ) from error


def _refused(error: Any, where: str, log_in: str) -> HubError:
    status = error.response.status_code
    said = error.server_message or first_line(error)
    if status in (401, 403):
        return HubError(f"{where}: {status}, not allowed ({said}); {log_in} it")
    if status == 429:
        seconds = error.response.headers.get("Retry-After")
        wait = f"after {seconds} seconds" if seconds else "in some minutes"
        return HubError(f"{where}: 429, too many requests; run the same again {wait}, or log in for a higher limit")
    kind = _UnreachableError if status >= 500 else HubError
    return kind(f"{where}: the hub answers {status} ({said}); run the same again later")


def _page(repo_id: str, repo_type: RepoType) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"


def _fetch(
    repo_id: str, repo_type: RepoType, revision: str | None, *, force: bool = False, cached: bool = False
) -> Path:
    from huggingface_hub import constants, snapshot_download

    with storage_errors(Path(constants.HF_HUB_CACHE)), hub_errors(repo_id, repo_type):
        found = snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, allow_patterns=list(FILES), force_download=force,
            local_files_only=cached,
        )  # fmt: skip
    return Path(found)


def _cached(repo_id: str, repo_type: RepoType, revision: str | None, reason: HubError) -> Path:
    try:
        return _fetch(repo_id, repo_type, revision, cached=True)
    except _UnreachableError:
        raise reason from None


def _require_readable(repo_id: str, repo_type: RepoType, listed: Listed) -> None:
    """Raise `FormatError` where it is plain from the names that there is nothing to read, before fetching anything."""
    names = list(listed.files)
    if _are_a_models(names):
        raise FormatError(f"{repo_id}: a model, not an adapter; load_model opens it")
    data = [name for name in names if any(fnmatch.fnmatch(name, one) for one in FILES if one != "*.md")]
    if data:
        return
    pickles = [name for name in names if any(fnmatch.fnmatch(name, one) for one in _PICKLES)]
    if pickles:
        raise FormatError(
            f"{repo_id}: holds {', '.join(pickles[:3])}: loading a pickle could run code, so it is refused and was not "
            "fetched; ask its author for safetensors"
        )
    held = ", ".join(sorted(names)[:5]) or "nothing"
    raise FormatError(f"{repo_id}: nothing that can be loaded; the hub's {repo_type} repository holds {held}")


def _damaged(file: Path, size: int | None, hash: str) -> bool:
    """Tell whether a fetched file is not what the hub says it is."""
    if not file.is_file():
        return False
    if size is not None and file.stat().st_size != size:
        return True
    if len(hash) == 64:
        return sha256_of(file) != hash
    data = file.read_bytes()
    return bool(hash) and hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != hash
