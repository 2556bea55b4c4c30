"""What can be found wrong before a model is loaded, most of it before torch is imported, which takes seconds."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import typer

from commandv.errors import FormatError, InputError, did_you_mean
from commandv.known import Matcher, Method

if TYPE_CHECKING:
    from commandv.adapters.outline import Shaped
    from commandv.storage.directories import Kind

DEEP = 1_000_000  # layers of a model whose depth is not known yet


# -- of one argument --------------------------------------------------------------------------------------------------


def of_model(context: typer.Context, model: str) -> str:
    """Return the name of a model that there can be."""
    from commandv.models.names import require_model_name

    if not context.resilient_parsing:  # as it is while a shell asks for completions
        require_model_name(model)
    return model


def of_adapter(context: typer.Context, source: str | None) -> str | None:
    """Return the name of an adapter that there can be."""
    from commandv.adapters.shipped import require_adapter_source

    if source is not None and not context.resilient_parsing:
        require_adapter_source(source)
    return source


def of_anything(context: typer.Context, source: str) -> str:
    """Return the name of an adapter, model, profile or file that there can be."""
    from commandv.models.names import PACKAGED
    from commandv.storage.hub import is_repo

    if source in PACKAGED or is_repo(source):
        return source
    return of_adapter(context, source) or ""


def of_path(context: typer.Context, path: Path) -> Path:
    """Return the path of a file or directory that is there."""
    from commandv.storage.reading import no_such_file

    if not os.path.exists(path) and not context.resilient_parsing:
        raise FormatError(f"{path}: {no_such_file(path)}")
    return path


def of_run(context: typer.Context, path: Path) -> Path:
    """Return the directory of a study's results."""
    if not (of_path(context, path) / "run.json").is_file() and not context.resilient_parsing:
        raise FormatError(f"{path}: no run.json. Expected a directory that `commandv study` wrote")
    return path


def of_source(context: typer.Context, source: str) -> str:
    """Return a path that is there, or the name of a repository on the hub."""
    from commandv.storage.hub import is_repo

    if not is_repo(source):
        of_path(context, Path(source))
    return source


def of_profile(context: typer.Context, source: str) -> str:
    """Return the directory of a profile, or the name of a repository on the hub."""
    from commandv.storage.kinds import PROFILE

    return _of_kind(context, source, PROFILE)


def of_demonstrations(context: typer.Context, source: str) -> str:
    """Return the directory of demonstrations, or the name of a repository on the hub."""
    from commandv.storage.kinds import DEMONSTRATIONS

    return _of_kind(context, source, DEMONSTRATIONS)


def _of_kind(context: typer.Context, source: str, kind: Kind) -> str:
    from commandv.storage.directories import require_whole
    from commandv.storage.hub import is_repo, require_there

    if context.resilient_parsing:
        return source
    if is_repo(of_source(context, source)):
        require_there(source, "dataset")
    else:
        require_whole(Path(source), kind)
    return source


def of_adapters_place(context: typer.Context, place: Path) -> Path:
    """Return where an adapter may be written; told before anything else is looked at."""
    from commandv.storage.kinds import ADAPTER

    return _free_for(context, place, ADAPTER)


def of_demonstrations_place(context: typer.Context, place: Path) -> Path:
    """Return where demonstrations may be written; told before anything else is looked at."""
    from commandv.storage.kinds import DEMONSTRATIONS

    return _free_for(context, place, DEMONSTRATIONS)


def _free_for(context: typer.Context, place: Path, kind: Kind) -> Path:
    from commandv.storage.directories import require_place

    if not context.resilient_parsing:
        require_place(place, kind)
    return place


def of_repo(context: typer.Context, repo: str) -> str:
    """Return what has the form of a hub id."""
    from commandv.storage.hub import require_repo_id

    if not context.resilient_parsing:
        require_repo_id(repo)
    return repo


def of_prompts(context: typer.Context, source: str | None) -> str | None:
    """Return the name of a prompt set that there can be."""
    from commandv.prompts.sets import require_source

    if source is not None and not context.resilient_parsing:
        require_source(source)
    return source


def of_prompt_sets(context: typer.Context, sources: list[str]) -> list[str]:
    """Return the names of prompt sets that there can be."""
    for source in sources:
        of_prompts(context, source)
    return sources


# -- of a verb --------------------------------------------------------------------------------------------------------


def require_layers(choice: str, model: str = "") -> None:
    """Raise `InputError` for layers that a model does not have, or for what names none."""
    from commandv.models.layers import AUTO_LAYERS, choose_layers
    from commandv.models.names import shape_of

    shape = shape_of(model) if model else None
    if choice != AUTO_LAYERS or model:
        choose_layers(choice, shape[1] if shape else DEEP)


def require_match(text: str) -> None:
    """Raise `InputError` for what names no matcher and is no map of layers."""
    known = get_args(Matcher)
    pairs = [re.fullmatch(r"([0-9]{1,7}):[0-9]{1,7}", part) for part in text.split(",")]
    layers = {int(pair[1]) for pair in pairs if pair}
    if text not in known and len(layers) < len(pairs):  # a part that is no pair, or a layer of the donor twice
        raise InputError(
            f"match={text[:60]!r}{did_you_mean(text, known)}: expected one of {', '.join(known)}, or a map of "
            "each donor layer like 2:1,4:3"
        )


def require_methods(by: str) -> None:
    """Raise `InputError` for what names no methods of transfer."""
    known = get_args(Method)
    for name in map(str.strip, by.split(",")):
        if name not in ("auto", *known):
            raise InputError(
                f"by={by!r}{did_you_mean(name, ('auto', *known))}: expected auto, or some of {', '.join(known)}, "
                "separated by commas"
            )


def require_positions(*positions: str) -> None:
    """Raise `InputError` for what is no notation of positions."""
    from commandv.positions import as_positions

    for one in positions:
        as_positions(one)


def require_adapter(
    source: str, *, layer: int | None = None, convention: str | None = None, model: str = "", scale: float = 1.0
) -> None:
    """Raise what reading an adapter and attaching it would raise, as far as names and configurations can tell."""
    from commandv.adapters.outline import outline_of
    from commandv.adapters.shipped import BUILTIN
    from commandv.interop.detect import require_adapter_kind, require_convention, require_layer
    from commandv.storage.hub import is_repo, require_there

    require_fits([], model, scale)
    if is_repo(source):
        require_there(source, "model")
        return
    if not source.startswith(BUILTIN):
        require_convention(require_adapter_kind(source), convention)
        require_layer(source, layer)
    outline = outline_of(source)
    if outline is not None and model:
        require_fits([outline], model, scale)


def require_fits(adapters: Sequence[Shaped], model: str, scale: float) -> None:
    """Raise what attaching would raise once the model is loaded, as far as its configuration can tell."""
    from commandv.adapters.outline import require_scale, require_shape
    from commandv.models.names import shape_of

    require_scale(scale)
    shape = shape_of(model) if adapters else None
    for adapter in adapters:
        if shape:
            require_shape(adapter, *shape, model)
