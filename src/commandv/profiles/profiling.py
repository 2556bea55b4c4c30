"""Profiling: running texts through a model and keeping every block's output at chosen tokens."""

from __future__ import annotations

import functools
import hashlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save as serialized
from torch import Tensor

from commandv.arguments import checked
from commandv.errors import InputError, MismatchError, WorkerError
from commandv.executors.executor import Executor, Local, Pool, Task
from commandv.models.identity import ModelRef
from commandv.models.lm import LM
from commandv.models.state import identity
from commandv.profiles.parts import find_part, joined, tensor_of, write_part
from commandv.profiles.profile import Layers, Places, Profile, load_profile, write_profile
from commandv.profiles.work import Wanted, Work
from commandv.progress import Report, track, unreported
from commandv.prompts.sets import PromptSet
from commandv.storage.directories import CONFIG, kept, read_config, require_place
from commandv.storage.files import cache_dir, digest, file_name
from commandv.storage.kinds import PROFILE

log = logging.getLogger(__name__)

CONTENT = 2  # part of a cached profile's key; another number where the same settings give other rows


@checked
def profile(
    lm: LM,
    prompts: PromptSet | Sequence[str],
    *,
    text: PromptSet | Sequence[str] | str | None = "builtin:text",
    places: Places = "lines",
    rows_per_text: int = 24,
    batch_size: int = 16,
    max_length: int | None = None,
    padding: Literal["left", "right"] = "right",
    cache: bool | str | Path = True,
) -> Profile:
    """Run prompts through a model and keep the residual stream where another model's can be compared.

    One row per prompt is the output of every block at the last prompt token (arXiv 2506.19140, section 3). With
    `text`, further rows lie inside running text, at characters where any two tokenizers that do not merge words or
    lines both end a token; the same characters for every model. Rows that are about to start a line are, like the last
    prompt token, about to choose a first word, so that writing converters learn from them what first words are made of.

    Memory is bounded by one batch: each block's output is reduced to the wanted rows as soon as it is computed.
    A run that is cut off resumes at the last complete part.

    Args:
        lm: the model.
        prompts: prompts for last-token rows, normally task-agnostic (`builtin:general`).
        text: passages for text rows, or where `load_prompts` finds them; a reply is read after its prompt in the
            model's own format. Their prompts give last-token rows as well. None for no text rows: writing converters
            are then fitted on last prompt tokens, which ruins what they write into some models.
        places: text rows where a line is about to start, or at the ends of words.
        rows_per_text: text rows kept per passage, spread evenly.
        batch_size: sequences per forward pass; they are sorted by length.
        max_length: cut longer prompts at their beginning; by default a prompt longer than the context is an error.
        padding: side; the result is the same up to rounding. Recurrent models are padded at the right whatever it is.
        cache: keep the profile in the cache directory, keyed by content (all that the model is at this moment, and the
            prompts); a path keeps it there instead; False only in memory. Of a model with hooks of others nothing is
            kept, which a warning says.

    Raises:
        InputError: an empty prompt, or one that is longer than the context; an adapter is attached, or with a path as
            `cache` a hook of others is: the profile of the changed model would be kept as the model's own.
        MismatchError: the path given as `cache` holds a profile of something else.
        FormatError: the path given as `cache` holds what is no profile, or a damaged one.
        FormatError: an activation that is not finite, with its layer and prompt.
        StorageError: the disk is full; finished parts are kept and the run resumes.
    """
    wanted = Wanted.of(
        prompts, text, places=places, rows_per_text=rows_per_text, batch_size=batch_size, max_length=max_length,
        padding=padding,
    )  # fmt: skip
    cache = Path(cache) if isinstance(cache, str) else cache
    model = None if cache is False else _described(lm, refuse=isinstance(cache, Path))
    if model is None:
        return _in_memory(Work(lm, wanted), wanted.hash)

    def make(target: Path) -> Profile:
        work = Work(lm, wanted)
        work.key = model.key  # known already
        with Local().pool(lambda: work) as pool:
            return _made(pool, _itself, work.members, model, wanted, target)

    return _kept(model, wanted, cache, make)


