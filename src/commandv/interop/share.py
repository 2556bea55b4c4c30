"""Sharing on the Hugging Face hub: an adapter is a model repository, a profile or demonstrations are a data set."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from commandv.adapters.adapter import Adapter
from commandv.adapters.store import save
from commandv.arguments import checked
from commandv.errors import CommandVError, FormatError, HubError, InputError
from commandv.interop.cards import card_of, donor_of, hub_id
from commandv.interop.detect import detect
from commandv.interop.load import load_adapter
from commandv.models.identity import ModelRef
from commandv.profiles.profile import Profile, load_profile, save_profile
from commandv.storage.directories import CONFIG, Kind, read_config, require_place, write_artefact
from commandv.storage.hub import CARD, Listed, RepoType, fetched, hub_errors, list_repo, require_repo_id
from commandv.storage.kinds import ADAPTER, DEMONSTRATIONS, PROFILE
from commandv.transfer.distil.demonstrations import (
    Demonstrations,
    load_demonstrations,
    save_demonstrations,
)

Artefact = Adapter | Profile | Demonstrations
# What a repository may hold beside an artefact's own files.
_BESIDE = re.compile(r"README\.md|\.gitattributes|LICEN[CS]E(\..+)?|NOTICE(\..+)?", re.I)


@dataclass(frozen=True)
class _Shared:
    """How one kind of artefact is shared."""

    kind: Kind
    type: type[Artefact]
    repo_type: RepoType
    save: Callable[[Any, Path], Any]
    load: Callable[[Path], Artefact]
    model: Callable[[Any], ModelRef]


_SHARED = (
    _Shared(ADAPTER, Adapter, "model", save, load_adapter, lambda one: one.model),
    _Shared(PROFILE, Profile, "dataset", save_profile, load_profile, lambda one: one.model),
    _Shared(DEMONSTRATIONS, Demonstrations, "dataset", save_demonstrations, load_demonstrations, lambda one: one.donor),
)


class Pushed(NamedTuple):
    """What was uploaded: the repository's address, the commit, and how many bytes its files have."""

    url: str
    commit: str
    size: int


