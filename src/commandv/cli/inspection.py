"""What a file is (`commandv inspect`) and whether the installation is sound (`commandv doctor`)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from commandv.adapters.shipped import BUILTIN
from commandv.cli.checks import require_adapter
from commandv.interop.detect import detect
from commandv.storage.directories import CONFIG
from commandv.storage.hub import holds_model, is_repo
from commandv.storage.kinds import ADAPTER, DEMONSTRATIONS, PROFILE

if TYPE_CHECKING:
    from commandv.adapters.adapter import Adapter
    from commandv.profiles.profile import Profile
    from commandv.transfer.distil.demonstrations import Demonstrations

NEEDED_GB = 3.0  # converted packaged models (0.9 GB), their profiles, and room to write


def describe(source: str, *, layer: int | None = None, convention: str | None = None) -> dict[str, Any]:
    """Return facts about an adapter, vector, profile, demonstrations or model, on this disk or on the hub, JSON-able.

    Raises:
        FormatError: damaged, unsafe or of an unknown kind.
        InputError: a bare vector without a layer.
        ModelError: a model that cannot be loaded.
        HubError: not on the hub, not allowed, or not reachable.
    """
    if _is_model(source):
        return _model_facts(source)
    if is_repo(source):
        from commandv.interop.share import load_shared
        from commandv.profiles.profile import Profile
        from commandv.transfer.distil.demonstrations import Demonstrations

        shared = load_shared(source)
        if isinstance(shared, Profile):
            return _profile_facts(shared)
        if isinstance(shared, Demonstrations):
            return _demonstrations_facts(shared)
        return _adapter_facts(shared, ADAPTER.format)
    kind = ADAPTER.format if source.startswith(BUILTIN) else detect(source)
    if kind == PROFILE.format:
        from commandv.profiles.profile import load_profile

        return _profile_facts(load_profile(source))
    if kind == DEMONSTRATIONS.format:
        from commandv.transfer.distil.demonstrations import load_demonstrations

        return _demonstrations_facts(load_demonstrations(source))
    require_adapter(source, layer=layer, convention=convention)

    from commandv.interop.load import load_adapter

    return _adapter_facts(load_adapter(source, layer=layer, convention=convention), kind)


def _profile_facts(one: Profile) -> dict[str, Any]:
    return {
        "what": PROFILE.format,
        "model": one.model.id,
        "revision": one.model.revision,
        "weights": one.model.weights or "not stated",
        "template": one.model.format or "as the model has it",
        "layers": sorted(one.activations),
        "d_model": one.d_model,
        "end_rows": one.n_end,
        "text_rows": len(one) - one.n_end,
        "prompts": one.prompts,
    }


def _demonstrations_facts(shown: Demonstrations) -> dict[str, Any]:
    return {
        "what": DEMONSTRATIONS.format,
        "name": shown.name,
        "donor": shown.donor.id or "not stated",
        "answers": len(shown),
        "left_out": shown.dropped,
        "places": 0 if shown.changes is None else len(shown.changes.places),
        "mean_divergence": shown.mean_divergence,
        "loop_rate": shown.loop_rate,
        "hash": shown.hash,
    }


def _adapter_facts(adapter: Adapter, kind: str) -> dict[str, Any]:
    interventions = [{"layer": at, **one.facts()} for at in adapter.layers for one in adapter.interventions[at]]
    stated = ("convention", "model_hint") if kind == "control-vector" else ()
    return {
        "what": kind,
        "name": adapter.name,
        "model": adapter.model.id or "not stated",
        "revision": adapter.model.revision or "not stated",
        "weights": adapter.model.weights or "not stated",
        "template": adapter.model.format or "as the model has it",
        "d_model": adapter.d_model,
        "layers": adapter.layers,
        "parameters": adapter.n_parameters,
        "prefill_only": adapter.prefill_only,
        "made_by": adapter.provenance.get("made_by", "not stated"),
        "certificate": adapter.provenance.get("certificate"),
        **{key: adapter.provenance[key] for key in stated},
        "interventions": interventions,
    }


def _is_model(source: str) -> bool:
    """True for a packaged model, a model's repository or directory, and a GGUF file of a model."""
    from commandv.models.names import PACKAGED

    path = Path(source)
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            return False
        from commandv.interop.control_vectors import is_control_vector

        return not is_control_vector(path)
    if os.path.isdir(path):
        return os.path.isfile(path / CONFIG) and '"model_type"' in (path / CONFIG).read_text("utf-8", "replace")
    return source in PACKAGED or (is_repo(source) and holds_model(source))


def _model_facts(source: str) -> dict[str, Any]:
    import commandv as cv
    from commandv.models.template import default_system, options_of, stop_tokens

    lm = cv.load_model(source)
    return {
        "what": "model",
        "model": lm.id,
        "revision": lm.revision or "not stated",
        "weights": lm.ref.weights,
        "layers": lm.n_layers,
        "d_model": lm.d_model,
        "parameters": sum(one.numel() for one in lm.model.parameters()),
        "context": lm.context_length,
        "prompts": "chat template" if lm.chat else "plain (question and answer)",
        "default_system_prompt": default_system(lm) or "none",
        "template_options": options_of(lm),
        "ends_at": [lm.tokenizer.decode([one]) for one in stop_tokens(lm)],
    }


class Check(NamedTuple):
    """One thing that was checked."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def check() -> list[Check]:
    """Check Python, libraries, devices, the cache, disk space and the packaged models."""
    import torch

    from commandv.models.load import resolve_dtype
    from commandv.models.names import PACKAGED, packaged_files
    from commandv.storage.files import CACHE_VARIABLE, cache_dir, storage_errors

    checks = [
        Check("commandv", True, importlib.metadata.version("commandv")),
        Check("python", True, platform.python_version()),
    ]
    for library in ("torch", "transformers", "safetensors"):
        checks.append(Check(library, True, importlib.metadata.version(library)))
    if importlib.metadata.version("transformers").startswith("4."):
        checks[-2] = Check("transformers", False, "version 4", "pip install 'transformers>=5'")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    checks.append(Check("device", True, f"{device}; default dtype {resolve_dtype(None)}"))
    cache = cache_dir()
    try:
        with storage_errors(cache):
            cache.mkdir(parents=True, exist_ok=True)
            probe = cache / ".write-test"
            probe.write_text("x")
            probe.unlink()
        free = shutil.disk_usage(cache).free / 1e9
        enough = free > NEEDED_GB
        remedy = "" if enough else f"free {NEEDED_GB:.0f} GB, or set {CACHE_VARIABLE} to another disk"
        checks.append(Check("cache", enough, f"{cache}, {free:.1f} GB free", remedy))
    except OSError as error:
        checks.append(Check("cache", False, str(error), f"set {CACHE_VARIABLE} to a writable directory"))
    for name, model in PACKAGED.items():
        parts = packaged_files(name)
        size = sum(part.stat().st_size for part in parts) / 1e6
        converted = any((cache / "gguf").glob(f"{name}-*/config.json"))
        found = f"{size:.0f} MB, {'converted' if converted else 'converted at first use'}" if parts else "not installed"
        checks.append(Check(name, bool(parts), found, "" if parts else model.install))
    return checks
