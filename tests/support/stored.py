"""Artefacts on disk for the tests to damage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors.torch import save


def data_file(path: Path, part: str = "tensors") -> Path:
    """Return the data file of a part."""
    (file,) = path.glob(f"{part}-*.safetensors")
    return file


def replace_part(path: Path, tensors, part: str = "tensors") -> None:
    """Put other tensors in the place of a part's, and their name, hash and size into the configuration."""
    data = save(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / config["files"][part]["file"]).unlink()
    name = f"{part}-{sha256[:12]}.safetensors"
    (path / name).write_bytes(data)
    config["files"][part] = {"file": name, "sha256": sha256, "size": len(data)}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
