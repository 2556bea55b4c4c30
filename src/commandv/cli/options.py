"""Options and output that the verbs share."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from commandv.cli.checks import (
    of_adapter,
    of_adapters_place,
    of_anything,
    of_demonstrations_place,
    of_model,
    of_prompt_sets,
    require_adapter,
)
from commandv.errors import MOST_SEED

if TYPE_CHECKING:
    from commandv.adapters.adapter import Adapter
    from commandv.evaluation.tasks import Task
    from commandv.executors.executor import Executor
    from commandv.models.lm import LM

Temperature = Annotated[
    float, typer.Option(min=0, max=2, help="0 takes the likeliest token; above it tokens are sampled.")
]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample among the fewest tokens of so much probability.")]
SamplingSeed = Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Of sampling.")]
Anything = Annotated[
    str,
    typer.Argument(
        callback=of_anything, help="A model, adapter, vector file, profile, demonstrations; builtin:..., or on the hub."
    ),
]
Model = Annotated[
    str,
    typer.Argument(callback=of_model, help="Hub id, directory, .gguf file, or a packaged model (gemma-3-270m)."),
]
AdapterFile = Annotated[
    str,
    typer.Argument(
        callback=of_adapter, help="Adapter directory, pyreft directory, vector file, or builtin:BEHAVIOUR@MODEL."
    ),
]
Attached = Annotated[str | None, typer.Option("--adapter", "-a", callback=of_adapter, help="Adapter to attach.")]
Scale = Annotated[float, typer.Option(help="Factor on the adapter's deltas.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory for the result.")]
AdaptersPlace = Annotated[
    Path, typer.Option("--out", "-o", callback=of_adapters_place, help="Directory for the result.")
]
DemonstrationsPlace = Annotated[
    Path, typer.Option("--out", "-o", callback=of_demonstrations_place, help="Directory for the result.")
]
PromptsOption = Annotated[
    list[str],
    typer.Option(
        "--prompts", callback=of_prompt_sets, help="builtin:NAME, .txt, .csv, .jsonl, or a hub dataset. Repeatable."
    ),
]
GENERAL, TEXT = ["builtin:general"], "builtin:text"
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")]
ReadRows = Annotated[Literal["end", "text", "both"], typer.Option(help="Rows that reading converters are fitted on.")]
WriteRows = Annotated[
    Literal["end", "text", "both"] | None,
    typer.Option(help="Rows that writing converters are fitted on. Default: text, where the profiles have them."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Tasks = Annotated[
    Path | None,
    typer.Option("--tasks", help="Python file whose TASKS, Task objects by name, are known too; it is run."),
]
Expect = Annotated[str, typer.Option(metavar="REGEX", help="Instead of a task: what a good answer holds.")]
ExpectFile = Annotated[
    Path | None, typer.Option(help="Instead: a .jsonl of prompts, each with what it should hold under 'expect'.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded and asked: a bundle of every verb that runs one."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights. Default: what is fast here."),
    ] = None
    device_map: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...: where the model goes.")] = None
    template: Annotated[
        Literal["auto", "chat", "plain"], typer.Option(help="How prompts are written; plain: question and answer.")
    ] = "auto"
    system: Annotated[str | None, typer.Option(help="System prompt. Default: what the chat template itself says.")] = (
        None
    )
    template_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A variable of the chat template: enable_thinking=false. Repeatable."),
    ] = None
    same_as: Annotated[
        str, typer.Option(metavar="NAME", help="Take the model for the one of this name (a copy, another precision).")
    ] = ""
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
    ] = False

    def __post_init__(self) -> None:
        from commandv.errors import InputError
        from commandv.models.devices import require_device

        require_device(self.device_map)
        options = _template_options(self.template_option)
        if self.template == "plain" and (self.system is not None or options):
            raise InputError("--template plain has no system prompt and no options; leave out one or the other")

    def load(self, model: str) -> LM:
        """Load a model as the options say."""
        import commandv as cv

        return cv.load_model(
            model, dtype=self.dtype, device_map=self.device_map, template=self.template, system=self.system,
            template_options=_template_options(self.template_option), same_as=self.same_as,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """How a file of an adapter is read: a bundle of every verb that takes one."""

    layer: Annotated[
        int | None, typer.Option(min=0, help="For a bare vector: the layer it acts on, counted from 0.")
    ] = None
    convention: Annotated[
        str | None,
        typer.Option(help="How a vector file counts layers: blocks or hidden-states; a GGUF: llama.cpp or from-zero."),
    ] = None

    def check(self, source: str | None, *, model: str = "", scale: float = 1.0) -> None:
        """Raise what loading an adapter and attaching it would raise, as far as can be told at once."""
        if source is not None:
            require_adapter(source, layer=self.layer, convention=self.convention, model=model, scale=scale)

    def load(self, source: str, *, same_as: str = "") -> Adapter:
        """Load an adapter as the options say."""
        import commandv as cv

        return cv.load_adapter(source, layer=self.layer, convention=self.convention, same_as=same_as)


@dataclass(frozen=True)
class Running:
    """Where the work is done: a bundle of the verbs that can spread it."""

    executor: Annotated[
        str, typer.Option(metavar="WHERE", help="local; ray (started here); ray:auto or ray:HOST:PORT for a cluster.")
    ] = "local"
    workers: Annotated[int | None, typer.Option(help="Ray workers at most. Default: as there is room.")] = None
    cpus: Annotated[float | None, typer.Option(help="CPUs, and threads, of one worker. Default: 1.")] = None
    gpus: Annotated[float | None, typer.Option(help="GPUs of one worker. Default: by the models' size.")] = None

    def __post_init__(self) -> None:
        from commandv.errors import InputError
        from commandv.executors.address import WAIT, require_listener

        kind, _, address = self.executor.partition(":")
        if kind != "ray" and (not self.local or (self.workers, self.cpus, self.gpus) != (None, None, None)):
            raise InputError(
                f"--executor {self.executor!r}: expected local (without workers, cpus and gpus), ray, ray:auto or "
                "ray:HOST:PORT"
            )
        if address:
            require_listener(address, WAIT)

    @property
    def local(self) -> bool:
        """True where this process does the work."""
        return self.executor == "local"

    def choose(
        self, *, workers: int | None = None, cpus: float = 1.0, gpus: float | None = None, size: int = 0
    ) -> Executor:
        """Return the executor that the options name; what they leave open is as given here."""
        from commandv.executors.executor import Local
        from commandv.executors.ray import Ray

        if self.local:
            return Local()
        return Ray(
            self.executor.partition(":")[2] or None,
            workers=workers if self.workers is None else self.workers,
            cpus=cpus if self.cpus is None else self.cpus,
            gpus=gpus if self.gpus is None else self.gpus,
            size=size,
        )


def _template_options(given: list[str] | None) -> dict[str, Any]:
    """Return the template options that NAME=VALUE words say: JSON values, or texts where they are none."""
    from commandv.errors import FormatError, InputError
    from commandv.storage.reading import parse_json

    options: dict[str, Any] = {}
    for word in given or []:
        name, equals, value = word.partition("=")
        if not equals or name in options:
            twice = f"{name} is given twice" if equals else "expected NAME=VALUE, such as enable_thinking=false"
            raise InputError(f"--template-option {word[:60]!r}: {twice}")
        try:
            options[name] = parse_json(value.lower() if value in ("True", "False") else value, name)
        except FormatError:
            options[name] = value
    return options


def task_of(task: str | None, expect: str, expect_file: Path | None, tasks: Path | None) -> Task | None:
    """Return the task that the options describe; None where they name none."""
    from commandv.errors import InputError
    from commandv.evaluation.catalogue import NO_TASKS, expecting, load_task, tasks_of

    if task is not None and (expect or expect_file):
        raise InputError("give a task, or --expect with or without --expect-file; not both")
    if task is not None:
        return load_task(task, tasks_of(tasks) if tasks else NO_TASKS)
    return expecting(expect, expect_file) if expect or expect_file else None


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts as lines or as one JSON object."""
    if as_json:
        from pydantic_core import to_json

        # Unlike json.dumps, NaN becomes null: other programs' parsers refuse NaN.
        sys.stdout.write(to_json(facts, indent=2, inf_nan_mode="null", fallback=str).decode() + "\n")
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        for i, line in enumerate(_lines(value)):
            output(f"[dim]{'' if i else name:{width}}[/dim]  {escaped(line)}")


def _lines(value: Any) -> list[str]:
    """Return what is shown of a fact: a line, or one for each of several objects."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return [", ".join(f"{name} {_short(part)}" for name, part in one.items()) for one in value]
    return [_short(value)]


def _short(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def output(what: Any) -> None:
    """Print text with markup, or a table."""
    from rich.console import Console

    Console(highlight=False, soft_wrap=isinstance(what, str)).print(what)


def escaped(text: str) -> str:
    """Return text whose brackets are no markup and which cannot steer a terminal, whatever a file has for names."""
    from rich.markup import escape

    return escape(printable(text))


def printable(text: str) -> str:
    """Return text with a mark in place of each control character but the line break and the tabulator."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
