"""The verbs that measure: evaluate, study, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commandv.cli.app import verb
from commandv.cli.checks import of_path, of_run, require_fits
from commandv.cli.options import (
    Attached,
    BatchSize,
    Expect,
    ExpectFile,
    Json,
    Loading,
    Model,
    Reading,
    Running,
    Scale,
    Tasks,
    escaped,
    output,
    show,
    task_of,
)
from commandv.errors import MOST_SEED

Judges = Annotated[
    list[str] | None,
    typer.Option("--judge", help="refusal, gcg, arditi, xstest, classifier:ID#label, guard:ID, endpoint:URL#model."),
]


@verb
def evaluate(
    model: Model,
    how: Loading,
    reading: Reading,
    task: Annotated[
        str | None, typer.Argument(help="NAME or NAME:FILE, e.g. numbered-list, over-refusal, exact:gsm8k.jsonl")
    ] = None,
    expect: Expect = "",
    expect_file: ExpectFile = None,
    adapter: Attached = None,
    scale: Scale = 1.0,
    judge: Judges = None,
    tasks: Tasks = None,
    n: Annotated[int | None, typer.Option(min=1, help="Use the first so many test prompts.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the random control.")] = 0,
    controls: Annotated[bool, typer.Option(help="Measure a random adapter of equal norm too.")] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for a label per prompt, as JSONL.")] = None,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """Measure a task on one model, without and with an adapter, beside a random one of equal norm; and the price."""
    reading.check(adapter, model=model, scale=scale)

    from commandv.errors import InputError
    from commandv.evaluation.judges import load_judge

    asked = task_of(task, expect, expect_file, tasks)
    if asked is None:
        raise InputError("nothing to ask: give a task, or --expect with what a good answer holds")
    panel = [load_judge(spec) for spec in judge or []]

    from commandv.cli.tables import arms_table
    from commandv.evaluation.catalogue import meaning
    from commandv.evaluation.session import evaluate as run

    attached = reading.load(adapter) if adapter else None
    require_fits([attached] if attached else [], model, scale)
    lm = how.load(model)
    found = run(
        lm, asked, attached, scale=scale, judges=panel, limit=n, seed=seed, controls=controls,
        batch_size=batch_size, out=out,
    )  # fmt: skip
    if as_json:
        show(found.as_dict(), True)
        return
    for name, rows in found.rows.items():
        what = meaning(found.task.name, rows[0].score.unit)
        title = f"{found.task.name}, judged by {name}: {what}; {found.task.success} is the aim"
        output(arms_table(title, rows, price=found.price, loops=found.loops, words=found.words))
    for line in found.notes:
        output(escaped(line))


@verb
def study(
    file: Annotated[Path, typer.Argument(callback=of_path, help="Study file (YAML).")],
    running: Running,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run directory. Default: runs/NAME.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate the file and show the plan; run nothing.")
    ] = False,
    rehearse: Annotated[
        int | None, typer.Option(help="Run with random weights in the models' shapes, widths divided by this.")
    ] = None,
    tasks: Tasks = None,
    as_json: Json = False,
) -> None:
    """Run a study: donors x recipients x behaviours x methods x seeds x scales; resumes where it was cut off."""
    from dataclasses import asdict

    from commandv.errors import InputError
    from commandv.evaluation.catalogue import tasks_of
    from commandv.evaluation.study import load_study

    spec = load_study(file)
    if rehearse is not None:
        spec = spec.rehearsed()
    known = tasks_of(tasks) if tasks else {}
    problems = spec.unreadable(known)
    if problems and not dry_run:
        raise InputError(f"{file}: " + "; ".join(problems))

    from commandv.evaluation.study import plan, run_study
    from commandv.evaluation.study.models import ModelSource
    from commandv.evaluation.study.running import claim

    if dry_run:
        counted = {} if problems else asdict(plan(spec, tasks=known, convert=False))
        facts = {"study": spec.name, "cells": len(spec.cells()), **counted, "not readable here": problems}
        show(facts, as_json)
        return
    place = out or Path("runs") / spec.name
    claim(spec, place)
    models = ModelSource(spec, rehearsal=rehearse)
    has = spec.workers
    executor = running.choose(workers=has.count, cpus=has.cpus, gpus=has.gpus, size=models.bytes())
    if not as_json:
        show({"study": spec.name, **asdict(plan(spec, models, known))}, False)
    run = run_study(spec, place, models=models, tasks=known, executor=executor)
    failed = [cell for cell in run.cells if cell.state == "failed"]
    show({"run": str(place), "cells": len(run.cells), "failed": [f"{c.donor} -> {c.recipient}, {c.behaviour}, "
          f"seed {c.seed}: {c.error}" for c in failed]}, as_json)  # fmt: skip
    if failed:
        raise typer.Exit(1)


@verb
def report(
    run: Annotated[Path, typer.Argument(callback=of_run, help="Directory that `commandv study` wrote.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the report goes. Default: the run's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a study's report: one self-contained HTML file and a Markdown twin."""
    from commandv.evaluation.report import require_report_place, write_report
    from commandv.evaluation.results import load_run

    require_report_place(out or run)
    html, markdown = write_report(load_run(run), out or run)
    show({"html": str(html), "markdown": str(markdown)}, as_json)
