"""The verb that makes steering adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from commandv.cli.app import verb
from commandv.cli.checks import of_prompts, require_fits, require_layers, require_positions
from commandv.cli.options import (
    AdaptersPlace,
    BatchSize,
    Json,
    Loading,
    Model,
    show,
)
from commandv.known import Application, Direction


@verb
def steer(
    model: Model,
    how: Loading,
    contrast: Annotated[
        str,
        typer.Argument(
            callback=of_prompts, help="{positive, negative} lines (.jsonl); with --negative the positive prompts."
        ),
    ],
    out: AdaptersPlace,
    negative: Annotated[
        str | None, typer.Option(callback=of_prompts, help="The negative prompts: a file or builtin:NAME.")
    ] = None,
    paired: Annotated[bool, typer.Option("--paired", help="The two sets belong together line by line.")] = False,
    method: Annotated[Direction, typer.Option(help="caa: difference in means; actadd: of one pair.")] = "caa",
    positions: Annotated[str, typer.Option(help="Tokens to read: l1, l4, all, g8 (of replies).")] = "l1",
    trigger: Annotated[str | None, typer.Option(help="Read at this string's last token instead.")] = None,
    negative_trigger: Annotated[str | None, typer.Option(help="The negative side's, where it is another.")] = None,
    layers: Annotated[str, typer.Option(help="middle_third, all_layers, ... or 4,8,12.")] = "middle_third",
    kind: Annotated[Application, typer.Option(help="How a direction acts.")] = "add",
    strength: Annotated[float, typer.Option(help="1 adds what the sides differ by, or ablates wholly.")] = 1.0,
    relative: Annotated[bool, typer.Option("--relative", help="As a share of the stream's typical norm.")] = False,
    at: Annotated[str, typer.Option(help="Tokens to act on: all, l1, f1+l1, g8, ...")] = "all",
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Make a steering adapter from contrasting prompts or replies."""
    import commandv as cv
    from commandv.errors import InputError

    if negative_trigger is not None and trigger is None:
        raise InputError("--negative-trigger without --trigger; give --trigger for the positive side")
    require_positions(positions, at)
    require_layers(layers, model)
    require_fits([], model, strength)
    sides = cv.load_contrast(contrast, negative, paired=paired)
    lm = how.load(model)
    both = (trigger, negative_trigger) if trigger is not None and negative_trigger is not None else trigger
    adapter = cv.steer(
        lm, sides, method=method, positions=positions, trigger=both, layers=layers, kind=kind, strength=strength,
        relative=relative, at=at, batch_size=batch_size, name=out.name,
    )  # fmt: skip
    cv.save(adapter, out)
    show({"adapter": str(out), "method": method, "kind": kind, "layers": adapter.provenance["layers"]}, as_json)
