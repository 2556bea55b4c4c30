"""Running a study, cell by cell: what is finished is kept, what fails is reported, the rest goes on."""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from commandv.errors import CommandVError, FormatError, InputError, MismatchError, WorkerError
from commandv.evaluation.catalogue import NO_TASKS
from commandv.evaluation.results import Cell, Run, cell_key, found, load_head, load_run, save_cell, save_head
from commandv.evaluation.study.cell import CellRun
from commandv.evaluation.study.models import ModelSource
from commandv.evaluation.study.planning import trained
from commandv.evaluation.study.schema import CellSpec, Study
from commandv.evaluation.study.shared import Shared
from commandv.evaluation.tasks import Task as Asked
from commandv.evaluation.versions import VERSIONS
from commandv.executors.executor import Executor, Local, Pool, Task, out_of_memory, versions
from commandv.profiles.profiling import profile_in
from commandv.profiles.work import Work
from commandv.progress import Report, track, unreported
from commandv.prompts.sets import load_prompts
from commandv.steering import load_contrast
from commandv.storage.files import LOCK, is_temporary, locked, require_free, storage_errors, tidy

log = logging.getLogger(__name__)


def run_study(
    study: Study,
    out: Path | str,
    *,
    models: ModelSource | None = None,
    tasks: Mapping[str, Asked] = NO_TASKS,
    executor: Executor = Local(),
) -> Run:
    """Run a study, or go on with one that was cut off; return its results.

    Args:
        study: what to run.
        out: run directory: `run.json` and `cells/`, whose files are named by a hash of all that decides a cell.
            Finished cells of the same content are kept and not run again, whichever executor ran them.
        models: where models come from; by default the study's own.
        tasks: that the study may name besides those of `TASKS`, by name.
        executor: what runs the cells; by default this process. Files are written by this process alone.

    Raises:
        InputError: the directory holds another study, or another process is writing it.
        FormatError: the directory holds something else, or a damaged file.
        StorageError: the disk is full; finished cells are kept.
        WorkerError: workers elsewhere cannot be reached or do not start; finished cells are kept.
        MismatchError: a worker has other versions of the libraries.
    """
    out = Path(out)
    claim(study, out)
    with locked(out, wait=False):
        claim(study, out)
        source = models or ModelSource(study)
        shared = Shared(study, source, tasks)
        most = max(len(study.cells()), shared.wanted().batches)
        with executor.pool(functools.partial(_on_worker, study, source, tasks), here=shared, tasks=most) as pool:
            _identify(pool, shared)
            cells = _keyed(shared)
            run = Run(
                name=study.name,
                question=study.question,
                study=study.model_dump(mode="json"),
                planned=len(cells),
                versions={**versions(), "cores": str(os.cpu_count())},
                hashes=_hashes(study),
                left_out=list(study.leave_out),
                plan={key: (spec.donor, spec.recipient, spec.behaviour, spec.seed) for key, (spec, _) in cells.items()},
            )
            save_head(run, out)
            left = {key: one for key, one in cells.items() if not _finished(one[0], _file(out, key))}
            with track(f"study {study.name}", total=run.planned) as advance:
                advance(run.planned - len(left))
                if pool.width > 1 and left:
                    _prepare(pool, shared, [spec for spec, _ in left.values()])
                _run_cells(pool, study, left, out, advance)
    return load_run(out)


def unfinished(
    study: Study, out: Path | str, *, models: ModelSource | None = None, tasks: Mapping[str, Asked] = NO_TASKS
) -> list[CellSpec]:
    """Return the cells that `run_study` would run: those without a result of the same content; arguments as there."""
    cells = _keyed(Shared(study, models or ModelSource(study), tasks))
    return [spec for key, (spec, _) in cells.items() if not _finished(spec, _file(Path(out), key))]


def _keyed(shared: Shared) -> dict[str, tuple[CellSpec, dict[str, Any]]]:
    """Return every cell of a study and its content by key."""
    contents = [(spec, cell_content(shared, spec)) for spec in shared.study.cells()]
    return {cell_key(*spec, content): (spec, content) for spec, content in contents}


def _file(out: Path, key: str) -> Path:
    return out / "cells" / f"{key}.json"


def _finished(spec: CellSpec, file: Path) -> bool:
    cell = found(file, Cell)
    if cell is None or cell.state != "done":
        return False
    log.info("%s: finished before", spec)
    tidy(file)
    return True


def _identify(pool: Pool, shared: Shared) -> None:
    """Have the workers tell what every model and adapter is, so that this process need not load them."""
    names = list(dict.fromkeys(name for pair in shared.study.pairs for name in pair))
    asking = [Task(name, (name,), frozenset([name])) for name in names]
    for task, told, error in pool.run(_identities, asking, unreported):
        if error is not None:
            told = {behaviour: {"not there": str(error)} for behaviour in shared.study.behaviours}
        shared.identities |= {(task.args[0], behaviour): known for behaviour, known in told.items()}


