"""Profiles: the residual stream of a model at keyed places in a set of texts."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from commandv.attaching import attached
from commandv.encoding import Encoded, encode, pad, run_blocks
from commandv.errors import FormatError, InputError, MismatchError
from commandv.generation import batches
from commandv.models import LM, ModelRef
from commandv.paths import atomic_directory, cache_dir, digest, storage_errors
from commandv.progress import track
from commandv.prompts import Prompt, PromptSet, as_prompts

log = logging.getLogger(__name__)

END = -1  # the offset of a prompt's last token, which has no place in the text
FORMAT_VERSION = 1
Rows = Literal["end", "text", "both"]
Places = Literal["lines", "words"]


@dataclass(frozen=True, eq=False)
class Profile:
    """The residual stream of one model at places that another model's profile can share.

    Attributes:
        activations: layer -> [rows, d_model], bfloat16, memory-mapped when it comes from disk.
        keys: int64 [rows, 2], (prompt number, character offset in its text) with `END` for the last prompt token.
            Two profiles of the same prompts pair up by joining keys, whatever their tokenizers.
        model: which model, in which prompt format.
        prompts: hash of the prompt sets.
        path: where it lies on disk, None for one in memory.
    """

    activations: Mapping[int, Tensor]
    keys: np.ndarray
    model: ModelRef
    prompts: str
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for layer, rows in self.activations.items():
            if rows.shape != (len(self.keys), self.model.d_model):
                raise FormatError(
                    f"profile of {self.model.id}, layer {layer}: got shape {tuple(rows.shape)}, "
                    f"expected [{len(self.keys)}, {self.model.d_model}]"
                )

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks of the model."""
        return self.model.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.model.d_model

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        n_end = int((self.keys[:, 1] == END).sum())
        return f"Profile({self.model.id}, {n_end} end rows, {len(self) - n_end} text rows, {self.n_layers} layers)"

    def layer(self, layer: int) -> Tensor:
        """Return one layer's rows, [rows, d_model].

        Raises:
            InputError: there is no such layer in the profile.
        """
        if layer not in self.activations:
            raise InputError(f"profile of {self.model.id} holds layers {sorted(self.activations)}, not {layer}")
        return self.activations[layer]

    def first(self, n: int) -> Profile:
        """Return the profile with the last-token rows of its first `n` prompts only, and all text rows.

        Raises:
            InputError: fewer than 2 prompts.
        """
        if n < 2:
            raise InputError(f"a profile of {n} prompts: expected at least 2")
        keep = (self.keys[:, 0] < n) | (self.keys[:, 1] != END)
        index = torch.from_numpy(np.flatnonzero(keep))
        activations = {layer: rows[index] for layer, rows in self.activations.items()}
        return Profile(activations, self.keys[keep], self.model, digest(self.prompts, n))


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
        padding: side; the result is the same up to rounding.
        cache: keep the profile in the cache directory, keyed by content (model, prompts, format, dtype); a path keeps
            it there instead; False only in memory.

    Raises:
        InputError: an empty prompt, or one that is longer than the context; an adapter is attached and the profile of
            the changed model would be cached as the model's own.
        MismatchError: the path given as `cache` holds a profile of something else.
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
    settings = {"model": asdict(lm.ref), "prompts": prompts_hash, **made_with}
    if cache is False:
        work = _Work(lm, items, n_end, (places, rows_per_text), batch_size, max_length, padding)
        rows, keys = work.collect(None)
        return Profile(rows, keys, lm.ref, prompts_hash)
    if attached(lm):
        raise InputError(f"an adapter is attached to {lm.id}; detach it, or profile the changed model with cache=False")
    name = f"{Path(lm.id).name}-{digest(settings, FORMAT_VERSION)}"
    target = cache if isinstance(cache, Path) else cache_dir() / "profiles" / name
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if (target / "config.json").exists():
            found = load_profile(target)
            config = json.loads((target / "config.json").read_text())
            same = all(config.get(key) == value for key, value in made_with.items())
            if same and found.prompts == prompts_hash and found.model == lm.ref:
                log.info("profile of %s: from the cache", lm.id)
                return found
            raise MismatchError(
                f"{target}: holds a profile of {found.model.id} with other prompts, another model or other settings; "
                "choose another path or delete it"
            )
        work = _Work(lm, items, n_end, (places, rows_per_text), batch_size, max_length, padding)
        parts = target.with_name(f"{target.name}.parts")
        rows, keys = work.collect(parts, digest(settings))
        save_profile(Profile(rows, keys, lm.ref, prompts_hash), target, dtype=dtype, max_length=max_length)
        for part in parts.glob("*"):
            part.unlink()
        parts.rmdir()
    return load_profile(target)


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
        self.lm, self.batch_size, self.padding = lm, batch_size, padding
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

    def collect(self, parts: Path | None, settings: str = "") -> tuple[dict[int, Tensor], np.ndarray]:
        """Run every batch and return the rows by layer in key order.

        With `parts`, keep finished parts there and reuse those of the same `settings`, a hash.
        """
        order = list(batches([len(one.ids) for one in self.encoded], self.batch_size))
        groups = [order[i : i + self.PART] for i in range(0, len(order), self.PART)]
        finished: list[dict[str, Tensor]] = []
        with track(f"profiling {self.lm.id}", total=len(self.encoded)) as advance:
            for number, group in enumerate(groups):
                members = [i for batch in group for i in batch]
                file = None
                if parts is not None:
                    with storage_errors(parts):
                        parts.mkdir(parents=True, exist_ok=True)
                    stamp = digest(settings, members, self.PART)
                    file = parts / f"part-{number:05d}-{stamp}.safetensors"
                part = _finished_part(file) if file is not None else None
                if part is not None:
                    finished.append(part)
                    advance(len(members))
                    continue
                rows = self._run(group, advance)
                if file is not None:
                    _save_atomically(rows, file)
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
            batch = pad(self.lm, [self.encoded[i].ids for i in members], self.padding)
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
                for layer, values in read_rows(self.lm, batch, at).items():
                    _require_finite(values, layer, self.lm.id, [members[row] for row in rows])
                    collected[layer].append(values)
            advance(len(members))
        out = {
            f"layer.{layer}": torch.cat(values) if values else torch.zeros(0, self.lm.d_model, dtype=torch.bfloat16)
            for layer, values in collected.items()
        }
        out["keys"] = torch.tensor(keys, dtype=torch.int64).reshape(-1, 2)
        return out


