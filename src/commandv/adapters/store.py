"""Adapters on disk: a directory of `config.json` and `tensors-HASH.safetensors`."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import safetensors.torch
import torch
from pydantic_core import PydanticSerializationError

from commandv.adapters.adapter import Adapter, Intervention
from commandv.adapters.carried import Carried
from commandv.adapters.edit import Edit, Spec
from commandv.arguments import checked
from commandv.errors import FormatError, InputError
from commandv.models.identity import ModelRef
from commandv.storage.directories import VERSION, read_artefact, write_artefact
from commandv.storage.kinds import ADAPTER
from commandv.storage.tensors import read_safetensors

EDITS: dict[str, type[Edit]] = {cls.kind: cls for cls in (Intervention, Carried)}

Model = TypeVar("Model", bound=pydantic.BaseModel)


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class _ModelSpec(_Strict):
    id: str
    revision: str
    d_model: int
    n_layers: int
    template: str
    weights: str = ""
    format: str = ""


class _FileSpec(_Strict):
    file: str
    sha256: str
    size: int


class _Config(_Strict):
    format: str
    format_version: int
    commandv: str
    name: str
    model: _ModelSpec
    interventions: list[dict[str, Any]]
    provenance: dict[str, Any]
    files: dict[str, _FileSpec] = {}  # none in version 1


@checked
def save(adapter: Adapter, path: str | Path) -> Path:
    """Write an adapter as a directory, atomically; an earlier adapter there is replaced.

    Raises:
        StorageError: not writable or disk full; what was there before is untouched.
        FormatError: `path` holds something else, or the provenance is not plain JSON.
    """
    if not str(path):
        raise InputError("save to '': expected a directory, '.' for the current one")
    path = Path(path)
    specs: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for layer in adapter.layers:
        for one in adapter.interventions[layer]:
            number = len(specs)
            specs.append(one.spec(layer).model_dump())
            for part, value in one.tensors().items():
                # A copy each, because safetensors refuses tensors that share memory.
                tensors[f"{number}.{part}"] = torch.clone(
                    value.detach().float().cpu(), memory_format=torch.contiguous_format
                )
    model = asdict(adapter.model)
    known = {name: value for name, value in model.items() if value or name not in ("weights", "format")}  # newer fields
    try:
        config = _Config(
            format=ADAPTER.format,
            format_version=VERSION,
            commandv=importlib.metadata.version("commandv"),
            name=adapter.name,
            model=_ModelSpec(**known),
            interventions=specs,
            provenance=dict(adapter.provenance),
        )
        text = config.model_dump_json(indent=2, exclude_unset=True)  # NaN and infinity, which JSON lacks, become null
    except (PydanticSerializationError, pydantic.ValidationError, TypeError) as error:
        raise FormatError(f"{path}: the provenance of {adapter.name} is not plain JSON ({error})") from error
    write_artefact(path, ADAPTER, json.loads(text), [("tensors", safetensors.torch.save(tensors))])
    return path


def read(path: str | Path) -> Adapter:
    """Read an adapter directory of our format.

    Raises:
        FormatError: missing or truncated files, another format or version, unknown keys or kinds, tensors whose
            shapes are not what the config says, or values that are not finite.
    """
    return read_artefact(Path(path), ADAPTER, lambda raw, files: _opened(raw, files, Path(path)))


def _opened(raw: dict[str, Any], files: dict[str, Path], path: Path) -> Adapter:
    config = _validated(_Config, raw, path)
    if set(files) != {"tensors"}:
        raise FormatError(f"{path}: config.json names the data files {sorted(files)}, expected tensors")
    tensors = read_safetensors(files["tensors"]).content
    return _build(config, tensors, path)


def _spec(raw: dict[str, Any], path: Path, number: int) -> Spec:
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in EDITS:
        raise FormatError(f"{path}: intervention {number} is of the unknown kind {kind!r}; upgrade commandv")
    return _validated(EDITS[kind].spec_type, raw, path, "interventions", number)


def _validated(model: type[Model], raw: Any, path: Path, *place: str | int) -> Model:
    try:
        return model.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (*place, *first["loc"])))
        raise FormatError(
            f"{path}: config.json, {where}: {first['msg']}; written by a newer commandv, or tampered with"
        ) from error


def _build(config: _Config, tensors: dict[str, torch.Tensor], path: Path) -> Adapter:
    interventions: dict[int, tuple[Edit, ...]] = {}
    specs = [_spec(one, path, i) for i, one in enumerate(config.interventions)]
    layouts = [EDITS[spec.kind].shapes(spec, config.model.d_model) for spec in specs]
    expected = {f"{number}.{part}" for number, layout in enumerate(layouts) for part in layout}
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise FormatError(f"{path}: tensors {odd[:4]} are missing or not in the config")
    for number, (spec, layout) in enumerate(zip(specs, layouts, strict=True)):
        parts = {part: tensors[f"{number}.{part}"] for part in layout}
        for part, shape in layout.items():
            if tuple(parts[part].shape) != shape or parts[part].dtype != torch.float32:
                raise FormatError(
                    f"{path}: {number}.{part} is {parts[part].dtype} {tuple(parts[part].shape)}, "
                    f"the config says float32 {shape}"
                )
        try:
            made = EDITS[spec.kind].from_tensors(spec, parts)
        except ValueError as error:
            raise FormatError(f"{path}: intervention {number}: {error}") from error
        interventions[spec.layer] = (*interventions.get(spec.layer, ()), made)
    try:
        return Adapter(interventions, ModelRef(**config.model.model_dump()), config.name, config.provenance)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error
