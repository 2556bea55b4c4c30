"""The verbs of the main job, one thin function per library call. Heavy imports happen inside, so that `-h` is quick."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from commandv.cli.app import verb
from commandv.cli.checks import of_profile, of_prompts, require_fits, require_layers, require_match, require_positions
from commandv.cli.options import (
    GENERAL,
    TEXT,
    AdapterFile,
    AdaptersPlace,
    Anything,
    Attached,
    BatchSize,
    Json,
    Loading,
    MaxNewTokens,
    Model,
    PromptsOption,
    Reading,
    ReadRows,
    Running,
    SamplingSeed,
    Scale,
    Temperature,
    TopP,
    WriteRows,
    escaped,
    output,
    show,
)
from commandv.errors import MOST_SEED
from commandv.known import Fitter, Kind

log = logging.getLogger(__name__)


@verb
def profile(
    model: Model,
    how: Loading,
    running: Running,
    prompts: PromptsOption = GENERAL,
    text: Annotated[
        str, typer.Option(callback=of_prompts, help="Passages for text rows, which writing converters learn from.")
    ] = TEXT,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="No text rows: what is pasted may then ruin the recipient's answers.")
    ] = False,
    places: Annotated[
        Literal["lines", "words"], typer.Option(help="Text rows where lines start, or at words.")
    ] = "lines",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts of each set.")] = None,
    mixed_forms: Annotated[
        bool,
        typer.Option("--mixed-forms", help="By turns as written, without the end mark, and in lower case."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Where to keep it. Default: the cache.")] = None,
    batch_size: BatchSize = 16,
    max_length: Annotated[int | None, typer.Option(min=1, help="Cut longer prompts at their beginning.")] = None,
    as_json: Json = False,
) -> None:
    """Run prompts through a model and keep its residual stream where another model's can be compared."""
    from functools import partial

    import commandv as cv
    from commandv.prompts.sets import load_prompt_sets
    from commandv.storage.directories import require_place
    from commandv.storage.kinds import PROFILE

    if out is not None:
        require_place(out, PROFILE)
    asked, passages = load_prompt_sets(prompts, limit=limit), None if no_text else cv.load_prompts(text)
    asked = cv.mixed_forms(asked) if mixed_forms else asked
    if no_text:
        log.warning(
            "no text rows: writing converters will be fitted on last prompt tokens, which carry a behaviour far worse "
            "and ruin the answers of some models"
        )
    executor = running.choose()
    if running.local:
        made = cv.profile(
            how.load(model), asked, text=passages, places=places, batch_size=batch_size, max_length=max_length,
            cache=out or True,
        )  # fmt: skip
    else:
        made = cv.profile_on(
            executor, partial(how.load, model), asked, text=passages, places=places, batch_size=batch_size,
            max_length=max_length, cache=out,
        )  # fmt: skip
    facts = {"profile": str(made.path), "model": made.model.id, "rows": len(made), "layers": made.n_layers}
    show({**facts, "d_model": made.d_model}, as_json)


@verb
def train(
    model: Model,
    how: Loading,
    examples: Annotated[
        str,
        typer.Argument(callback=of_prompts, help="{prompt, response} examples: a .jsonl / .csv file or builtin:NAME."),
    ],
    out: AdaptersPlace,
    kind: Annotated[
        Kind,
        typer.Option(help="Kind of the ReFT family."),
    ] = "direft",
    rank: Annotated[int, typer.Option(min=1, help="Directions read and written per layer.")] = 8,
    layers: Annotated[str, typer.Option(help="every_other, all_layers, last_third, ... or 4,8,12.")] = "every_other",
    positions: Annotated[str, typer.Option(help="l1 (last prompt token), f3+l5, all, ...")] = "l1",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples.")] = 3,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of Adam, in units of each layer's norm.")] = 4e-3,
    max_response: Annotated[int, typer.Option(min=1, help="Labelled tokens per example.")] = 512,
    batch_size: BatchSize = 16,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Of initial values and of the order of examples.")
    ] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="File to resume from after a cut.")] = None,
    as_json: Json = False,
) -> None:
    """Train an adapter of the ReFT family on examples."""
    import commandv as cv
    from commandv.prompts.sets import require_replies

    require_positions(positions)
    require_layers(layers, model)
    rows = cv.load_prompts(examples)
    require_replies(rows)

    from commandv.training.train import TRAINABLE

    settings = cv.TrainSettings(
        epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, seed=seed, max_response=max_response
    )
    lm = how.load(model)
    chosen = TRAINABLE[kind](rank=rank, layers=layers, positions=positions)
    name = rows.name.removeprefix("builtin:")
    adapter = cv.train(lm, rows, chosen, settings, name=Path(name).stem, checkpoint=checkpoint)
    cv.save(adapter, out)
    losses = adapter.provenance["held_out_loss"]
    show({"adapter": str(out), "held_out_loss": losses, "parameters": adapter.n_parameters}, as_json)


