"""Running a study, cell by cell: what is finished is kept, what fails is reported, the rest goes on."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commandv.errors import CommandVError, FormatError, InputError
from commandv.evaluation.catalogue import NO_TASKS
from commandv.evaluation.results import Cell, Run, cell_key, load_cell, load_head, load_run, save_cell, save_head
from commandv.evaluation.study.cell import run_cell
from commandv.evaluation.study.models import ModelSource
from commandv.evaluation.study.schema import CellSpec, Study
from commandv.evaluation.study.shared import Shared
from commandv.evaluation.tasks import Task
from commandv.evaluation.versions import VERSIONS
from commandv.progress import track
from commandv.prompts.sets import load_prompts
from commandv.steering import load_contrast
from commandv.storage.directories import locked
from commandv.storage.files import LOCK, is_temporary, storage_errors, tidy

log = logging.getLogger(__name__)

LIBRARIES = ("commandv", "torch", "transformers", "numpy", "scipy")


def run_study(
    study: Study, out: Path | str, *, models: ModelSource | None = None, tasks: Mapping[str, Task] = NO_TASKS
) -> Run:
    """Run a study, or go on with one that was cut off; return its results.

    Args:
        study: what to run.
        out: run directory: `run.json` and `cells/`, whose files are named by a hash of all that decides a cell.
            Finished cells of the same content are kept and not run again.
        models: where models come from; by default the study's own.
        tasks: that the study may name besides those of `TASKS`, by name.

    Raises:
        InputError: the directory holds another study, or another process is writing it.
        FormatError: the directory holds something else, or a damaged file.
        StorageError: the disk is full; finished cells are kept.
    """
    out = Path(out)
    claim(study, out)
    with locked(out, wait=False):
        claim(study, out)
        shared = Shared(study, models or ModelSource(study), tasks)
        cells = {}
        for spec in study.cells():
            content = cell_content(shared, spec)
            cells[cell_key(*spec, content)] = (spec, content)
        run = Run(
            name=study.name,
            question=study.question,
            study=study.model_dump(mode="json"),
            planned=len(cells),
            versions=_versions(),
            hashes=_hashes(study),
            left_out=list(study.leave_out),
            plan={key: (spec.donor, spec.recipient, spec.behaviour, spec.seed) for key, (spec, _) in cells.items()},
        )
        save_head(run, out)
        with track(f"study {study.name}", total=run.planned) as advance:
            for key, (spec, content) in cells.items():
                _finish(shared, spec, {"content": key, **content}, out / "cells" / f"{key}.json")
                advance(1)
    return load_run(out)


def claim(study: Study, out: Path) -> None:
    """Refuse a directory that holds results of another study, or anything else.

    Raises:
        InputError: it holds another study.
        FormatError: it holds no study but something else, or a damaged `run.json`.
    """
    with storage_errors(out):
        if out.exists() and not out.is_dir():
            raise FormatError(f"{out}: a file, expected a run directory or nothing; choose another place")
        if (out / "run.json").exists():
            found = load_head(out)
            if found.name != study.name:
                raise InputError(f"{out}: holds the study {found.name!r}, not {study.name!r}; choose another directory")
        elif out.exists():
            foreign = [
                one for one in os.listdir(out) if one not in (LOCK, "cells") and not is_temporary(one, "run.json")
            ]
            if foreign:
                raise FormatError(f"{out}: holds no study but {', '.join(sorted(foreign)[:4])}; choose another place")


def _versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **libraries, "cores": str(os.cpu_count())}


def _hashes(study: Study) -> dict[str, str]:
    sources = [*study.prompts, study.text, *(one.examples for one in study.behaviours.values())]
    found = {source: load_prompts(source).hash for source in sources if source is not None}
    vectors = [one.vector for one in study.behaviours.values() if one.vector]
    return found | {f"contrast {one.contrast}": load_contrast(one.contrast, one.negative).hash for one in vectors}


def _finish(shared: Shared, spec: CellSpec, settings: dict[str, Any], file: Path) -> None:
    """Run a cell unless it is finished; an error becomes part of its result."""
    if file.exists():
        try:
            if load_cell(file).state == "done":
                log.info("%s: finished before", spec)
                tidy(file)
                return
        except FormatError as error:
            log.warning("%s", error)
    log.info("%s: running", spec)
    began = time.monotonic()
    identity: dict[str, Any] = {**spec._asdict(), "settings": settings}
    try:
        cell = run_cell(shared, spec, identity)
    except (CommandVError, RuntimeError, MemoryError, OSError) as error:
        log.warning("%s: failed: %s", spec, error)
        cell = Cell(**identity, state="failed", error=f"{type(error).__name__}: {error}")
    save_cell(cell.model_copy(update={"seconds": round(time.monotonic() - began, 1)}), file)


def cell_content(shared: Shared, spec: CellSpec) -> dict[str, Any]:
    """Return all that a cell's result depends on; what is left at its default is not said.

    Defaults of the library are code, and the code is there by its versions.
    """
    study, (donor, recipient, behaviour, seed) = shared.study, spec
    stated = study.model_dump(mode="json", exclude_defaults=True)
    settings = (
        "limit", "places", "methods", "scales", "layers", "rows", "budget", "n_dev", "n_test", "n_drift", "leave_out"
    )  # fmt: skip
    tasks = {
        task.name: {
            "judge": task.judge.name,
            "dev": task.dev.hash,
            "test": task.test.hash,
            "tokens": task.max_new_tokens,
        }
        for task in shared.tasks(behaviour)
    }
    return {
        "versions": VERSIONS,
        "tasks": tasks,
        "passages": shared.passages.hash,
        "donor": stated["models"][donor] | {"is": shared.identity(donor, behaviour)},
        "recipient": stated["models"][recipient] | {"is": shared.identity(recipient, behaviour)},
        "rehearsed": shared.models.rehearsal,
        "behaviour": stated["behaviours"][behaviour],
        "seed": seed,
        **{name: stated[name] for name in settings if name in stated},
        "hashes": _hashes(study),
    }
