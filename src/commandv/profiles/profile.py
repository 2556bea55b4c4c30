"""Profiles: the residual stream of a model at keyed places in a set of texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import safetensors
import torch
from torch import Tensor

from commandv.arguments import checked
from commandv.errors import FormatError, InputError, MismatchError
from commandv.models.identity import ModelRef
from commandv.storage.directories import CONFIG, read_artefact, write_artefact
from commandv.storage.files import digest
from commandv.storage.hub import opened
from commandv.storage.kinds import PROFILE
from commandv.storage.tensors import read_safetensors, safetensors_bytes

END = -1  # the offset of a prompt's last token, which has no place in the text
Rows = Literal["end", "text", "both"]
Places = Literal["lines", "words"]


class Layers(Mapping[int, Tensor]):
    """Rows by layer, read or made each time that a layer is asked for, so that memory holds the layers in use only."""

    def __init__(self, layers: Iterable[int], get: Callable[[int], Tensor]) -> None:
        self._layers, self._get = tuple(sorted(set(layers))), get

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._layers:
            raise KeyError(layer)
        return self._get(layer)

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@checked
@dataclass(frozen=True, eq=False)
class Profile:
    """The residual stream of one model at places that another model's profile can share.

    Attributes:
        activations: layer -> [rows, d_model], bfloat16. From disk a layer is memory-mapped each time it is asked for,
            and given back to the system when it is dropped.
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
        if not isinstance(self.activations, Layers):  # whoever makes those knows their shapes
            self.require_shapes()

    def require_shapes(self) -> None:
        """Raise `FormatError` unless every layer is one of the model's and has a row per key, of the model's width."""
        if not 0 <= min(self.activations, default=0) <= max(self.activations, default=0) < self.model.n_layers:
            raise FormatError(
                f"profile of {self.model.id}: layers {sorted(self.activations)} of a model of {self.model.n_layers} "
                "layers"
            )
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

    @property
    def n_end(self) -> int:
        """Number of last-token rows; all others are text rows."""
        return int((self.keys[:, 1] == END).sum())

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        n_text = len(self) - self.n_end
        return f"Profile({self.model.id}, {self.n_end} end rows, {n_text} text rows, {self.n_layers} layers)"

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
        activations = Layers(self.activations, lambda layer: self.activations[layer][index])
        return Profile(activations, self.keys[keep], self.model, digest(self.prompts, n))


@checked
def save_profile(
    one: Profile, target: Path, *, dtype: str = "", max_length: int | None = None, identity: str | None = None
) -> None:
    """Write a profile: `config.json`, `keys-HASH.safetensors`, and one safetensors file per layer.

    Args:
        one: the profile.
        target: the directory; a profile there is replaced.
        dtype: what the model ran in, for the record.
        max_length: what prompts were cut to, for the record.
        identity: what the model was, by which `profile` finds it again.

    Raises:
        FormatError: `target` holds something else.
        StorageError: the disk is full or not writable; nothing at `target` changes.
    """
    record = {"dtype": dtype, "max_length": max_length, "identity": identity}
    write_profile(target, one.model, one.prompts, one.keys, one.activations, record)


def write_profile(
    target: Path,
    model: ModelRef,
    prompts: str,
    keys: np.ndarray,
    layers: Mapping[int, Tensor],
    record: Mapping[str, Any],
) -> None:
    """Write a profile whose layers are taken one after another; see `save_profile`, which names the record's parts."""
    config = {"model": asdict(model), "prompts": prompts, **record, "rows": len(keys), "layers": sorted(layers)}
    first = ("keys", safetensors_bytes("keys", torch.from_numpy(keys)))
    rest = ((f"layer-{layer:03d}", safetensors_bytes("rows", layers[layer])) for layer in layers)
    write_artefact(target, PROFILE, config, itertools.chain([first], rest))


# All that a profile's config.json may say; what is for the record alone has no part in reading it.
KEYS = {
    *("format", "format_version", "files", "model", "prompts", "rows", "layers"),
    *("dtype", "max_length", "identity", "sets", "places", "rows_per_text"),
}


@checked
def load_profile(source: str | Path, *, revision: str | None = None) -> Profile:
    """Open a profile: a directory, or a data set on the hub; the activations stay on disk, memory-mapped.

    Args:
        source: the directory, or the hub's `user/name`.
        revision: branch, tag or commit on the hub.

    Raises:
        FormatError: not a profile, of an unknown version, or truncated.
        HubError: not on the hub, not allowed, or not reachable.
    """
    return opened(source, "dataset", _read, revision=revision)


def _read(path: Path) -> Profile:

    def build(config: dict[str, Any], files: dict[str, Path]) -> Profile:
        if foreign := sorted(config.keys() - KEYS):
            raise FormatError(
                f"{path}: {CONFIG} says {', '.join(map(repr, foreign))}, which this version does not know and "
                "which may change what the rows mean; open it with the commandv that wrote it, or profile again"
            )
        try:
            keys = read_safetensors(files["keys"]).content["keys"].numpy()
            rows = Layers(config["layers"], lambda layer: _mapped(files[f"layer-{layer:03d}"]))
            if keys.dtype != np.int64 or keys.ndim != 2 or keys.shape[1] != 2:
                raise ValueError(f"keys of {keys.dtype} {keys.shape}, expected int64 [rows, 2]")
            if len(keys) and (keys.min() < END or keys.max() >= 1 << 31 or len(np.unique(keys, axis=0)) < len(keys)):
                raise ValueError("keys that are no places in prompts, or repeated")
            if not all(rows[layer].is_floating_point() for layer in rows) or not isinstance(config["prompts"], str):
                raise ValueError("rows that are no floating-point numbers, or prompts without a hash")
            model = pydantic.TypeAdapter(ModelRef).validate_python(vars(ModelRef(**config["model"])))
            found = Profile(rows, keys, model, config["prompts"], path)
            found.require_shapes()
            return found
        except FileNotFoundError:  # replaced this moment
            raise
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{path}: the profile is damaged ({error}); delete the directory and profile again"
            ) from error

    return read_artefact(path, PROFILE, build)


def _mapped(file: Path) -> Tensor:
    """Map a layer's rows."""
    try:
        return read_safetensors(file).content["rows"]
    except KeyError as error:
        raise FormatError(f"{file}: holds no rows; delete the directory and profile again") from error


def paired_rows(donor: Profile, recipient: Profile, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join two profiles by their keys.

    Args:
        donor: one profile.
        recipient: the other, of the same prompts.
        rows: last-token rows (`"end"`), text rows (`"text"`), or both.

    Returns:
        (row numbers in `donor`, row numbers in `recipient`, prompt numbers), each int64 [pairs].
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
