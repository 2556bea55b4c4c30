"""What a study leaves behind: one file per cell and one that says how it was made. Reports are written from these."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

from commandv.errors import FormatError
from commandv.files import write_text

VERSION = 1
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
    cells: list[Cell] = []


def load_run(folder: Path | str) -> Run:
    """Read a run directory: `run.json` and `cells/*.json`.

    Raises:
        FormatError: not a run directory, another version, or a damaged file.
    """
    folder = Path(folder)
    head = folder / "run.json"
    if not head.is_file():
        raise FormatError(f"{folder}: no run.json. Expected a directory that `commandv study` wrote")
    run = _read(head, Run)
    if run.version != VERSION:
        raise FormatError(f"{head}: version {run.version}, expected {VERSION}; use the commandv that wrote it")
    cells = [_read(file, Cell) for file in sorted((folder / "cells").glob("*.json"))]
    return run.model_copy(update={"cells": cells})


def _read(file: Path, kind: type[M]) -> M:
    try:
        return kind.model_validate_json(file.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise FormatError(
            f"{file}: {where}: {first['msg']} ({error.error_count()} problems). "
            "Remove the file; the study makes it again"
        ) from None


def save_head(run: Run, folder: Path) -> None:
    """Write `run.json` without the cells."""
    write_text(folder / "run.json", run.model_dump_json(exclude={"cells"}, indent=1))


def save_cell(cell: Cell, file: Path) -> None:
    """Write one cell."""
    write_text(file, cell.model_dump_json(indent=1))
