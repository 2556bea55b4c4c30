"""The command line itself, and how a function becomes a verb of it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import typer

app = typer.Typer(
    help="Copy a behaviour from one language model, paste it into another.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


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
