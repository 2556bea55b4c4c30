"""The verb that writes other projects' files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from commandv.cli.app import verb
from commandv.cli.options import AdapterFile, Json, Loading, Reading, show


@verb
def export(
    adapter: AdapterFile,
    out: Annotated[Path, typer.Argument(help="File or directory to write: happy.gguf, happy-model, ...")],
    reading: Reading,
    loading: Loading,
    to: Annotated[
        Literal["gguf", "pyreft", "baked", "vllm"],
        typer.Option(help="gguf is llama.cpp's control vector, baked a whole model; for vllm: how it goes without."),
    ] = "gguf",
    model: Annotated[str, typer.Option(help="For baked: the model. Default: the one that the adapter names.")] = "",
    model_hint: Annotated[str | None, typer.Option(help="For gguf: model named in it. Default: the adapter's.")] = None,
    every_writer: Annotated[
        bool, typer.Option("--every-writer", help="For baked: an ablation, which then acts inside blocks, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another project's format, or say why that format cannot hold it."""
    from commandv.errors import InputError
    from commandv.storage.directories import CONFIG
    from commandv.storage.foreign import require_new

    if to == "vllm":
        raise InputError(
            f"vLLM needs no export: where commandv is installed beside it, it attaches {adapter} as it is, by "
            f"COMMANDV_VLLM=NAME={adapter}; or bake the adapter into weights, --to baked (docs/run-elsewhere.md)"
        )
    if to != "gguf":
        require_new(out, CONFIG)
    reading.check(adapter)

    if to == "gguf":
        from commandv.interop.control_vectors import require_control_vector, write_control_vector

        require_control_vector(out)
    one = reading.load(adapter)
    facts: dict[str, Any] = {}
    if to == "gguf":
        write_control_vector(one, out, model_hint)
    elif to == "pyreft":
        from commandv.interop.pyreft import write_pyreft

        write_pyreft(one, out)
    else:
        from commandv.interop.baked import bake

        if not (name := model or one.model.id):
            raise InputError(f"{adapter} names no model; say which one to bake it into: --model")
        made = bake(loading.load(name), one, out, every_writer=every_writer)
        facts = {"difference": made.difference, "effect": made.effect, "kl_from_attached": made.kl}
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
    show(
        {"written": str(out), "format": to, "layers": one.layers, "d_model": one.d_model, "bytes": size, **facts},
        as_json,
    )