def read_rows(lm: LM, batch: Any, at: tuple[Tensor, Tensor]) -> dict[int, Tensor]:
    """Run a padded batch and return every block's output at (row, column) places, bfloat16 [places, d_model]."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_block: Any, _inputs: Any, output: Any) -> None:
            h = output[0] if isinstance(output, tuple) else output
            found[layer] = h[at[0].to(h.device), at[1].to(h.device)].to(torch.bfloat16).cpu()

        return hook

    handles: list[Any] = []

    def enter(*_: Any) -> None:  # attached adapters hook the blocks when a pass begins; these hooks come after theirs
        handles.extend(block.register_forward_hook(keep(layer)) for layer, block in enumerate(lm.blocks))

    handles.append(lm.owner.register_forward_pre_hook(enter))
    try:
        with torch.inference_mode():
            run_blocks(lm, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: rows.clone() for layer, rows in found.items()}


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


def _finished_part(file: Path) -> dict[str, Tensor] | None:
    """Return a part from disk, None when there is none or it was cut short (the machine went down while writing)."""
    if not file.exists():
        return None
    try:
        return load_file(file)
    except safetensors.SafetensorError as error:
        log.warning("%s is damaged (%s) and made again", file, error)
        return None


def _save_atomically(rows: dict[str, Tensor], file: Path) -> None:
    temporary = file.with_suffix(".tmp")
    with storage_errors(file):
        try:
            save_file(rows, temporary)
        except safetensors.SafetensorError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(str(error)) from error
        temporary.rename(file)


def save_profile(one: Profile, target: Path, *, dtype: str = "", max_length: int | None = None) -> None:
    """Write a profile: `config.json`, `keys.safetensors`, and one safetensors file per layer.

    Args:
        one: the profile.
        target: the directory; it is replaced.
        dtype: what the model ran in, for the record.
        max_length: what prompts were cut to, for the record.

    Raises:
        StorageError: the disk is full or not writable; nothing at `target` changes.
    """
    config = {
        "format": "commandv-profile",
        "format_version": FORMAT_VERSION,
        "model": asdict(one.model),
        "prompts": one.prompts,
        "dtype": dtype,
        "max_length": max_length,
        "rows": len(one),
        "layers": sorted(one.activations),
    }
    with atomic_directory(target) as directory:
        _save_atomically({"keys": torch.from_numpy(one.keys.copy())}, directory / "keys.safetensors")
        for layer, rows in one.activations.items():
            _save_atomically({"rows": rows.contiguous()}, directory / f"layer-{layer:03d}.safetensors")
        (directory / "config.json").write_text(json.dumps(config, indent=2))


def load_profile(path: str | Path) -> Profile:
    """Open a profile directory; the activations stay on disk, memory-mapped.

    Raises:
        FormatError: not a profile, of an unknown version, or truncated.
    """
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: not a profile directory ({error})") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path}: not a profile directory (config.json holds a {type(config).__name__})")
    if config.get("format") != "commandv-profile" or config.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path}: expected a commandv-profile of version {FORMAT_VERSION}, got {config.get('format')!r} version "
            f"{config.get('format_version')!r}; profile again, or upgrade commandv"
        )
    try:
        keys = load_file(path / "keys.safetensors")["keys"].numpy()
        rows = {layer: load_file(path / f"layer-{layer:03d}.safetensors")["rows"] for layer in config["layers"]}
        ref = ModelRef(**config["model"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path}: the profile is damaged ({error}); delete the directory and profile again"
        ) from error
    return Profile(rows, keys, ref, config["prompts"], path)


def paired_rows(donor: Profile, recipient: Profile, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join two profiles by their keys.

    Args:
        donor: one profile.
        recipient: the other, of the same prompts.
        rows: last-token rows (`"end"`), text rows (`"text"`), or both.

    Returns:
        (row numbers in `donor`, row numbers in `recipient`, prompt numbers), each int64 [pairs].

    Raises:
        MismatchError: profiles of different prompts.
        InputError: fewer than 2 shared rows of this sort.
    """
    if donor.prompts != recipient.prompts:
        raise MismatchError(
            f"the profiles of {donor.model.id} and {recipient.model.id} are of different prompts "
            f"({donor.prompts} and {recipient.prompts}); profile both models on the same sets"
        )
    flat = [one.keys[:, 0] * (1 << 32) + one.keys[:, 1] + 1 for one in (donor, recipient)]
    _, i, j = np.intersect1d(flat[0], flat[1], assume_unique=True, return_indices=True)
    if rows != "both":
        is_end = donor.keys[i, 1] == END
        keep = is_end if rows == "end" else ~is_end
        i, j = i[keep], j[keep]
    if len(i) < 2:
        hint = "; profile with text=load_prompts('builtin:text') for text rows" if rows == "text" else ""
        raise InputError(f"{len(i)} shared {rows} rows between the two profiles, expected at least 2{hint}")
    return i, j, donor.keys[i, 0]
