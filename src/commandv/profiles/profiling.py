"""Profiling: running texts through a model and keeping every block's output at chosen tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save as serialized
from torch import Tensor

from commandv.errors import InputError, MismatchError
from commandv.models.identity import ModelRef, identity
from commandv.models.load import LM
from commandv.profiles.parts import find_part, joined, tensor_of, write_part
from commandv.profiles.profile import PROFILE, Layers, Places, Profile, load_profile, write_profile
from commandv.profiles.work import Wanted, Work
from commandv.progress import track
from commandv.prompts.sets import Prompt, PromptSet, as_prompts
from commandv.storage.directories import CONFIG, kept, read_config, require_place
from commandv.storage.files import cache_dir, digest, file_name

log = logging.getLogger(__name__)

CONTENT = 2  # part of a cached profile's key; another number where the same settings give other rows


def profile(
    lm: LM,
    prompts: PromptSet | Sequence[str],
    *,
    text: PromptSet | None = None,
    places: Places = "lines",
    rows_per_text: int = 24,
    batch_size: int = 16,
    max_length: int | None = None,
    padding: Literal["left", "right"] = "right",
    cache: bool | Path = True,
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
        text: passages for text rows (`builtin:text`); a reply is read after its prompt in the model's own format. Their
            prompts give last-token rows as well.
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
    ends = as_prompts(prompts)
    n_end = len(ends)
    items: list[Prompt] = list(ends)
    hashes = [ends.hash]
    if text is not None:
        items += list(text)
        hashes.append(text.hash)
    dtype = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
    prompts_hash = digest(hashes, [places, rows_per_text] if text is not None else [])
    made_with = {"dtype": dtype, "max_length": max_length}
    kept_as = None if cache is False else _key(lm, refuse=isinstance(cache, Path))
    ref = lm.ref
    settings = {"model": asdict(ref), "identity": kept_as, "prompts": prompts_hash, **made_with}
    wanted = Wanted(tuple(items), n_end, places, rows_per_text, batch_size, max_length, padding)
    if kept_as is None:
        return _in_memory(Work(lm, wanted), prompts_hash)
    name = f"{file_name(Path(lm.id).name)}-{digest(settings, CONTENT)}"
    target = cache if isinstance(cache, Path) else cache_dir() / "profiles" / name
    if isinstance(cache, Path):
        require_place(target, PROFILE)

    def make() -> Profile:
        keys, layers = _on_disk(Work(lm, wanted), target, digest(settings))
        write_profile(target, ref, prompts_hash, keys, layers, {**made_with, "identity": kept_as})
        return load_profile(target)

    def load() -> Profile:
        return _from_disk(target, ref, prompts_hash, {**made_with, "identity": kept_as})

    return kept(target, CONFIG, load, make, kind=PROFILE, cache=not isinstance(cache, Path))


def _key(lm: LM, *, refuse: bool) -> str | None:
    """Return what the model is, None when nobody can vouch for that.

    Raises:
        InputError: an adapter is attached; with `refuse`, whatever cannot be vouched for.
    """
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


def _on_disk(work: Work, target: Path, settings: str) -> tuple[np.ndarray, Layers]:
    """Run the parts that `target` does not hold yet, each written as it finishes; return keys and rows by layer.

    Args:
        work: what to run.
        target: where parts are kept; those of the same settings and texts are not run again.
        settings: hash of all that decides the rows.
    """
    stamps = [digest(settings, work.members(number), Work.BATCHES) for number in range(len(work.parts))]
    files: dict[int, Path] = {}
    for number, stamp in enumerate(stamps):
        if (found := find_part(target, number, stamp)) is not None:
            files[number] = found
    with track(f"profiling {work.lm.id}", total=len(work)) as advance:
        advance(sum(len(work.members(number)) for number in files))
        for number in range(len(work.parts)):
            if number not in files:
                files[number] = write_part(target, number, stamps[number], serialized(work.run(number, advance)))
    held = [files[number] for number in range(len(work.parts))]
    keys, places = _ordered([tensor_of(file, "keys") for file in held])
    return keys, Layers(range(work.lm.n_layers), lambda layer: joined(held, places, f"layer.{layer}"))


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
