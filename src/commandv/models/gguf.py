"""GGUF models: split files joined, de-quantised once into a safetensors directory in the cache."""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import torch

from commandv.errors import FormatError, ModelError
from commandv.models.names import FOLDER, PACKAGED, packaged_files
from commandv.storage.directories import CONFIG, kept
from commandv.storage.files import cache_dir, digest, file_digest, file_name
from commandv.storage.foreign import new_directory
from commandv.storage.reading import no_such_file

log = logging.getLogger(__name__)

SIZES = "sizes.json"  # of the files of a conversion

# As `gguf-split` of llama.cpp names the parts of a model.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SPLIT = ("split.no", "split.count", "split.tensors.count")
# What reading a damaged file raises, in the package or in transformers.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ArithmeticError, struct.error)
_SHARD = "500MB"
_ROWS = 4096
_ROPE = "rope_freqs.weight"


def converted(name: str) -> Path:
    """Return the safetensors directory of a packaged model or `.gguf` file, converting it the first time.

    Weights are kept in bfloat16, whose rounding (2^-9) is far below that of the quantised file. The directory's
    name ends in the hash of the GGUF file. Of a split model (`NAME-00001-of-00003.gguf`) any part may be given.
    """
    parts, split, target = _conversion(name)

    def make() -> Path:
        log.info("converting %s to safetensors, once (about a minute)", name)
        with new_directory(target, CONFIG) as directory:
            _convert(parts, directory, split)
            sizes = {one.name: one.stat().st_size for one in directory.iterdir()}
            (directory / SIZES).write_text(json.dumps(sizes), "utf-8")
        return target

    return kept(target, CONFIG, lambda: _whole(target), make)


def is_converted(name: str) -> bool:
    """Tell whether `converted` would find its work done."""
    return os.path.exists(_conversion(name)[2] / CONFIG)


def _conversion(name: str) -> tuple[list[Path], bool, Path]:
    """Return a model's files, whether they are parts of one, and the directory of its conversion."""
    if name in PACKAGED:
        parts, stem = packaged_files(name), name
        if not parts:
            raise ModelError(f"{name}: its package is not installed; {PACKAGED[name].install}")
    else:
        parts, stem = _files(Path(name))
    split = name not in PACKAGED and len(parts) > 1
    for part in parts if split else parts[:1]:
        _require_gguf(part)
    key = digest([file_digest(part) for part in parts])
    return parts, split, cache_dir() / FOLDER / f"{file_name(stem)}-{key}"


def _whole(target: Path) -> Path:
    """Return a conversion if its files have the sizes that were written."""
    try:
        sizes = json.loads((target / SIZES).read_bytes())
        wrong = [name for name, size in sizes.items() if (target / name).stat().st_size != size]
    except (OSError, ValueError, AttributeError) as error:
        wrong = [str(error)]
    if wrong:
        raise FormatError(f"{target}: the conversion is damaged ({', '.join(wrong)})")
    return target


def _files(path: Path) -> tuple[list[Path], str]:
    """Return the files of the model that one of them belongs to, in order, and the model's name."""
    if not os.path.isfile(path):
        raise ModelError(f"{path}: {no_such_file(path)}")
    match = _PART.fullmatch(path.name)
    if not match:
        return [path], path.stem
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not os.path.isfile(part)]:
        raise ModelError(
            f"{path}: one of {count} parts of a model, and {', '.join(missing[:3])} is not beside it; "
            "download all parts into one directory"
        )
    return parts, match["stem"]