@verb
def paste(
    adapter: AdapterFile,
    donor: Annotated[
        str, typer.Argument(callback=of_profile, help="Profile of the donor: a directory, or on the hub.")
    ],
    recipient: Annotated[
        str, typer.Argument(callback=of_profile, help="Profile of the recipient: a directory, or on the hub.")
    ],
    out: AdaptersPlace,
    reading: Reading,
    fit: Annotated[
        Fitter,
        typer.Option(help="How converters are fitted; pinv as published."),
    ] = "ridge",
    match: Annotated[
        str, typer.Option(help="proportional, nearest, covering, lowest-error, or a map like 2:1,4:3.")
    ] = "proportional",
    layers: Annotated[
        str, typer.Option(help="Recipient layers to act on: last_third, all_layers, 4,8; auto: what is best known.")
    ] = "auto",
    read_rows: ReadRows = "end",
    write_rows: WriteRows = None,
    scale: Scale = 1.0,
    same_as: Annotated[
        str,
        typer.Option(metavar="NAME", help="Take the adapter's model for the one of this name: the donor profile's."),
    ] = "",
    with_fidelity: Annotated[bool, typer.Option("--fidelity/--no-fidelity", help="Measure the converters.")] = True,
    as_json: Json = False,
) -> None:
    """Carry a donor's adapter into a recipient, and measure the converters on prompts they have not seen."""
    import commandv as cv

    require_layers(layers)
    require_match(match)
    reading.check(adapter, scale=scale)

    from commandv.transfer.convert.table import FITTERS

    where = {"match": _matcher(match), "layers": layers}
    original = reading.load(adapter, same_as=same_as)
    one, two = cv.load_profile(donor), cv.load_profile(recipient)
    link = cv.link(one, two, fit=FITTERS[fit](), read_rows=read_rows, write_rows=write_rows)
    pasted = link.paste(original, **where, scale=scale)
    cv.save(pasted, out)
    rows = [row._asdict() for row in link.fidelity(original, **where)] if with_fidelity else []
    if as_json:
        show({"adapter": str(out), "layers": pasted.layers, "fidelity": rows}, True)
        return
    if rows:
        from commandv.cli.tables import fidelity_table

        output(fidelity_table(rows))
    show({"adapter": str(out), "layers": pasted.layers, "parameters": pasted.n_parameters}, False)


@verb
def generate(
    model: Model,
    how: Loading,
    reading: Reading,
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", callback=of_prompts, help="A prompt set instead.")] = None,
    adapter: Attached = None,
    scale: Scale = 1.0,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Answer prompts, greedily or sampled, with or without an adapter."""
    import contextlib

    import commandv as cv
    from commandv.errors import InputError

    if bool(prompt) == bool(prompts):
        raise InputError("give prompts as arguments, or --prompts with a set; one of the two")
    reading.check(adapter, model=model, scale=scale)
    texts = cv.load_prompts(prompts).texts if prompts else list(prompt or [])
    attached = reading.load(adapter) if adapter else None
    require_fits([attached] if attached else [], model, scale)
    lm = how.load(model)
    with cv.attach(lm, attached, scale=scale) if attached else contextlib.nullcontext():
        answers = cv.generate(
            lm, texts, max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, top_p=top_p,
            seed=seed,
        )  # fmt: skip
    if as_json:
        show({"answers": [{"prompt": a, "answer": b} for a, b in zip(texts, answers, strict=True)]}, True)
        return
    for text, answer in zip(texts, answers, strict=True):
        output(f"[bold]{escaped(text)}[/bold]\n{escaped(answer)}\n")


@verb
def inspect(
    path: Anything,
    reading: Reading,
    as_json: Json = False,
) -> None:
    """Tell what a file or directory is, for which model, and what it holds."""
    from commandv.cli.inspection import describe

    facts = describe(path, layer=reading.layer, convention=reading.convention)
    certificate = facts.get("certificate")
    if as_json or not certificate:
        show(facts, as_json)
        return
    from commandv.cli.tables import certificate_table

    show(
        {**facts, "certificate": certificate["sentence"], "made_with": certificate.get("command", "not stated")}, False
    )
    output(certificate_table(certificate))


@verb
def doctor(as_json: Json = False) -> None:
    """Check versions, cache, disk, devices and packaged models; exit 1 when something is wrong."""
    from commandv.cli.inspection import check

    checks = check()
    if as_json:
        show({"checks": [one._asdict() for one in checks]}, True)
    else:
        for one in checks:
            mark = "[green]ok[/green]  " if one.ok else "[red]FAIL[/red]"
            output(f"{mark} {one.name}: {escaped(one.found)}" + (f" -> {escaped(one.remedy)}" if one.remedy else ""))
    if not all(one.ok for one in checks):
        raise typer.Exit(1)


def _matcher(text: str) -> Any:
    from commandv.transfer.match import MATCHERS, explicit

    if text in MATCHERS:
        return MATCHERS[text]
    return explicit({int(a): int(b) for a, b in (part.split(":") for part in text.split(","))})
