"""The verb that serves a model with behaviours."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from commandv.cli.app import verb
from commandv.cli.checks import require_fits
from commandv.cli.options import Json, Loading, Model, Reading, output, show

Named = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", metavar="NAME=DIR", help="An adapter, and its name in behaviours. Repeatable."),
]


def named_places(given: list[str] | None, reading: Reading, model: str) -> dict[str, str]:
    """Return the adapters that NAME=DIR words say, each of which the model can have as far as can be told at once."""
    from commandv.adapters.shipped import require_adapter_source
    from commandv.errors import InputError
    from commandv.serving.behaviours import require_names

    places: dict[str, str] = {}
    for word in given or []:
        name, equals, place = word.partition("=")
        if not equals or not place:
            raise InputError(f"--adapter {word!r}: expected NAME=DIR, such as pirate=adapters/pirate")
        if name in places:
            raise InputError(f"--adapter: two of the name {name!r}; give each its own")
        places[name] = place
    require_names(places)
    for place in places.values():
        require_adapter_source(place)
        reading.check(place, model=model)
    return places


@verb
def serve(
    model: Model,
    how: Loading,
    reading: Reading,
    adapter: Named = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="COMMANDV_API_KEY", help="What clients must send. Better in the environment.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Most requests in one batch.")] = 64,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Most requests that wait; more are told to come again.")
    ] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1, help="Longest request in bytes.")] = 1 << 20,
    as_json: Json = False,
) -> None:
    """Serve a model to OpenAI's clients and to a browser; the model's name picks the behaviour: base+pirate@0.6."""
    from commandv.errors import InputError
    from commandv.serving.listening import address, listen

    places = named_places(adapter, reading, model)
    with listen(host, port) as listening:
        try:
            from commandv.serving.app import create_app
            from commandv.serving.server import run
        except ImportError as error:
            raise InputError(
                f"serve needs a package that is missing ({error.name}): pip install 'commandv[serve]'"
            ) from error
        from commandv.serving.engine import Engine

        adapters = {name: reading.load(place) for name, place in places.items()}
        require_fits(list(adapters.values()), model, 1.0)
        lm = how.load(model)
        with Engine(lm, adapters, max_rows=max_rows, max_waiting=max_waiting) as engine:
            names = ["base", *(f"base+{name}" for name in adapters)]
            facts = {"address": address(listening), "api": f"{address(listening)}/v1", "models": names}
            if as_json:
                show(facts, True)
                sys.stdout.flush()  # whoever started it waits for this
            else:
                output(f"{facts['address']} serves {lm.id}: {', '.join(names)}")
            run(create_app(engine, api_key=api_key, max_tokens=max_tokens, max_body=max_body), listening, engine.close)
