"""The kinds of directories that are ours."""

from __future__ import annotations

from commandv.storage.directories import Kind

ADAPTER = Kind("commandv-adapter", "tensors", lambda _config: ["tensors"])
PROFILE = Kind(
    "commandv-profile",
    r"keys|layer-\d{3}",
    lambda config: ["keys", *(f"layer-{int(layer):03d}" for layer in config["layers"])],
    large=True,
)
DEMONSTRATIONS = Kind("commandv-demonstrations", "tensors", lambda _config: ["tensors"])