def _require_gguf(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(128)
    if not head.startswith(b"GGUF"):
        pointer = head.startswith(b"version https://git-lfs")
        hint = "a git-LFS pointer (run `git lfs pull`)" if pointer else repr(head[:8])
        raise ModelError(f"{path}: expected a GGUF file, got {hint}")


def _convert(parts: list[Path], directory: Path, split: bool) -> None:
    joined = directory / "joined.gguf"
    source = joined if len(parts) > 1 else parts[0]
    try:
        if split:
            _join(parts, joined)
        elif len(parts) > 1:
            with joined.open("wb") as out:
                for part in parts:
                    out.write(part.read_bytes())
        model, tokenizer = _load(source)
    except ModelError:
        raise
    except _DAMAGED as error:
        raise ModelError(f"{parts[0]}: transformers cannot read this GGUF file: {error}") from error
    model.save_pretrained(directory, max_shard_size=_SHARD)  # a shard is copied in memory as it is written
    tokenizer.save_pretrained(directory)
    joined.unlink(missing_ok=True)


def _load(source: Path) -> tuple[Any, Any]:
    """Read a model in bfloat16, one tensor at a time, and its tokenizer."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    config = transformers.AutoConfig.from_pretrained(**where)
    reader = gguf.GGUFReader(source)
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:  # a joined file says none
        raise ModelError(
            f"{source}: its metadata says that it is a part of a split model, its name does not; give the parts their "
            "names back, NAME-00001-of-0000N.gguf"
        )
    architecture = reader.fields["general.architecture"].contents()
    _understand_rope(reader, architecture, config, source)
    reader.fields.clear()  # a vocabulary's hundred thousands of little arrays
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = _weights(reader, TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config.to_dict()), model, source)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if lacking := [name for name, one in model.named_parameters() if one.is_meta]:
        raise ModelError(
            f"{source}: {len(lacking)} weights of the model are not in the file ({', '.join(lacking[:3])} ...); "
            "it is incomplete, download it again"
        )
    return model, tokenizer


def _weights(reader: gguf.GGUFReader, processor: Any, model: Any, source: Path) -> dict[str, torch.Tensor]:
    """De-quantise every tensor and return them by the model's names, in bfloat16."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    names = get_gguf_hf_weights_map(model, processor)
    parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
    weights = parsed["tensors"]
    unknown: list[str] = []
    # The largest first, because de-quantising takes a few times a tensor's size beside what is there already.
    for tensor in sorted(reader.tensors, key=lambda one: -one.n_elements):
        if tensor.name == "token_embd.weight" and tensor.name in names:  # no architecture's rows are rearranged
            weights[names[tensor.name]] = _by_rows(tensor)
            continue
        result = processor.process(
            weights=gguf.dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters=parsed,
        )
        if tensor.name == _ROPE:
            continue
        if result.name in names:
            weights[names[result.name]] = torch.from_numpy(result.weights.copy()).bfloat16()
        elif result.name is not None:  # None: the processor has put it there itself
            unknown.append(tensor.name)
        if isinstance(mapped := reader.data.base, mmap.mmap):
            mapped.madvise(mmap.MADV_DONTNEED)  # what was read of the file need not stay in memory
    if unknown:
        raise ModelError(
            f"{source}: {len(unknown)} tensors have no place in transformers' {type(model).__name__} "
            f"({', '.join(unknown[:3])} ...), so the model would not be the file's; use its safetensors version"
        )
    return {name: one.bfloat16() for name, one in weights.items()}


def _understand_rope(reader: gguf.GGUFReader, architecture: str, config: Any, source: Path) -> None:
    """Put a file's scaling of rotary frequencies, which transformers passes over, into the configuration.

    llama.cpp divides the frequency of each pair of dimensions by its factor in `rope_freqs` (Llama 3.1 and later), at
    every length: what transformers calls longrope, with the same factors for short and for long.
    """
    field = reader.fields.get(f"{architecture}.rope.scaling.type")
    if field is not None and field.contents() != "none" and architecture != "gpt-oss":  # transformers reads that one's
        raise ModelError(
            f"{source}: its rotary frequencies are scaled ({field.contents()}), which transformers does not read from "
            "GGUF files, so the model would not be the file's; use its safetensors version"
        )
    factors = next((tensor for tensor in reader.tensors if tensor.name == _ROPE), None)
    if factors is None:
        return
    if "rope_theta" not in config.rope_parameters:
        raise ModelError(
            f"{source}: {_ROPE}, which {type(config).__name__} has no place for; use its safetensors version"
        )
    values = gguf.dequantize(factors.data, factors.tensor_type).tolist()
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": config.rope_parameters["rope_theta"],
        "short_factor": values,
        "long_factor": values,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def _by_rows(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """De-quantise a large matrix some rows at a time."""
    out = torch.empty(*map(int, tensor.shape[::-1]), dtype=torch.bfloat16)
    for start in range(0, len(out), _ROWS):
        rows = slice(start, start + _ROWS)
        out[rows] = torch.from_numpy(gguf.dequantize(tensor.data[rows], tensor.tensor_type).copy())
    return out


def _join(parts: list[Path], out: Path) -> None:
    """Write the parts of a split model as one file."""
    readers = [gguf.GGUFReader(part) for part in parts]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        stated = [int(reader.fields[key].contents()) if key in reader.fields else None for key in _SPLIT]
        if stated != [number, len(parts), len(tensors)]:
            raise ModelError(
                f"{part}: expected part {number} of {len(parts)} with {len(tensors)} tensors in all (split.no, "
                f"split.count, split.tensors.count), its metadata says {stated}; it is incomplete or of another model"
            )
    head = readers[0].fields
    writer = gguf.GGUFWriter(out, head["general.architecture"].contents())
    for name, field in head.items():
        if name != "general.architecture" and name not in _SPLIT and not name.startswith("GGUF."):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
