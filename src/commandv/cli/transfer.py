"""The verbs from an adapter of one model to a measured one of another: transfer, tune, demo."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commandv.cli.app import app, verb
from commandv.cli.checks import of_prompts, require_fits, require_layers, require_methods
from commandv.cli.options import (
    GENERAL,
    AdapterFile,
    AdaptersPlace,
    BatchSize,
    Expect,
    ExpectFile,
    Json,
    Loading,
    Model,
    Out,
    PromptsOption,
    Reading,
    Tasks,
    escaped,
    output,
    show,
    task_of,
)
from commandv.errors import MOST_SEED

if TYPE_CHECKING:
    from commandv.evaluation.transferring.certificate import Transferred
    from commandv.evaluation.transferring.job import Job

# Small in every number, so that it ends in about two minutes; by activations, the quickest method.
DEMO = (
    "transfer gemma-3-270m builtin:numbered-list@gemma-3-270m smollm2-135m-instruct --task numbered-list --by "
    "activations --limit 400 --n-asked 32"
)

Layers = Annotated[
    list[str], typer.Option("--layers", help="A choice of layers to try: last_third, last_half, 4,8. Repeatable.")
]
Scales = Annotated[list[float], typer.Option("--scales", help="A factor on the deltas to try. Repeatable.")]
Budget = Annotated[float, typer.Option(help="Most drift on benign text, KL in nats per token.")]
MostLoops = Annotated[float, typer.Option(help="Share of answers that may loop above the unmodified model's.")]


@verb
def transfer(
    donor: Model,
    adapter: AdapterFile,
    recipient: Model,
    out: AdaptersPlace,
    how: Loading,
    reading: Reading,
    task: Annotated[str | None, typer.Option(help="What is asked, and how it counts: NAME or NAME:FILE.")] = None,
    expect: Expect = "",
    expect_file: ExpectFile = None,
    judge: Annotated[str | None, typer.Option(help="A judge of the answers, as `evaluate --judge` takes it.")] = None,
    by: Annotated[
        str, typer.Option(help="auto, or some of activations, context, vocabulary, answers, training: a,b.")
    ] = "auto",
    layers: Layers = ["last_third", "last_half"],  # noqa: B006
    scales: Scales = [0.5, 0.75, 1.0],  # noqa: B006
    budget: Budget = 0.5,
    most_loops: MostLoops = 0.1,
    prompts: PromptsOption = GENERAL,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many of each of these sets.")] = None,
    asked: Annotated[
        str | None, typer.Option(callback=of_prompts, help="Prompts that the donor answers. Default: the task's.")
    ] = None,
    n_dev: Annotated[int, typer.Option(min=1, help="Development prompts, to choose on.")] = 24,
    n_test: Annotated[int, typer.Option(min=1, help="Test prompts, to report on.")] = 64,
    n_asked: Annotated[int, typer.Option(min=1, help="Prompts that the donor answers.")] = 128,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of fits and random controls.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and how long it takes.")] = False,
    tasks: Tasks = None,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """Carry an adapter into another model by every method that applies, and measure whether it arrived."""
    from commandv.evaluation.judges import load_judge

    wanted = task_of(task, expect, expect_file, tasks)
    judging = None if judge is None else load_judge(judge)
    require_methods(by)
    for choice in layers:
        require_layers(choice, recipient)
    _require_adapter_and_place(reading, adapter, donor, scales, out)

    import commandv as cv
    from commandv.evaluation.transferring.job import TransferSettings, prepare
    from commandv.prompts.sets import load_prompt_sets

    settings = TransferSettings(
        by=by, layers=tuple(layers), scales=tuple(scales), budget=budget, most_loops=most_loops, n_dev=n_dev,
        n_test=n_test, n_asked=n_asked, seed=seed, batch_size=batch_size,
        judge=judging, prompts=load_prompt_sets(prompts, limit=limit),
        asked=None if asked is None else cv.load_prompts(asked),
    )  # fmt: skip
    original = reading.load(adapter, same_as=how.same_as)
    require_fits([original], donor, max(scales))
    job = prepare(how.load(donor), original, replace(how, same_as="").load(recipient), wanted, settings)
    _go(job, out, recipient, dry_run=dry_run, as_json=as_json)


@verb
def tune(
    adapter: AdapterFile,
    model: Model,
    task: Annotated[str, typer.Argument(help="What is asked, and how it counts: NAME or NAME:FILE.")],
    out: AdaptersPlace,
    how: Loading,
    reading: Reading,
    layers: Layers = ["all_layers", "last_half", "last_third", "middle_third"],  # noqa: B006
    scales: Scales = [0.5, 0.75, 1.0, 1.25],  # noqa: B006
    budget: Budget = 0.5,
    most_loops: MostLoops = 0.1,
    limit: Annotated[int, typer.Option(min=1, help="Use the first so many development prompts.")] = 24,
    tasks: Tasks = None,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """Choose layers and scale of an adapter on its own model, by effect and price on development prompts."""
    asked = task_of(task, "", None, tasks)
    assert asked is not None
    for choice in layers:
        require_layers(choice, model)
    _require_adapter_and_place(reading, adapter, model, scales, out)

    import commandv as cv
    from commandv.cli.tables import tried_table
    from commandv.evaluation.outcomes import measure
    from commandv.evaluation.tuning import grid, tune as tuned_by

    original = reading.load(adapter, same_as=how.same_as)
    require_fits([original], model, max(scales))
    lm = how.load(model)
    original.model.require(lm.ref, f"adapter {original.name}")
    choices = _different(original, layers, lm.n_layers)
    plain = measure(lm, asked, split="dev", limit=limit, batch_size=batch_size)
    found = tuned_by(
        lm, asked, lambda one: original.on_layers(choices[one.layers]), grid(choices, scales), budget=budget,
        most_loops=plain.loop_rate().value + most_loops, limit=limit, batch_size=batch_size,
    )  # fmt: skip
    setting = found.chosen.setting
    facts = {
        "task": asked.name,
        "unmodified": plain.score().value,
        "tried": [one.as_dict() for one in found.tried],
        "within_budget": found.within_budget,
    }
    final = original.on_layers(choices[setting.layers]).scaled(setting.scale)
    cv.save(replace(final, provenance={**final.provenance, "tuned": facts}), out)
    chosen = {"adapter": str(out), "layers": final.layers, "scale": setting.scale, "value": found.chosen.value}
    if as_json:
        show({**chosen, **facts}, True)
        return
    output(tried_table(f"{asked.name} on development prompts, n = {len(plain.labels)}", found.tried, found.chosen))
    show({**chosen, "unmodified": facts["unmodified"], "within_budget": found.within_budget}, False)


@verb
def demo(
    n: Annotated[int, typer.Option(min=16, help="Test prompts.")] = 48,
    out: Out = Path("commandv-demo"),
    as_json: Json = False,
) -> None:
    """Carry "answer as a numbered list" from one real model into another: `commandv transfer` on the packaged ones."""
    words = [*shlex.split(DEMO), "--n-test", str(n), "-o", str(out)]
    if as_json:
        words.append("--json")
    else:
        output(f"[bold]$ {escaped(shlex.join(['commandv', *words]))}[/bold]")
    app(words, standalone_mode=False)


def _require_adapter_and_place(reading: Reading, adapter: str, model: str, scales: list[float], out: Path) -> None:
    from commandv.storage.files import require_free

    require_free(out)
    reading.check(adapter, model=model, scale=max(scales))


def _go(job: Job, out: Path, recipient: str, *, dry_run: bool, as_json: bool) -> None:
    """Tell the plan, run it, write the adapter, and say what was found."""
    import commandv as cv
    from commandv.evaluation.transferring.planning import plan
    from commandv.evaluation.transferring.running import run
    from commandv.storage.files import locked

    planned = plan(job)
    if dry_run or not as_json:
        stages = {one.name: f"{one.seconds:.0f} s" for one in planned.stages if one.seconds}
        if as_json:
            show({"seconds": planned.seconds, "stages": [one._asdict() for one in planned.stages]}, True)
        else:
            show({**stages, "in all": f"about {planned.seconds:.0f} s"}, False)
    if dry_run:
        return
    with locked(out, wait=False):
        try:
            found = run(job, planned)
        except KeyboardInterrupt:
            sys.stderr.write("commandv: stopped; what is finished is kept, and the same command goes on there\n")
            raise
        certificate = {**found.certificate, "command": shlex.join(["commandv", *sys.argv[1:]])}
        cv.save(replace(found.adapter, provenance={**found.adapter.provenance, "certificate": certificate}), out)
    if as_json:
        show({"adapter": str(out), "arrived": found.arrived, **certificate}, True)
        return
    _tell(found, certificate, out, recipient)


def _tell(found: Transferred, certificate: dict[str, Any], out: Path, recipient: str) -> None:
    from commandv.cli.tables import certificate_table
    from commandv.storage.files import file_name

    output("")
    output(certificate_table(certificate))
    if found.samples:
        output("The first development prompts in which it is absent before and present after:")
    for one in found.samples:
        output(f"\n[bold]{escaped(one.prompt)}[/bold]\n[dim]before:[/dim] {escaped(one.before.strip())}")
        output(f"[dim]after: [/dim] {escaped(one.after.strip())}")
    output(f"\n{escaped(found.sentence)}")
    own = shlex.join(["commandv", "generate", recipient, "How do I make tea?", "--adapter", str(out)])
    talk = shlex.join(["commandv", "chat", recipient, "--adapter", f"{file_name(found.adapter.name)}={out}"])
    output(f"\nThe adapter and its certificate are in {escaped(str(out))}. A prompt of your own, or a talk with both:")
    output(f"  {escaped(own)}\n  {escaped(talk)}")


def _different(adapter: Any, choices: list[str], n_layers: int) -> dict[str, list[int]]:
    """Return the choices that leave different layers of an adapter, the first of those that leave the same."""
    from commandv.errors import InputError
    from commandv.models.layers import choose_layers

    found: dict[str, list[int]] = {}
    for choice in choices:
        allowed = set(choose_layers(choice, n_layers))
        kept = [layer for layer in adapter.layers if layer in allowed]
        if kept and kept not in found.values():
            found[choice] = kept
    if not found:
        raise InputError(f"{adapter.name}: acts on layers {adapter.layers}, none of them among {', '.join(choices)}")
    return found
