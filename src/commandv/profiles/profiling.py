"""Profiling: running texts through a model and keeping every block's output at chosen tokens."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load
from safetensors.torch import save as serialized
from torch import Tensor

from commandv.errors import FormatError, InputError, MismatchError
from commandv.models.encoding import Batch, Encoded, encode, pad, run_blocks
from commandv.models.generation import batches
from commandv.models.identity import ModelRef, identity
from commandv.models.live import reading
from commandv.models.load import LM
from commandv.models.prefix import NOT_SHARED, Prefix, shared_prefix
from commandv.profiles.parts import read_part, write_part
from commandv.profiles.profile import END, PROFILE, Places, Profile, load_profile, save_profile
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
    if kept_as is None:
        work = _Work(lm, items, n_end, (places, rows_per_text), batch_size, max_length, padding)
        rows, keys = work.collect(None)
        return Profile(rows, keys, ref, prompts_hash)
    name = f"{file_name(Path(lm.id).name)}-{digest(settings, CONTENT)}"
    target = cache if isinstance(cache, Path) else cache_dir() / "profiles" / name
    if isinstance(cache, Path):
        require_place(target, PROFILE)

    def make() -> Profile:
        work = _Work(lm, items, n_end, (places, rows_per_text), batch_size, max_length, padding)
        rows, keys = work.collect(target, digest(settings))
        made = Profile(rows, keys, ref, prompts_hash)
        save_profile(made, target, dtype=dtype, max_length=max_length, identity=kept_as)
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


class _Work:
    """One profiling run: what to run, which rows to keep, and the parts finished so far."""

    PART = 8  # batches per part on disk

    def __init__(
        self,
        lm: LM,
        items: list[Prompt],
        n_end: int,
        per_text: tuple[Places, int],
        batch_size: int,
        max_length: int | None,
        padding: Literal["left", "right"],
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: expected 1 or more")
        self.lm, self.batch_size = lm, batch_size
        self.padding: Literal["left", "right"] = "right" if lm.recurrent else padding
        self.encoded: list[Encoded] = []
        self.wanted: list[list[tuple[int, int]]] = []  # per item: (token index, offset key)
        for number, item in enumerate(items):
            is_text = number >= n_end
            encoded = encode(lm, item.text, item.response if is_text else "", max_length=max_length)
            wanted = [(encoded.n_prompt - 1, END)]
            if is_text:
                wanted += _shared_places(encoded, item.response or item.text.strip(), *per_text)
            # Nothing after the last wanted token can change what is wanted.
            last = max((index for index, _ in wanted), default=0)
            self.encoded.append(encoded._replace(ids=encoded.ids[: last + 1]))
            self.wanted.append(wanted)

    @functools.cached_property
    def prefix(self) -> Prefix:
        """What all sequences begin with, before the first row that is wanted."""
        stops = [1 + min((index for index, _ in wanted), default=0) for wanted in self.wanted]
        return shared_prefix(self.lm, [one.ids for one in self.encoded], stops)

    def collect(self, target: Path | None, settings: str = "") -> tuple[dict[int, Tensor], np.ndarray]:
        """Run every batch and return the rows by layer in key order.

        With `target`, keep finished parts there and reuse those of the same `settings`, a hash.
        """
        order = list(batches([len(one.ids) for one in self.encoded], self.batch_size))
        groups = [order[i : i + self.PART] for i in range(0, len(order), self.PART)]
        finished: list[dict[str, Tensor]] = []
        with track(f"profiling {self.lm.id}", total=len(self.encoded)) as advance:
            for number, group in enumerate(groups):
                members = [i for batch in group for i in batch]
                stamp = digest(settings, members, self.PART)
                part = None if target is None else read_part(target, number, stamp)
                if part is not None:
                    finished.append(load(part))
                    advance(len(members))
                    continue
                rows = self._run(group, advance)
                if target is not None:
                    write_part(target, number, stamp, serialized(rows))
                finished.append(rows)
        keys = torch.cat([part["keys"] for part in finished])
        ranking = np.lexsort((keys[:, 1].numpy(), keys[:, 0].numpy()))
        index = torch.from_numpy(ranking)
        rows_by_layer = {
            layer: torch.cat([part.pop(f"layer.{layer}") for part in finished])[index]
            for layer in range(self.lm.n_layers)
        }
        return rows_by_layer, keys[index].numpy()

    def _run(self, group: list[list[int]], advance: Callable[[int], None]) -> dict[str, Tensor]:
        collected: dict[int, list[Tensor]] = {layer: [] for layer in range(self.lm.n_layers)}
        keys: list[tuple[int, int]] = []
        for members in group:
            batch = pad(self.lm, [self.encoded[i].ids for i in members], self.padding, shared=self.prefix.length)
            width = batch.input_ids.shape[1]
            rows, columns = [], []
            for row, item in enumerate(members):
                shift = width - len(self.encoded[item].ids) if self.padding == "left" else 0
                for index, offset in self.wanted[item]:
                    rows.append(row)
                    columns.append(index + shift)
                    keys.append((item, offset))
            if rows:
                at = (torch.tensor(rows), torch.tensor(columns))
                for layer, values in read_rows(self.lm, batch, at, self.prefix).items():
                    _require_finite(values, layer, self.lm.id, [members[row] for row in rows])
                    collected[layer].append(values)
            advance(len(members))
        out = {
            f"layer.{layer}": torch.cat(values) if values else torch.zeros(0, self.lm.d_model, dtype=torch.bfloat16)
            for layer, values in collected.items()
        }
        out["keys"] = torch.tensor(keys, dtype=torch.int64).reshape(-1, 2)
        return out


def read_rows(lm: LM, batch: Batch, at: tuple[Tensor, Tensor], prefix: Prefix = NOT_SHARED) -> dict[int, Tensor]:
    """Run a padded batch and return every block's output at (row, column) places, bfloat16 [places, d_model].

    No place may lie in the prefix.
    """
    found: dict[int, Tensor] = {}
    rows, columns = at[0], at[1] - prefix.length

    def keep(layer: int, h: Tensor) -> None:
        found[layer] = h[rows.to(h.device), columns.to(h.device)].to(torch.bfloat16).cpu()

    readers = {layer: functools.partial(keep, layer) for layer in range(lm.n_layers)}
    with torch.inference_mode(), reading(lm, readers):
        run_blocks(lm, prefix.rest(batch), prefix.past(len(batch.input_ids)))
    return {layer: states.clone() for layer, states in found.items()}


def _require_finite(values: Tensor, layer: int, id: str, items: list[int]) -> None:
    finite = torch.isfinite(values).all(dim=1)
    if not finite.all():
        item = items[int((~finite).nonzero()[0])]
        raise FormatError(
            f"{id}: NaN or infinity in the output of layer {layer} for prompt {item + 1}. The weights are broken, or "
            "the dtype overflows: load the model with dtype='float32' or 'bfloat16'"
        )


def _shared_places(encoded: Encoded, text: str, places: Places, limit: int) -> list[tuple[int, int]]:
    """Return (token index, offset) at places of `text`, at most `limit`, spread evenly.

    The offsets are chosen from the text alone, before looking at this tokenizer, so that two models choose alike.
    """
    pattern = r"(?<=\n)(?=[^\n])" if places == "lines" else r"(?<=\S)(?=\s|$)"
    stops = [match.start() for match in re.finditer(pattern, text)]
    if len(stops) > limit:
        stops = [stops[i * len(stops) // limit] for i in range(limit)]
    last_token = {end: index for index, end in enumerate(encoded.text_ends) if end >= 0}
    return [(last_token[offset], offset) for offset in stops if offset in last_token]
