"""llama.cpp's control vectors: a GGUF file with one direction [d_model] per layer, added to every token.

The layer convention, as llama.cpp's source has it: `common_control_vector_load_one` puts `direction.N` in row N - 1 of
its buffer, `llama_adapter_cvec::apply` takes row il - 1 for block il, and each model's graph adds it to the output of
block il, counted from 0. So `direction.N` acts on the output of block N: *our* layer N, nothing shifted. Block 0 never
gets one, and a file that holds `direction.0` is discarded as a whole.

Other writers (EasySteer) count in the same way but do begin at `direction.0`; that is the convention "from-zero".
(llama.cpp's own generator stores what it measured after block N - 1 as `direction.N`; it is added after block N.)
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter, Intervention, low_rank
from commandv.adapters.edit import require_numbers
from commandv.adapters.kinds import steering_vector
from commandv.errors import FormatError, InputError, StorageError
from commandv.interop.detect import Convention, require_convention
from commandv.models.identity import ModelRef
from commandv.positions import EVERYWHERE
from commandv.storage.files import writing
from commandv.storage.reading import require_regular

ARCHITECTURE = "controlvector"

_NAME = re.compile(r"direction\.(0|[1-9]\d{0,3})")
# The keys that are understood: llama.cpp's two, and how EasySteer says that a vector was made, which changes nothing in
# what it does. Any other may: other programs write vectors to be projected out, with a strength, or for another place.
_KEYS = re.compile(
    r"general\..*|controlvector\.(model_hint|layer_count|method|normalize|token_pos|n_positive|n_negative|n_components|"
    r"correct_direction|explained_variance\.\d+|num_vectors_averaged)"
)
# More keys, tensors or list items than any control vector has: what a hostile file may make the reader loop over.
_MOST = 1024
# What the package's reader raises on damaged bytes.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError, struct.error)


class _OtherArchitectureError(Exception):
    """A sound GGUF file that is no control vector."""


class _Reader(gguf.GGUFReader):
    """The package's reader, which believes a file's counts, made to stop at the file's end and at absurd ones."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        # Beyond the end the package's own returns empty arrays and goes on, for as long as the count says.
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends before what it announces")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            _reasonable(int(self._get(orig_offs + 4, np.uint64)[0]), "items in a list")
        return super()._get_field_parts(orig_offs, raw_type)

    def _push_field(self, field: gguf.ReaderField, skip_sum: bool = False) -> int:
        if field.name == "general.architecture" and field.contents() != ARCHITECTURE:
            raise _OtherArchitectureError(
                repr(field.contents())[:60]
            )  # at once: a model's vocabulary takes seconds to read
        if field.name in ("GGUF.tensor_count", "GGUF.kv_count"):
            _reasonable(int(field.parts[0][0]), "tensors" if "tensor" in field.name else "keys")
        return super()._push_field(field, skip_sum)


def _reasonable(count: int, what: str) -> None:
    if count > _MOST:
        raise ValueError(f"it announces {count} {what}; a model, perhaps, which load_model opens")


def read_control_vector(path: Path, *, layer: int | None = None, convention: str | None = None) -> Adapter:
    """Read a control vector as a steering adapter that acts on every token, `direction.N` at layer N.

    Args:
        path: the file.
        layer: take only this layer's direction.
        convention: `"llama.cpp"` refuses a file with `direction.0`, as llama.cpp does; `"from-zero"` lets it act on
            block 0's output. Default: whichever the file follows. The provenance says which was used.

    Returns:
        The adapter; its model is known by width only, because the file's `model_hint` is no name of a model.

    Raises:
        FormatError: not a control vector, truncated, without its metadata, or with directions that are not float32
            [d_model] of one width, not finite, or repeated.
        InputError: no direction at `layer`, or an unknown convention.
    """
    require_convention("control-vector", convention)
    fields, vectors = _open(path)
    found: Convention = "from-zero" if 0 in vectors else "llama.cpp"
    if convention == "llama.cpp" and found == "from-zero":
        raise FormatError(
            f"{path}: holds direction.0, for which llama.cpp discards the whole file; read it with "
            "convention='from-zero', where it acts on the first block's output"
        )
    if layer is not None and layer not in vectors:
        raise InputError(f"{path}: no direction at layer {layer}; there are {sorted(vectors)}")
    d_model = len(next(iter(vectors.values())))
    provenance = {
        "made_by": "import",
        "format": "control-vector",
        "convention": convention or found,
        "model_hint": fields.pop(f"{ARCHITECTURE}.model_hint"),
        "metadata": {key.removeprefix(f"{ARCHITECTURE}."): value for key, value in fields.items()},
    }
    made = {at: steering_vector(vectors[at]) for at in sorted(vectors) if layer in (None, at)}
    name = str(fields.get("general.name") or path.stem)
    return Adapter(made, ModelRef(d_model=d_model), name, provenance).at(EVERYWHERE)


def is_control_vector(path: Path) -> bool:
    """True for a control vector, False for a GGUF file of another architecture.

    Raises:
        FormatError: not a GGUF file, or damaged.
    """
    try:
        _read(path)
    except _OtherArchitectureError:
        return False
    return True


def _read(path: Path) -> _Reader:
    require_regular(path)
    try:
        reader = _Reader(path)
    except _DAMAGED as error:
        raise FormatError(f"{path}: truncated, tampered with or not a GGUF file ({error})") from error
    if "general.architecture" not in reader.fields:
        raise FormatError(f"{path}: says no general.architecture, so what it is for is unknown")
    return reader


