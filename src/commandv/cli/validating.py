"""The verb that validates mappers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commandv.cli.app import app
from commandv.cli.options import (
    GENERAL,
    BatchSize,
    Device,
    Dtype,
    Json,
    PromptsOption,
    System,
    Template,
    TemplateOption,
    fitter,
    output,
    show,
    template_options,
)


@app.command()
def validate(
    donor: Annotated[str, typer.Argument(help="Model whose states are mapped: hub id, directory, .gguf, packaged.")],
    recipient: Annotated[str, typer.Argument(help="Model whose states are replaced by them.")],
    layer: Annotated[str, typer.Option(help="Donor layer, or donor and recipient layer: 9 or 9:15.")],
    fit: Annotated[
        str, typer.Option(help="ridge, pinv, affine, reduced-rank, procrustes, fourier, autoencoder.")
    ] = "ridge",
    prompts: PromptsOption = GENERAL,
    text: Annotated[
        str, typer.Option(help="Passages for text rows of the profiles; 'none' to leave them out.")
    ] = "builtin:text",
    read: Annotated[str | None, typer.Option(help="Passages to read along. Default: those kept from the fit.")] = None,
    ask: Annotated[str | None, typer.Option(help="Prompts to reply to. Default: those kept from the fit.")] = None,
    questions: Annotated[Path | None, typer.Option(help="Multiple-choice questions, .jsonl.")] = None,
    n: Annotated[int, typer.Option(help="Use the first so many passages, prompts and questions.")] = 32,
    tokens: Annotated[int, typer.Option(help="Read so many tokens of each passage.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply in tokens.")] = 24,
    judge: Annotated[str | None, typer.Option(help="Of the replies: refusal, pirate, classifier:ID#label, ...")] = None,
    read_along: Annotated[
        bool, typer.Option("--read-along", help="Map the reply's tokens too; for two versions of one model.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random controls.")] = 0,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    device_map: Device = None,
    template: Template = "auto",
    system: System = None,
    template_option: TemplateOption = None,
    as_json: Json = False,
) -> None:
    """Put one model's mapped states in place of another's at one layer, and compare what it says with what it said."""
    import commandv as cv
    from commandv.evaluation.choices import load_questions
    from commandv.evaluation.judges import load_judge
    from commandv.mapping import layer_pair, unseen
    from commandv.prompts.sets import load_prompt_sets

    method, chosen = fitter(fit), load_judge(judge) if judge else None
    asked, passages = load_prompt_sets(prompts), None if text == "none" else cv.load_prompts(text)
    kept, kept_passages = (None, None) if read and ask else unseen(asked, passages)
    trial = cv.Trial(
        texts=cv.load_prompts(read, limit=n) if read else kept_passages and kept_passages[:n],
        prompts=cv.load_prompts(ask, limit=n) if ask else kept and kept[:n],
        questions=load_questions(questions)[:n] if questions else (),
        tokens=tokens,
        max_new_tokens=max_new_tokens,
        judge=chosen,
        read_along=read_along,
        batch_size=batch_size,
    )
    donor_lm, recipient_lm = (
        cv.load_model(
            one,
            dtype=dtype,
            device_map=device_map,
            template=template,
            system=system,
            template_options=template_options(template_option),
        )
        for one in (donor, recipient)
    )
    pair = layer_pair(layer, donor_lm.n_layers, recipient_lm.n_layers)
    one, two = (cv.profile(lm, asked, text=passages, places="words") for lm in (donor_lm, recipient_lm))
    link = cv.link(one, two, fit=method, write_rows="both")
    found = cv.validate_mapper(donor_lm, recipient_lm, link, pair, trial, seed=seed)
    if as_json:
        show(found.as_dict(), True)
        return
    for table in found.tables():
        output(table)
