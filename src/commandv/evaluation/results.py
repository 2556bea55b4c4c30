"""What a study leaves behind: one file per cell and one that says how it was made. Reports are written from these."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic

from commandv.errors import FormatError
from commandv.evaluation.arms import Cost, Made
from commandv.evaluation.meter import Measured
from commandv.evaluation.outcomes import Outcome
from commandv.evaluation.tuning import Setting, Tried
from commandv.evaluation.versions import VERSIONS
from commandv.storage.files import digest, write_text
from commandv.storage.reading import read_json

VERSION = 3  # 1 named the files of cells by their models, behaviour and seed; 2 had a number per label, and one price
SIGNIFICANT = 5  # digits of per-prompt figures
CHECKSUM = "checksum"  # its key in a file; of all else in it
MOST_RESULT = 1 << 28  # bytes of one cell's file
log = logging.getLogger(__name__)
M = TypeVar("M", bound=pydantic.BaseModel)


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


def _spelled(labels: Any) -> Any:
    """Read labels: "01-" stands for 0, 1 and no judgment."""
    if not isinstance(labels, str):
        return labels
    if wrong := set(labels) - set("01-"):
        raise ValueError(f"labels with {sorted(wrong)[0]!r}; expected 0, 1 and - for no judgment")
    return [None if one == "-" else int(one) for one in labels]


def _spell(labels: list[float | None]) -> Any:
    """Write labels: one character each where they are 0, 1 and no judgment."""
    if all(one is None or one in (0, 1) for one in labels):
        return "".join("-" if one is None else str(int(one)) for one in labels)
    return [None if one is None else _short(one) for one in labels]


def _short(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT}g}") if math.isfinite(value) else value


Labels = Annotated[list[float | None], pydantic.BeforeValidator(_spelled), pydantic.PlainSerializer(_spell)]
Figures = Annotated[list[float], pydantic.PlainSerializer(lambda values: [_short(one) for one in values])]


class Arm(_Strict):
    """One row of a table: an arm at one setting, prompt by prompt, with effect and price together."""

    method: str  # a name in `arms.ARMS`, a method of the study, or `"donor"`: the donor with its own adapter
    setting: Setting = Setting()  # that was chosen for it; that of the paste where it mirrors it
    layers: list[int] = []  # recipient layers that it acts on
    labels: dict[str, Labels] = {}  # task -> one label per test prompt, None where the judge had no judgment
    units: dict[str, str] = {}  # task -> unit of its labels, `"rate"` for 0 and 1
    loops: dict[str, Labels] = {}  # task -> 1 for each answer that loops
    words: dict[str, list[int]] = {}  # task -> number of words of each answer
    price: dict[str, Figures] = {}  # measure (see `prices`) -> figure of each passage
    cost: Cost = Cost()  # of making it, and per request
    seconds: float = 0.0  # wall clock of measuring it

    @pydantic.model_validator(mode="after")
    def _whole(self) -> Arm:
        for task, labels in self.labels.items():
            for what in (self.loops, self.words):
                if task in what and len(what[task]) != len(labels):
                    raise ValueError(f"{self.method}, task {task}: {len(labels)} labels and {len(what[task])} others")
        return self

    @property
    def scale(self) -> float:
        """Factor on its deltas."""
        return self.setting.scale


def recorded(method: str, found: Measured, made: Made, setting: Setting = Setting()) -> Arm:
    """Return what is kept of an arm that was measured."""
    return Arm(
        method=method,
        setting=setting,
        layers=made.adapter.layers if made.adapter else [],
        price=found.price,
        cost=made.cost,
        seconds=found.seconds,
        **graded(found.outcomes),
    )


def graded(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Return those fields of an arm that its answers decide."""
    return {
        "labels": {
            task: [None if math.isnan(label) else label for label in one.labels] for task, one in outcomes.items()
        },
        "units": {task: one.unit for task, one in outcomes.items()},
        "loops": {task: [float(label) for label in one.loops] for task, one in outcomes.items()},
        "words": {task: list(one.words) for task, one in outcomes.items()},
    }


class Attempt(_Strict):
    """A setting on the development split, prompt by prompt."""

    tried: Tried  # what was tried, and its figures
    labels: Labels  # one per development prompt
    answers: list[str] = []  # none for tasks that keep no answers


class Sample(_Strict):
    """A benign prompt with the recipient's answers without and with the pasted adapter."""

    prompt: str
    before: str
    after: str


