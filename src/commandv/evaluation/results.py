"""What a study leaves behind: one file per cell and one that says how it was made. Reports are written from these."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

from commandv.errors import FormatError
from commandv.files import digest, write_text
from commandv.reading import read_bytes

VERSION = 2  # 1 named the files of cells by their models, behaviour and seed
MOST_RESULT = 1 << 28  # bytes of one cell's file
log = logging.getLogger(__name__)
M = TypeVar("M", bound=pydantic.BaseModel)


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Arm(_Strict):
    """One column of a table: a method at one strength, prompt by prompt.

    Attributes:
        method: `"unmodified"`, `"pasted"`, a control of `CONTROLS`, `"direct"` or `"donor"`.
        scale: factor on the adapter's deltas.
        layers: recipient layers it acts on.
        labels: task -> one label per test prompt, null where the judge had no judgment.
        units: task -> unit of its labels, `"rate"` for 0 and 1.
        price: measure -> figures. `"kl"`, `"perplexity"`: nats per token of each passage (perplexity is that of the
            passage); `"loops"`: 1 for each answer to the behaviour's own task that loops, else 0.
        seconds: wall clock that making and measuring it took.
    """

    method: str
    scale: float = 1.0
    layers: list[int] = []
    labels: dict[str, list[float | None]] = {}
    units: dict[str, str] = {}
    price: dict[str, list[float]] = {}
    seconds: float = 0.0


class Point(_Strict):
    """One setting of one method, tried on the development split."""

    method: str = "pasted"
    layers: str
    scale: float
    value: float  # share or mean of what the task's judge finds
    kl: float  # nats per token on benign text
    chosen: bool = False


class Sample(_Strict):
    """A benign prompt with the recipient's answers without and with the pasted adapter."""

    prompt: str
    before: str
    after: str


class Cell(_Strict):
    """One donor, recipient, behaviour and seed.

    Attributes:
        arms: every method that was measured.
        curve: settings tried on the development split.
        fidelity: held-out quality of the converters: method -> rows of `commandv.Fidelity` as mappings.
        samples: before and after; none for tasks that keep no answers.
        settings: all that is needed to run the cell again.
        error: why it failed.
    """

    donor: str
    recipient: str
    behaviour: str
    seed: int
    state: Literal["done", "failed"] = "done"
    error: str = ""
    arms: list[Arm] = []
    curve: list[Point] = []
    fidelity: dict[str, list[dict[str, float]]] = {}
    samples: list[Sample] = []
    settings: dict[str, Any] = {}
    seconds: float = 0.0


class Run(_Strict):
    """A study's results, complete or not.

    Attributes:
        study: the study file's content as validated.
        planned: number of cells that the study has.
        versions: of Python and libraries; `cpu` and `cores` of the machine.
        hashes: of prompt sets and models.
        left_out: controls that were left out by the user's explicit wish.
        plan: file name without suffix -> donor, recipient, behaviour and seed of every cell; empty in version 1.
        ignored: file name -> why a file among the cells is not counted.
        cells: those finished or failed so far.
    """

    version: int = VERSION
    name: str
    question: str = ""
    study: dict[str, Any] = {}
    planned: int
    versions: dict[str, str] = {}
    hashes: dict[str, str] = {}
    left_out: list[str] = []
    plan: dict[str, tuple[str, str, str, int]] = {}
    ignored: dict[str, str] = {}
    cells: list[Cell] = []


def load_head(folder: Path | str) -> Run:
    """Read a run directory's `run.json`, without the cells.

    Raises:
        FormatError: not a run directory, another version, or a damaged file.
    """
    head = Path(folder) / "run.json"
    if not head.is_file():
        raise FormatError(f"{folder}: no run.json. Expected a directory that `commandv study` wrote")
    run = _read(head, Run)
    if not 1 <= run.version <= VERSION:
        raise FormatError(f"{head}: version {run.version}, expected 1 to {VERSION}; use the commandv that wrote it")
    return run


def load_run(folder: Path | str) -> Run:
    """Read a run directory: `run.json` and the cells that it names, in their order.

    Other files among the cells (copies, cells of other settings) are not counted; the run says which and why.

    Raises:
        FormatError: not a run directory, another version, or a damaged file.
    """
    run = load_head(folder)
    found: dict[str, Cell] = {}
    ignored: dict[str, str] = {}
    for file in sorted((Path(folder) / "cells").glob("*.json")):
        if run.plan and file.stem not in run.plan:
            ignored[file.name] = "a cell of other settings, or no cell of this study"
            continue
        cell = _read(file, Cell)
        if reason := _foreign(cell, file.stem, run):
            ignored[file.name] = reason
        else:
            found[file.stem] = cell
    for name, reason in ignored.items():
        log.warning("%s: not counted: %s", Path(folder) / "cells" / name, reason)
    cells = [found[name] for name in run.plan if name in found] if run.plan else list(found.values())
    return run.model_copy(update={"cells": cells, "ignored": ignored})


def load_cell(file: Path) -> Cell:
    """Read one cell.

    Raises:
        FormatError: it is damaged.
    """
    return _read(file, Cell)


def cell_key(donor: str, recipient: str, behaviour: str, seed: int, content: dict[str, Any]) -> str:
    """Return the hash of all that makes a cell what it is; it is the name of its file."""
    return digest([donor, recipient, behaviour, seed], content)


def _foreign(cell: Cell, name: str, run: Run) -> str:
    """Return why a cell does not belong to a run under this name; empty when it does."""
    where = (cell.donor, cell.recipient, cell.behaviour, cell.seed)
    stated = cell.settings.get("content")
    content = {key: value for key, value in cell.settings.items() if key not in ("content", "success")}
    if run.plan:
        key = cell_key(*where, content)
        return "" if run.plan[name] == where and key == name == stated else "its content is not what its name says"
    if name != "-".join(map(str, where)):
        return f"its name is not that of the cell of {', '.join(map(str, where))}"
    if stated is not None and stated != digest(content):
        return "its settings have been changed since it was written"
    return ""


def _read(file: Path, kind: type[M]) -> M:
    try:
        return kind.model_validate_json(read_bytes(file, most=MOST_RESULT))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise FormatError(
            f"{file}: {where}: {first['msg']} ({error.error_count()} problems). "
            "Remove the file; the study makes it again"
        ) from None


def save_head(run: Run, folder: Path) -> None:
    """Write `run.json` without the cells."""
    write_text(folder / "run.json", run.model_dump_json(exclude={"cells", "ignored"}, indent=1))


def save_cell(cell: Cell, file: Path) -> None:
    """Write one cell."""
    write_text(file, cell.model_dump_json(indent=1))
