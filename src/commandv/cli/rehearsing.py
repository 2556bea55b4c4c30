"""The verb that tries a study's models without their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commandv.cli.app import verb
from commandv.cli.checks import of_path
from commandv.cli.options import Json, escaped, output, show


@verb
def rehearse(
    file: Annotated[Path, typer.Argument(callback=of_path, help="Study file (YAML).")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="New directory for profiles, adapters and figures. Default: none."),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of each model, the first so many.")] = 2,
    prompts: Annotated[int, typer.Option(min=8, help="Prompts of the profiles, and as many passages of text.")] = 32,
    as_json: Json = False,
) -> None:
    """Run a study's pairs from profile to export with random weights of true width; tell seconds and bytes."""
    from commandv.evaluation.study import load_study

    study = load_study(file)

    from commandv.cli.tables import rehearsal_table
    from commandv.evaluation.study import rehearse as run

    made = run(study, layers=layers, prompts=prompts, out=out)
    if as_json:
        show(made.as_dict(), True)
        return
    for name, one in made.models.items():
        cut = ", ".join(f"{what} {one[what][0]:,} of {one[what][1]:,}" for what in ("layers", "vocabulary"))
        output(escaped(f"{name}: {one['id']}, random weights, {one['dtype']}, width {one['d_model']:,}, {cut}"))
    for pair, stages in made.pairs.items():
        output(rehearsal_table(escaped(pair), stages))
    show(made.facts, False)
