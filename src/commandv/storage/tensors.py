"""Reading files of tensors: nothing is unpickled, and none takes more memory than its file has bytes.

A few hundred bytes can otherwise announce terabytes, be unpacked to them, or hold the code that is run to get there.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from commandv.errors import CommandVError, FormatError
from commandv.storage.reading import DAMAGED, DEPTH, first_line, require_regular

_DAMAGED = (*DAMAGED, safetensors.SafetensorError)
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
MOST_ARCHIVE = 1 << 30  # bytes that a compressed archive of arrays may unpack to


class Stored(NamedTuple):
    """What a file of tensors holds: the tensors, or a single one under no name, and what is said about them."""

    content: Any
    metadata: dict[str, str]


def read_safetensors(path: Path) -> Stored:
    """Read a safetensors file."""
    require_regular(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            return Stored({name: file.get_tensor(name) for name in names}, file.metadata() or {})
    except _DAMAGED as error:
        raise FormatError(f"{path}: truncated or not safetensors ({first_line(error)}); copy it again") from error


def safetensors_bytes(name: str, tensor: Tensor) -> memoryview:
    """Return one tensor as a safetensors file, which takes the memory of one copy where the library takes three."""
    if (kind := _NAMES.get(tensor.dtype)) is None:
        raise FormatError(f"{name} of {tensor.dtype}: expected one of {sorted(map(str, _NAMES))}")
    size = tensor.numel() * tensor.element_size()
    stated = {name: {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [0, size]}}
    header = json.dumps(stated, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    whole = torch.empty(8 + len(header) + size, dtype=torch.uint8)
    whole[: 8 + len(header)] = torch.frombuffer(
        bytearray(len(header).to_bytes(8, "little") + header), dtype=torch.uint8
    )
    whole[8 + len(header) :].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return whole.numpy().data


def read_numpy(path: Path) -> Stored:
    """Read a `.npy` file, or a `.npz` archive as a dictionary, without unpickling anything."""
    size = require_regular(path)
    try:
        with path.open("rb") as file:
            archive = file.read(2) == b"PK"
        if archive:
            return Stored(_archive(path), {})
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped, so that the header cannot ask for memory
        if array.nbytes > size:
            raise ValueError(f"announces {array.nbytes} bytes, the file has {size}")
        return Stored(_as_tensor(np.array(array), str(path)), {})
    except CommandVError:
        raise
    except _DAMAGED as error:
        raise FormatError(
            f"{path}: not a plain NumPy array, or truncated ({first_line(error)}); pickled arrays are refused"
        ) from error


def _archive(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if (total := sum(one.file_size for one in members)) > MOST_ARCHIVE or len(members) > 4096:
            raise ValueError(f"{len(members)} arrays that unpack to {total} bytes")
        found = {}
        for one in members:
            data = io.BytesIO(archive.read(one))
            version = np.lib.format.read_magic(data)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(data)
            if math.prod(shape) * dtype.itemsize > one.file_size:
                raise ValueError(f"{one.filename} announces shape {shape}, and has {one.file_size} bytes")
            data.seek(0)
            array = np.lib.format.read_array(data, allow_pickle=False)
            found[one.filename.removesuffix(".npy")] = _as_tensor(array, f"{path}, {one.filename}")
    return found


def _as_tensor(array: Any, where: str) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise FormatError(f"{where}: holds {getattr(array, 'dtype', type(array))}, expected floating-point numbers")
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def read_torch(path: Path) -> Any:
    """Load a torch file (`.pt`, `.bin`) that holds plain tensors, numbers and text only."""
    require_regular(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                packed = [one.filename for one in archive.infolist() if one.compress_type != zipfile.ZIP_STORED]
            if packed:  # torch never compresses
                raise FormatError(f"{path}: {packed[0][:60]} in it is compressed, which no torch file is; refused")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path}: holds more than plain tensors, and loading it could run code, so it is refused "
            f"({first_line(error)}). Ask its author for a safetensors file"
        ) from error
    except CommandVError:
        raise
    except _DAMAGED as error:
        raise FormatError(f"{path}: truncated or not a torch file ({first_line(error)})") from error
    _require_stored(content, path, 0)
    return content


def _require_stored(value: Any, path: Path, depth: int) -> None:
    """Refuse tensors that are not plain numbers in memory, of which there are as many as are stored."""
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.is_nested:
            what = (
                "quantised" if value.is_quantized else "nested" if value.is_nested else f"{value.layout} {value.device}"
            )
            raise FormatError(
                f"{path}: a tensor that is {what}, expected plain numbers; save it with .to_dense().float()"
            )
        stored = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > stored:
            raise FormatError(
                f"{path}: a tensor of shape {tuple(value.shape)} of which {stored} bytes are stored, the rest are "
                "repeats; save it with .contiguous()"
            )
    elif isinstance(value, (dict, list, tuple)):
        if depth > DEPTH:
            raise FormatError(f"{path}: nested more than {DEPTH} deep")
        for one in value.values() if isinstance(value, dict) else value:
            _require_stored(one, path, depth + 1)
