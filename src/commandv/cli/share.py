"""The verbs that share on the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from commandv.cli.app import verb
from commandv.cli.checks import of_adapter, of_repo
from commandv.cli.options import Json, Out, show

RepoId = Annotated[str, typer.Argument(callback=of_repo, metavar="USER/NAME", help="Repository on the hub.")]


@verb
def push(
    path: Annotated[
        str,
        typer.Argument(
            callback=of_adapter, help="Adapter, profile or demonstrations: a directory, a file, builtin:..."
        ),
    ],
    repo: RepoId,
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it. Default: a private one.")] = False,
    license: Annotated[str | None, typer.Option(help="Of what is uploaded, by the hub's name: mit, ...")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    as_json: Json = False,
) -> None:
    """Upload an adapter, a profile or demonstrations to the Hugging Face hub, with a card."""
    from commandv.adapters.shipped import BUILTIN
    from commandv.interop.detect import detect
    from commandv.storage.hub import is_repo

    if not (path.startswith(BUILTIN) or is_repo(path)):
        detect(path)

    import commandv as cv

    done = cv.push(path, repo, private=not public, license=license, message=message)
    show({"url": done.url, "commit": done.commit, "bytes": done.size, "private": not public}, as_json)


@verb
def pull(
    repo: RepoId,
    out: Out,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    as_json: Json = False,
) -> None:
    """Download an adapter, a profile or demonstrations from the Hugging Face hub as a directory."""
    from commandv.storage.hub import require_there

    require_there(repo, "model", "dataset", revision=revision)

    import commandv as cv
    from commandv.interop.detect import detect

    found = cv.pull(repo, out, revision=revision)
    show({"directory": str(out), "what": detect(out), "holds": str(type(found).__name__)}, as_json)
