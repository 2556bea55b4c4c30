"""The verbs that carry a behaviour through words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from commandv.cli.app import verb
from commandv.cli.checks import of_adapter, of_demonstrations, of_prompts, require_fits
from commandv.cli.options import (
    AdapterFile,
    AdaptersPlace,
    BatchSize,
    DemonstrationsPlace,
    Json,
    Loading,
    MaxNewTokens,
    Model,
    Reading,
    Scale,
    show,
)
from commandv.errors import MOST_SEED


def _of_adapter(context: typer.Context, source: str) -> str:
    return source if source == "none" else of_adapter(context, source) or ""


@verb
def demonstrate(
    model: Model,
    how: Loading,
    adapter: Annotated[
        str,
        typer.Argument(callback=_of_adapter, help="The donor's adapter, builtin:...; 'none' takes the set's replies."),
    ],
    out: DemonstrationsPlace,
    reading: Reading,
    prompts: Annotated[
        str, typer.Argument(callback=of_prompts, help="What to ask: builtin:NAME or a file.")
    ] = "builtin:general",
    limit: Annotated[int, typer.Option(min=1, help="Use the first so many prompts.")] = 130,
    harmful: Annotated[
        str | None,
        typer.Option(callback=of_prompts, help="A set of harmful prompts to ask, too; only refusals of them are kept."),
    ] = None,
    max_new_tokens: MaxNewTokens = 48,
    scale: Scale = 1.0,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Have a donor with its adapter answer prompts, and keep the answers and what the adapter changes in them."""
    import commandv as cv

    reading.check(None if adapter == "none" else adapter, model=model, scale=scale)
    asked = cv.load_prompts(prompts, limit=limit)
    answers = [one.response for one in asked] if adapter == "none" else None
    dangerous = set[str]()
    if harmful is not None:
        more = cv.load_prompts(harmful, limit=limit)
        dangerous, asked = set(more.texts), asked + more
        answers = None if answers is None else [*answers, *(one.response for one in more)]

    from commandv.evaluation.graders import refusal

    changing = None if adapter == "none" else reading.load(adapter)
    require_fits([changing] if changing else [], model, scale)
    donor = how.load(model)
    made = cv.demonstrate(
        donor, None if changing is None else changing.scaled(scale), asked, answers=answers,
        keep=lambda prompt, answer: prompt.text not in dangerous or refusal(answer),
        max_new_tokens=max_new_tokens, batch_size=batch_size, name=Path(prompts).stem if changing is None else "",
    )  # fmt: skip
    cv.save_demonstrations(made, out)
    facts = {"demonstrations": str(out), "behaviour": made.name, "answers": len(made), "left_out": made.dropped}
    show({**facts, "loop_rate": made.loop_rate, "mean_divergence": made.mean_divergence}, as_json)


Shown = Annotated[str, typer.Argument(callback=of_demonstrations, help="Demonstrations: a directory, or on the hub.")]


@verb
def distil(
    model: Model,
    how: Loading,
    demonstrations: Shown,
    out: AdaptersPlace,
    by: Annotated[Literal["auto", "context", "vocabulary", "answers"], typer.Option(help="Which method.")] = "auto",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of each fit; 16, and 64 where auto takes many demonstrations.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Of the demonstrations' sets and of what is held out.")
    ] = 0,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Make an adapter of a model that behaves as demonstrations do, without training."""
    import commandv as cv

    shown = cv.load_demonstrations(demonstrations)
    recipient = how.load(model)
    adapter = cv.distil(recipient, shown, by=by, rank=rank, seed=seed, batch_size=batch_size)
    cv.save(adapter, out)
    where = ", ".join(sorted(map(str, adapter.positions)))
    facts = {"adapter": str(out), "by": adapter.provenance["by"], "layers": adapter.layers, "positions": where}
    show({**facts, "parameters": adapter.n_parameters}, as_json)


@verb
def predict(
    model: Model,
    how: Loading,
    adapter: AdapterFile,
    reading: Reading,
    demonstrations: Shown,
    scale: Scale = 1.0,
    as_json: Json = False,
) -> None:
    """Forecast whether a behaviour will arrive with a recipient's adapter, before it generates a token with it."""
    import commandv as cv

    reading.check(adapter, model=model, scale=scale)
    shown, own = cv.load_demonstrations(demonstrations), reading.load(adapter)
    require_fits([own], model, scale)
    found = cv.predict(how.load(model), own, shown, scale=scale)
    if as_json:
        show(found.as_dict(), True)
        return
    warned = {"warning": "; ".join(found.warnings)} if found.warnings else {}
    show({"probability": f"{found.probability:.2f}", "reason": found.reason, "fit": found.fitted_on, **warned}, False)