def _open(path: Path) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Return a file's metadata and its directions by number, all checked."""
    try:
        reader = _read(path)
    except _OtherArchitectureError as error:
        raise FormatError(
            f"{path}: a GGUF file of architecture {error}, expected {ARCHITECTURE}; a model is opened with load_model"
        ) from error
    try:
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except _DAMAGED as error:
        raise FormatError(f"{path}: its metadata cannot be read ({error})") from error
    del fields["general.architecture"]
    for key, kind in ((f"{ARCHITECTURE}.model_hint", str), (f"{ARCHITECTURE}.layer_count", int)):
        if not isinstance(fields.get(key), kind):
            found = repr(fields[key])[:60] if key in fields else "missing"
            raise FormatError(f"{path}: {key} is {found}, expected {kind.__name__}")
    for key, value in fields.items():
        if not _KEYS.fullmatch(key):
            raise FormatError(
                f"{path}: says {key[:60]} = {repr(value)[:60]}, not a key of llama.cpp's control vectors. It may "
                "mean that the directions are not simply added (but projected out, scaled, for another place), so they "
                "are not read as additions; use the program that wrote the file, or save its vectors as tensors"
            )
    vectors: dict[int, Tensor] = {}
    for one in reader.tensors:
        match = _NAME.fullmatch(one.name)
        if not match:
            raise FormatError(f"{path}: tensor {one.name[:60]!r}; a control vector holds direction.N only")
        if one.tensor_type != gguf.GGMLQuantizationType.F32 or len(one.shape) != 1:
            raise FormatError(
                f"{path}: {one.name} is {one.tensor_type.name} {one.shape.tolist()}, expected F32 [d_model]"
            )
        vectors[int(match[1])] = torch.from_numpy(np.array(one.data, dtype=np.float32))  # a copy: the file is mapped
    _check(path, vectors, fields[f"{ARCHITECTURE}.layer_count"])
    return fields, vectors


def _check(path: Path, vectors: dict[int, Tensor], layer_count: int) -> None:
    widths = sorted({len(vector) for vector in vectors.values()})
    if not vectors or not widths[0]:
        raise FormatError(f"{path}: holds no directions")
    if len(widths) > 1:
        raise FormatError(f"{path}: directions of widths {widths}, expected one width")
    if layer_count < len(vectors):  # more is usual: some writers count the model's layers
        raise FormatError(f"{path}: says {layer_count} layers but holds {len(vectors)} directions; tampered with")
    for at, vector in sorted(vectors.items()):
        try:
            require_numbers(vector, f"direction.{at}")
        except InputError as error:
            raise FormatError(f"{path}: {error}") from error


def write_control_vector(adapter: Adapter, path: str | Path, model_hint: str | None = None) -> Path:
    """Write an adapter as a llama.cpp control vector, atomically; an earlier control vector there is replaced.

    A layer's interventions become one direction, the sum of b W over them.

    Args:
        adapter: steering vectors on every token, on layers 1 and up.
        path: where to; llama.cpp expects a name that ends in `.gguf`.
        model_hint: for people, llama.cpp does not look at it. Default: the id of the adapter's model.

    Raises:
        InputError: the format cannot hold this adapter: it reads the state, acts on some tokens only, has an
            activation, or acts on layer 0. The message says which.
        FormatError: `path` holds something else.
        StorageError: not writable or disk full; what was there before is untouched.
    """
    path = Path(path)
    require_control_vector(path)
    directions = {layer: _direction(adapter, layer) for layer in adapter.layers}
    with writing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_name(adapter.name)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint or adapter.model.id or "unknown")
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer, vector in directions.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        try:  # NumPy's writing of an array can run into a full disk without a word
            _open(temporary)
        except FormatError as error:
            raise StorageError(f"{path}: what was written cannot be read back ({error}); free some space") from error
    return path


def _direction(adapter: Adapter, layer: int) -> Tensor:
    what = f"{adapter.name} cannot be a control vector: on layer {layer} it"
    if layer == 0:
        raise InputError(f"{what} acts, and llama.cpp never adds a direction after the first block")
    return constant(adapter, layer, "a control vector")


def constant(adapter: Adapter, layer: int, form: str) -> Tensor:
    """Return the vector [d_model] that an adapter adds at a layer, whatever the state and the token.

    Args:
        adapter: whose.
        layer: one of its layers.
        form: what is to hold the vector, for the message.
    """
    total = torch.zeros(adapter.d_model)
    for edit in adapter.interventions[layer]:
        one = low_rank(edit, form)
        if reason := _refusal(one):
            raise InputError(
                f"{adapter.name} cannot be {form}: on layer {layer} it {reason}; attach it, or see what holds it in "
                "docs/run-elsewhere.md"
            )
        total += (one.bias.detach().float() @ one.write.detach().float()).cpu()
    return total


def _refusal(one: Intervention) -> str:
    """Return why an intervention is no constant added everywhere; empty when it is one."""
    if one.activation != "linear":
        return f"has the activation {one.activation}, so what it adds is no constant vector"
    if one.read.any():
        return f"reads the state (rank {one.rank}), so what it adds is no constant vector"
    if not one.positions.everywhere:
        only = " (prompt tokens only)" if one.positions.prefill_only else ""
        return f"acts at positions {one.positions}{only}, not on every token"
    return ""


def require_control_vector(path: Path) -> None:
    """Raise `FormatError` when writing to `path` would destroy anything but a control vector."""
    if not path.exists():
        return
    try:
        free = path.is_file() and is_control_vector(path)
    except FormatError:
        free = False
    if not free:
        raise FormatError(f"{path}: is there and no control vector, so it is not overwritten; choose another place")