@checked
def profile_on(
    executor: Executor,
    load: Callable[[], LM],
    prompts: PromptSet | Sequence[str],
    *,
    text: PromptSet | Sequence[str] | str | None = "builtin:text",
    places: Places = "lines",
    rows_per_text: int = 24,
    batch_size: int = 16,
    max_length: int | None = None,
    cache: Path | None = None,
) -> Profile:
    """Profile a model whose passes an executor's workers run; the same profile, found by the same key, as `profile`.

    Only the workers load the model. Parts are written here as they arrive, so that a run that is cut off resumes at
    what is finished, there or with `profile`.

    Args:
        executor: gives the workers.
        load: loads the model on a worker: `functools.partial(load_model, ...)`.
        prompts: as in `profile`, and so are the others.
        text: passages.
        places: of text rows.
        rows_per_text: text rows kept per passage.
        batch_size: sequences per forward pass; halved where a worker's memory does not suffice.
        max_length: longer prompts are cut to.
        cache: where the profile is kept; by default in the cache directory.

    Raises:
        WorkerError: workers cannot be reached or are lost again and again; finished parts are kept.
        MismatchError: a worker has another model under the name, or other versions of the libraries.
        CommandVError: what `profile` raises.
    """
    wanted = Wanted.of(
        prompts, text, places=places, rows_per_text=rows_per_text, batch_size=batch_size, max_length=max_length,
        padding="right",
    )  # fmt: skip
    with executor.pool(functools.partial(_loaded, load, wanted), tasks=wanted.batches) as pool:
        return profile_in(pool, _itself, wanted, cache=cache)


def profile_in(
    pool: Pool,
    of: Callable[[Any], Work],
    wanted: Wanted,
    *,
    cache: Path | None = None,
    like: frozenset[str] = frozenset(),
) -> Profile:
    """Profile a model in a pool; `of` finds the work in what a worker keeps, `like` is as in `Task`. See `profile_on`.

    Raises:
        InputError: a worker cannot vouch for what the model is.
    """
    (found,) = pool.run(functools.partial(_plan, of), [Task("what to profile", (), like)], unreported)
    if found.error is not None:
        raise found.error
    model, parts = found.value
    return _kept(model, wanted, cache or True, lambda target: _made(pool, of, parts, model, wanted, target))


class Described(NamedTuple):
    """What decides a profile besides the texts."""

    ref: ModelRef  # the model, in its prompt format
    key: str  # hash of all that the model is
    dtype: str  # that it runs in


def _described(lm: LM, *, refuse: bool) -> Described | None:
    dtype = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
    key = _key(lm, refuse=refuse)
    return None if key is None else Described(lm.ref, key, dtype)


def _kept(model: Described, wanted: Wanted, cache: bool | Path, make: Callable[[Path], Profile]) -> Profile:
    """Return the profile from where it is kept, made there by `make` when it is not."""
    record = _record(model, wanted)
    own = isinstance(cache, Path)
    name = f"{file_name(Path(model.ref.id).name)}-{digest(_settings(model, wanted), CONTENT)}"
    target = cache if isinstance(cache, Path) else cache_dir() / "profiles" / name
    if own:
        require_place(target, PROFILE)

    def load() -> Profile:
        return _from_disk(target, model.ref, wanted.hash, record)

    return kept(target, CONFIG, load, lambda: make(target), kind=PROFILE, cache=not own)


def _record(model: Described, wanted: Wanted) -> dict[str, Any]:
    return {"dtype": model.dtype, "max_length": wanted.max_length, "identity": model.key}


def _settings(model: Described, wanted: Wanted) -> dict[str, Any]:
    """Return all that decides a profile's rows."""
    return {"model": asdict(model.ref), "prompts": wanted.hash, **_record(model, wanted)}


def _key(lm: LM, *, refuse: bool) -> str | None:
    """Return what the model is, None when nobody can vouch for that."""
    known = identity(lm)
    if known.attached:
        raise InputError(f"an adapter is attached to {lm.id}; detach it, or profile the changed model with cache=False")
    if not known.doubts:
        return known.key
    reasons = "; ".join(known.doubts)
    if refuse:
        raise InputError(f"a profile of {lm.id} cannot be kept as the model's own: {reasons}. Use cache=False")
    log.warning("the profile of %s is not cached: %s", lm.id, reasons)
    return None


def _from_disk(path: Path, ref: ModelRef, prompts_hash: str, made_with: dict[str, Any]) -> Profile:
    """Return a profile from disk if it is the one wanted."""
    found, config = load_profile(path), read_config(path, PROFILE)
    same = all(config.get(key) == value for key, value in made_with.items())
    if not same or found.prompts != prompts_hash or found.model != ref:
        raise MismatchError(
            f"{path}: holds a profile of {found.model.id} with other prompts, another model or other settings; "
            "choose another path or delete it"
        )
    log.info("profile of %s: from the cache", ref.id)
    return found


