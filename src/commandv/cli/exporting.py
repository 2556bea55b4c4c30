"""The verb that writes other projects' files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commandv.cli.app import app
from commandv.cli.options import Json, show


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="Adapter directory, pyreft directory, vector file, builtin:...")],
    out: Annotated[Path, typer.Argument(help="File to write, e.g. happy.gguf.")],
    format: Annotated[str, typer.Option(help="control-vector (llama.cpp's GGUF).")] = "control-vector",
    model_hint: Annotated[str | None, typer.Option(help="Model named in the file. Default: the adapter's.")] = None,
    layer: Annotated[int | None, typer.Option(help="For a bare vector: the layer it acts on.")] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter in another project's format, or say why that format cannot hold it."""
    import commandv as cv
    from commandv.errors import InputError
    from commandv.interop.control_vectors import require_control_vector, write_control_vector

    if format != "control-vector":
        raise InputError(f"format {format!r}: expected control-vector")
    require_control_vector(out)
    loaded = cv.load_adapter(adapter, layer=layer)
    path = write_control_vector(loaded, out, model_hint)
    show({"file": str(path), "format": format, "layers": loaded.layers, "d_model": loaded.d_model}, as_json)
