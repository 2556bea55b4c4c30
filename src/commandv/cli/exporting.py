"""The verb that writes other projects' files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commandv.cli.app import verb
from commandv.cli.options import AdapterFile, Json, Reading, show


@verb
def export(
    adapter: AdapterFile,
    out: Annotated[Path, typer.Argument(help="File to write, e.g. happy.gguf.")],
    reading: Reading,
    format: Annotated[str, typer.Option(help="control-vector (llama.cpp's GGUF).")] = "control-vector",
    model_hint: Annotated[str | None, typer.Option(help="Model named in the file. Default: the adapter's.")] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter in another project's format, or say why that format cannot hold it."""
    from commandv.errors import InputError
    from commandv.interop.control_vectors import require_control_vector, write_control_vector

    if format != "control-vector":
        raise InputError(f"format {format!r}: expected control-vector")
    require_control_vector(out)
    loaded = reading.load(adapter)
    path = write_control_vector(loaded, out, model_hint)
    show({"file": str(path), "format": format, "layers": loaded.layers, "d_model": loaded.d_model}, as_json)