class Cell(_Strict):
    """One donor, recipient, behaviour and seed."""

    donor: str
    recipient: str
    behaviour: str
    seed: int
    state: Literal["done", "failed"] = "done"
    error: str = ""  # why it failed
    arms: list[Arm] = []  # every method that was measured
    curve: dict[str, list[Tried]] = {}  # arm -> settings tried on the development split; the chosen one is the arm's
    missing: dict[str, str] = {}  # arm -> why it could not be made; the others stand
    # held-out quality of the converters: method -> rows of `commandv.Fidelity` as mappings
    fidelity: dict[str, list[dict[str, float]]] = {}
    samples: list[Sample] = []  # before and after; none for tasks that keep no answers
    # all that decides what the cell finds: what is run, on what, and the versions of the code
    settings: dict[str, Any] = {}
    seconds: float = 0.0

    @pydantic.field_validator("settings")
    @classmethod
    def _stated(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name, kind in (("success", str), ("versions", int)):
            found = settings.get(name, {})
            if not isinstance(found, dict) or not all(isinstance(one, kind) for one in found.values()):
                raise ValueError(f"{name}: expected names, each with a {kind.__name__}, got {str(found)[:60]}")
        return settings

    @pydantic.model_validator(mode="after")
    def _one_of_each(self) -> Cell:
        methods = [arm.method for arm in self.arms]
        if twice := sorted({one for one in methods if methods.count(one) > 1}):
            raise ValueError(f"arms {twice} are there more than once")
        for task in {task for arm in self.arms for task in arm.labels}:
            counts = {arm.method: len(arm.labels[task]) for arm in self.arms if task in arm.labels}
            if len(set(counts.values())) > 1:
                raise ValueError(f"task {task}: arms have different numbers of labels: {counts}")
        return self


class Run(_Strict):
    """A study's results, complete or not."""

    version: int = VERSION
    name: str
    question: str = ""
    study: dict[str, Any] = {}  # the study file's content as validated
    planned: int  # number of cells that the study has
    versions: dict[str, str] = {}  # of Python and libraries; `cpu` and `cores` of the machine
    hashes: dict[str, str] = {}  # of prompt sets and models
    left_out: list[str] = []  # controls that were left out by the user's explicit wish
    # file name without suffix -> donor, recipient, behaviour and seed of every cell; empty in version 1
    plan: dict[str, tuple[str, str, str, int]] = {}
    ignored: dict[str, str] = {}  # file name -> why a file among the cells is not counted
    cells: list[Cell] = []  # those finished or failed so far


def load_head(folder: Path | str) -> Run:
    """Read a run directory's `run.json`, without the cells.

    Raises:
        FormatError: not a run directory, another version, or a damaged file.
    """
    head = Path(folder) / "run.json"
    if not os.path.isfile(head):
        raise FormatError(f"{folder}: no run.json. Expected a directory that `commandv study` wrote")
    run = read_result(head, Run)
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
        cell = read_result(file, Cell)
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
    return read_result(file, Cell)


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
        if run.plan[name] != where or not key == name == stated:
            return "its content is not what its name says"
        newer = {part: n for part, n in content.get("versions", {}).items() if n > VERSIONS.get(part, 0)}
        return f"made by code that this version does not know ({newer}); take a newer commandv" if newer else ""
    if name != "-".join(map(str, where)):
        return f"its name is not that of the cell of {', '.join(map(str, where))}"
    if stated is not None and stated != digest(content):
        return "its settings have been changed since it was written"
    return ""


def read_result(file: Path, kind: type[M]) -> M:
    """Read what `write_result` has written.

    Raises:
        FormatError: it is damaged, or was changed since; files of earlier versions state no checksum.
    """
    try:
        content = read_json(file, most=MOST_RESULT)
    except FormatError as error:
        raise FormatError(f"{error}. Remove the file; it is made again") from error
    stated = content.pop(CHECKSUM, None) if isinstance(content, dict) else None
    if stated is not None and stated != digest(content):
        raise FormatError(
            f"{file}: its content was changed since it was written, which its checksum tells; put back the file as it "
            "was, or remove it and run the same again: it is made again"
        )
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise FormatError(
            f"{file}: {where}: {first['msg']} ({error.error_count()} problems). Remove the file; it is made again"
        ) from None


def found(file: Path, kind: type[M]) -> M | None:
    """Return what a file of results holds; None where there is none, or a damaged one, which is said."""
    try:
        return read_result(file, kind) if os.path.exists(file) else None
    except FormatError as error:
        log.warning("%s", error)
        return None


def result(file: Path, kind: type[M], make: Callable[[], M]) -> M:
    """Return what a file of results holds; where there is none, or a damaged one, make and write it."""
    kept = found(file, kind)
    if kept is None:
        kept = make()
        write_result(kept, file)
    return kept


def save_head(run: Run, folder: Path) -> None:
    """Write `run.json` without the cells."""
    write_result(run, folder / "run.json", leave_out={"cells", "ignored"})


def save_cell(cell: Cell, file: Path) -> None:
    """Write one cell."""
    write_result(cell, file)


def write_result(found: pydantic.BaseModel, file: Path, *, leave_out: set[str] | None = None) -> None:
    """Write results with a checksum over their content.

    A line per key, and lists of plain values on one line, so that changes can be read.
    """
    content = json.loads(found.model_dump_json(exclude=leave_out))
    indented = json.dumps({**content, CHECKSUM: digest(content)}, indent=1, ensure_ascii=False)
    plain = re.sub(r"\[\s*((?:[^\[\]{}\"]|\"(?:[^\"\\]|\\.)*\")*?)\s*\]", _joined, indented)
    write_text(file, plain + "\n")


def _joined(found: re.Match[str]) -> str:
    return "[" + re.sub(r",\n\s*", ", ", found[1]) + "]"