# -- the parts --------------------------------------------------------------------------------------------------------


def _made(
    pool: Pool, of: Callable[[Any], Work], parts: list[list[int]], model: Described, wanted: Wanted, target: Path
) -> Profile:
    """Run the parts, by the texts in them, that `target` does not hold yet, each written as it arrives; join them."""
    stamps = [digest(digest(_settings(model, wanted)), members, Work.BATCHES) for members in parts]
    found = {number: find_part(target, number, stamp) for number, stamp in enumerate(stamps)}
    files = {number: file for number, file in found.items() if file is not None}
    tasks = [
        Task(f"part {number + 1} of {len(parts)} of the profile of {model.ref.id}", (model.key, number, 1))
        for number in range(len(parts))
        if number not in files
    ]
    with track(f"profiling {model.ref.id}", total=sum(map(len, parts))) as advance:
        advance(sum(len(parts[number]) for number in files))
        smaller = functools.partial(_split, wanted.batch_size)
        for task, value, error in pool.run(functools.partial(_run_part, of), tasks, advance, smaller):
            if error is not None:
                raise error
            data, sha256 = value
            if hashlib.sha256(data).hexdigest() != sha256:
                raise WorkerError(
                    f"{task.key}: what arrived is not what the worker sent; run the same command again, what is "
                    "finished is kept"
                )
            files[task.args[1]] = write_part(target, task.args[1], stamps[task.args[1]], data)
    held = [files[number] for number in range(len(parts))]
    keys, places = _ordered([tensor_of(file, "keys") for file in held])
    layers = Layers(range(model.ref.n_layers), lambda layer: joined(held, places, f"layer.{layer}"))
    how = {"sets": list(wanted.sets), "places": wanted.places, "rows_per_text": wanted.rows_per_text}  # for people
    write_profile(target, model.ref, wanted.hash, keys, layers, {**_record(model, wanted), **how})
    return load_profile(target)


def _split(batch_size: int, task: Task) -> Task | None:
    """Return a part whose batches are run in twice as many pieces."""
    key, number, split = task.args
    if split >= batch_size:
        return None
    stem = task.key.partition(", batches in ")[0]
    return task._replace(key=f"{stem}, batches in {2 * split} pieces", args=(key, number, 2 * split))


# What workers do, which find their work by `of` in what they keep.


def _itself(work: Work) -> Work:
    return work


def _loaded(load: Callable[[], LM], wanted: Wanted) -> Work:
    return Work(load(), wanted)


def _plan(of: Callable[[Any], Work], kept: Any, _report: Report) -> tuple[Described, list[list[int]]]:
    work = of(kept)
    model = _described(work.lm, refuse=True)
    assert model is not None
    return model, work.members


def _run_part(
    of: Callable[[Any], Work], kept: Any, report: Report, key: str, number: int, split: int
) -> tuple[bytes, str]:
    """Run a part of the model of this key; return its file and what that hashes to."""
    work = of(kept)
    if work.key != key:
        raise MismatchError(
            f"the worker on {socket.gethostname()} has another model under the name {work.lm.id}, or the same in "
            "another dtype; give every node the same files, and say dtype"
        )
    data = serialized(work.run(number, report, split))
    return data, hashlib.sha256(data).hexdigest()


def _in_memory(work: Work, prompts_hash: str) -> Profile:
    with track(f"profiling {work.lm.id}", total=len(work)) as advance:
        parts = [work.run(number, advance) for number in range(len(work.parts))]
    keys, places = _ordered([part["keys"] for part in parts])
    order = torch.cat(places).argsort()
    rows = {
        layer: torch.cat([part.pop(f"layer.{layer}") for part in parts])[order] for layer in range(work.lm.n_layers)
    }
    return Profile(rows, keys, work.lm.ref, prompts_hash)


def _ordered(parts: Sequence[Tensor]) -> tuple[np.ndarray, list[Tensor]]:
    """Return all keys in their order, and for each part the places that its rows have in it."""
    keys = torch.cat(list(parts)).numpy()
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    places = torch.from_numpy(np.argsort(order))
    return keys[order], list(places.split([len(part) for part in parts]))