@checked
def push(
    artefact: Artefact | str | Path,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Upload an adapter, a profile or demonstrations to the hub, in one commit, with a card that says what it is.

    An adapter goes into a model repository, the others into a data set; the repository is made where there is none, and
    an earlier artefact of the same kind in it is replaced. What is uploaded is our format, safetensors, whatever the
    adapter was saved as. Log in first: `hf auth login`, or a token in HF_TOKEN.

    Args:
        artefact: what to upload: in memory, a directory, or what `load_adapter` takes.
        repo_id: the hub's `user/name`.
        private: only you and your organisation see the repository. A public one must be asked for.
        license: of what is uploaded, by the hub's name, such as `mit`; the licences of the models it was made from are
            looked up and named beside it.
        message: of the commit.

    Returns:
        Where it is.

    Raises:
        HubError: not logged in, not allowed, not reachable; or the repository is public and `private` was asked for.
        FormatError: the repository holds something else; what is on disk is damaged or of no kind of ours.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    require_repo_id(repo_id)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", license):
        raise InputError(f"license={license!r}: expected the hub's name of one, such as mit or apache-2.0")
    with tempfile.TemporaryDirectory(prefix="commandv-") as scratch:
        folder, one, how = _on_disk(artefact, Path(scratch))
        config = read_config(folder, how.kind)
        names = [CONFIG, *(part["file"] for part in config["files"].values())]
        card = card_of(one, repo_id, license=license, licenses=_licenses(one, how), record=config)
        name = f"profile of {one.model.id}" if isinstance(one, Profile) else one.name
        api = HfApi()
        with hub_errors(repo_id, how.repo_type, doing="write"):
            url = str(api.create_repo(repo_id, repo_type=how.repo_type, private=private, exist_ok=True))
        there = list_repo(repo_id, how.repo_type)
        stale = _stale(there, how, names, repo_id, private=private)
        operations: list[Any] = [
            *(CommitOperationAdd(name, str(folder / name)) for name in names),
            CommitOperationAdd(CARD, card.encode()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        with hub_errors(repo_id, how.repo_type, doing="write"):
            done = api.create_commit(
                repo_id, operations, repo_type=how.repo_type, parent_commit=there.commit,
                commit_message=message or f"{name}, by commandv {config.get('commandv', '')}".strip(),
            )  # fmt: skip
        size = sum((folder / name).stat().st_size for name in names) + len(card.encode())
    return Pushed(url, str(done.oid), size)


def load_shared(repo_id: str, *, revision: str | None = None) -> Artefact:
    """Load what a repository of the hub holds, an adapter, a profile or demonstrations; see `pull`."""
    try:
        return load_adapter(repo_id, revision=revision)
    except HubError as error:
        return _data_set(repo_id, revision, error)


@checked
def pull(repo_id: str, out: str | Path, *, revision: str | None = None) -> Artefact:
    """Download a repository of the hub as a directory of ours, which needs neither the hub nor its cache any more.

    Args:
        repo_id: the hub's `user/name`.
        out: the directory; an artefact of the same kind there is replaced.
        revision: branch, tag or commit.

    Returns:
        What it holds.

    Raises:
        HubError: neither a model repository nor a data set of this name, not allowed, or not reachable.
        FormatError: it holds nothing of ours or of a format that we read, or `out` holds something else.
    """
    require_repo_id(repo_id)
    out = Path(out)
    found = load_shared(repo_id, revision=revision)
    how = _how(found)
    require_place(out, how.kind)
    if isinstance(found, Profile) and found.path is not None:
        _copy(found.path, out, PROFILE)
    else:
        how.save(found, out)
    return how.load(out)


def _data_set(repo_id: str, revision: str | None, reason: HubError) -> Artefact:
    """Return the profile or the demonstrations in a data set; where there is none, the reason says so."""

    def read(folder: Path) -> Artefact:
        return load_profile(folder) if detect(folder) == PROFILE.format else load_demonstrations(folder)

    try:
        return fetched(repo_id, "dataset", read, revision=revision)
    except HubError:
        raise reason from None


def _copy(source: Path, out: Path, kind: Kind) -> None:
    """Write an artefact again elsewhere, with all that its configuration records."""
    config = read_config(source, kind)
    kept = {key: value for key, value in config.items() if key not in ("format", "format_version", "files")}
    parts = ((part, (source / one["file"]).read_bytes()) for part, one in config["files"].items())
    write_artefact(out, kind, kept, parts)


def _on_disk(artefact: Artefact | str | Path, scratch: Path) -> tuple[Path, Artefact, _Shared]:
    """Return a directory of ours that holds an artefact, the artefact, and how its kind is shared."""
    if isinstance(artefact, str | Path):
        path = Path(artefact)
        for how in _SHARED:
            if os.path.isdir(path) and detect(path) == how.kind.format:
                one = how.load(path)
                if read_config(path, how.kind)["format_version"] > 1:
                    return path, one, how
                artefact = one
                break
        else:
            artefact = load_adapter(artefact)
    how = _how(artefact)
    if isinstance(artefact, Profile) and artefact.path is not None:  # beside the rows it says how they were made
        return artefact.path, artefact, how
    how.save(artefact, scratch / "artefact")
    return scratch / "artefact", artefact, how


def _how(artefact: Artefact) -> _Shared:
    return next(how for how in _SHARED if isinstance(artefact, how.type))


def _stale(there: Listed, how: _Shared, names: list[str], repo_id: str, *, private: bool) -> list[str]:
    """Return the files of an earlier artefact in a repository, after checking that it holds nothing else."""
    if private and not there.private:
        raise HubError(
            f"the hub's repository {repo_id} is public, and nothing was uploaded; push with private=False (--public) "
            "when everybody may see it, or choose another name"
        )
    own = [name for name in there.files if name == CONFIG or how.kind.is_data(name)]
    foreign = sorted(name for name in there.files if name not in own and not _BESIDE.fullmatch(name))
    if foreign:
        raise FormatError(
            f"the hub's repository {repo_id} holds what is no part of a {how.kind.format} ({', '.join(foreign[:4])}), "
            "so it is left alone; choose another name"
        )
    return [name for name in own if name not in names]


def _licenses(one: Artefact, how: _Shared) -> dict[str, str]:
    """Return what the cards of the models that an artefact was made from say of their licences.

    A card that cannot be read is no reason not to upload: the licence is not stated, then.
    """
    donor = ModelRef(id=donor_of(one) or "") if isinstance(one, Adapter) else ModelRef()
    found = {}
    for name in dict.fromkeys((hub_id(how.model(one)), hub_id(donor))):
        if name is not None:
            with contextlib.suppress(CommandVError):
                found[name] = _license(name)
    return {name: license for name, license in found.items() if license}


def _license(name: str) -> str:
    from huggingface_hub import HfApi

    with hub_errors(name):
        data = HfApi().model_info(name).card_data
    said = data.to_dict() if data else {}
    return str(said.get("license_name") or said.get("license") or "")
