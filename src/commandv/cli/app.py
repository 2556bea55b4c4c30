"""The command line itself, and how a function becomes a verb of it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
import typer.main

app = typer.Typer(
    help="Copy a behaviour from one language model, paste it into another.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        sys.stdout.write(f"commandv {importlib.metadata.version('commandv')}\n")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def options_of(verb: str) -> list[str]:
    """Return the names of the options of a verb as its function has them; none where there is no such verb."""
    commands = vars(typer.main.get_command(app))["commands"]
    taken = commands[verb].params if verb in commands else []
    return [one.name for one in taken if one.param_type_name == "option"]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a verb of the command line.

    A parameter whose type is a dataclass is a bundle of options (see `commandv.cli.options`): the verb takes the
    options that are its fields, after its own, and the function gets the bundle.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    bundles: dict[str, Any] = {
        name: one.annotation for name, one in parameters.items() if dataclasses.is_dataclass(one.annotation)
    }
    taken = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters.values() if one.name not in bundles]
    for bundle in bundles.values():
        types = get_type_hints(bundle, include_extras=True)
        taken += [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=types[one.name])
            for one in dataclasses.fields(bundle)
        ]

    @functools.wraps(function)
    def run(**given: Any) -> None:
        for name, bundle in bundles.items():
            given[name] = bundle(**{one.name: given.pop(one.name) for one in dataclasses.fields(bundle)})
        function(**given)

    vars(run)["__signature__"] = inspect.Signature(taken)
    run.__annotations__ = {one.name: one.annotation for one in taken}
    app.command()(run)
    return function