def _prepare(pool: Pool, shared: Shared, specs: Sequence[CellSpec]) -> None:
    """Make what several cells need, profiles in parts, so that no worker waits for another's.

    What fails here is told by the cells that need it.
    """
    for name in dict.fromkeys(name for spec in specs for name in (spec.donor, spec.recipient)):
        try:
            profile_in(pool, functools.partial(_work_of, name), shared.wanted(), like=frozenset([name]))
        except WorkerError:
            raise
        except CommandVError as error:
            log.warning("profile of %s: %s", name, error)
    to_train = [
        Task(f"training {behaviour} on {name}, seed {seed}", (name, behaviour, seed), frozenset([name]))
        for name, behaviour, seed in sorted(trained(shared.study, specs))
    ]
    for trying in pool.run(_train, to_train, unreported):
        if problem := trying.value or trying.error:
            log.warning("%s: %s", trying.task.key, problem)


def _run_cells(
    pool: Pool, study: Study, left: Mapping[str, tuple[CellSpec, dict[str, Any]]], out: Path, advance: Report
) -> None:
    tasks = []
    for key, (spec, content) in left.items():
        shares = {
            spec.donor,
            spec.recipient,
            f"{spec.behaviour} on {spec.donor}",
            f"{spec.behaviour} on {spec.recipient}",
        }
        args = (spec, {"content": key, **content}, study.batch_size)
        tasks.append(Task(str(spec), args, frozenset(shares)))
    for outcome in pool.run(_run_cell, tasks, unreported, _smaller):
        spec, settings, _ = outcome.task.args
        cell = outcome.value if outcome.error is None else _failed(spec, settings, outcome.error)
        save_cell(cell, _file(out, settings["content"]))
        advance(1)


def _smaller(task: Task) -> Task | None:
    """Return a cell with half the batch."""
    spec, settings, batch_size = task.args
    if batch_size == 1:
        return None
    return task._replace(key=f"{spec} with batches of {batch_size // 2}", args=(spec, settings, batch_size // 2))


def _failed(spec: CellSpec, settings: dict[str, Any], error: Exception) -> Cell:
    log.warning("%s: failed: %s", spec, error)
    return Cell(**spec._asdict(), settings=settings, state="failed", error=f"{type(error).__name__}: {error}")


# -- what workers do ---------------------------------------------------------------------------------------------------


def _on_worker(study: Study, source: ModelSource, tasks: Mapping[str, Asked]) -> Shared:
    source.device_map = "auto" if torch.cuda.is_available() else None
    return Shared(study, source, tasks)


def _identities(shared: Shared, _report: Report, name: str) -> dict[str, dict[str, str]]:
    return {behaviour: shared.identity(name, behaviour) for behaviour in shared.study.behaviours}


def _work_of(name: str, shared: Shared) -> Work:
    return shared.work(name)


def _train(shared: Shared, _report: Report, name: str, behaviour: str, seed: int) -> str:
    try:
        shared.adapter(behaviour, name, seed)
    except (CommandVError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _run_cell(shared: Shared, _report: Report, spec: CellSpec, settings: dict[str, Any], batch_size: int) -> Cell:
    """Run a cell; an error becomes its result, but too little memory, which smaller batches may mend.

    Raises:
        MemoryError: or what else says so.
    """
    log.info("%s: running", spec)
    began = time.monotonic()
    shared.limit_batches(batch_size)
    try:
        for side in ("donor", "recipient"):
            if shared.identity(getattr(spec, side), spec.behaviour) != settings[side]["is"]:
                raise MismatchError(
                    f"the worker on {socket.gethostname()} has another {side} {getattr(spec, side)}, or another "
                    "adapter for it, than the study was planned with; give every node the same files"
                )
        cell = CellRun(shared, spec, {**spec._asdict(), "settings": settings}).run()
    except (CommandVError, RuntimeError, MemoryError, OSError) as error:
        if out_of_memory(error):
            raise
        cell = _failed(spec, settings, error)
    return cell.model_copy(update={"seconds": round(time.monotonic() - began, 1)})


def claim(study: Study, out: Path) -> None:
    """Refuse a directory that holds results of another study, or anything else, or that is being written."""
    with storage_errors(out):
        if out.exists() and not out.is_dir():
            raise FormatError(f"{out}: a file, expected a run directory or nothing; choose another place")
        if (out / "run.json").exists():
            name = load_head(out).name
            if name != study.name:
                raise InputError(f"{out}: holds the study {name!r}, not {study.name!r}; choose another directory")
        elif out.exists():
            foreign = [
                one for one in os.listdir(out) if one not in (LOCK, "cells") and not is_temporary(one, "run.json")
            ]
            if foreign:
                raise FormatError(f"{out}: holds no study but {', '.join(sorted(foreign)[:4])}; choose another place")
    require_free(out)


def _hashes(study: Study) -> dict[str, str]:
    sources = [*study.prompts, study.text, *(one.examples for one in study.behaviours.values())]
    hashes = {source: load_prompts(source).hash for source in sources if source is not None}
    vectors = [one.vector for one in study.behaviours.values() if one.vector]
    return hashes | {f"contrast {one.contrast}": load_contrast(one.contrast, one.negative).hash for one in vectors}


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
