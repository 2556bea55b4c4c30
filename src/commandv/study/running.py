"""Running a study, cell by cell: what is finished is kept, what fails is reported, the rest goes on."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from torch import Tensor

from commandv.adapter import Adapter
from commandv.attaching import attach
from commandv.convert import FITTERS, FactorStore
from commandv.errors import CommandVError, InputError
from commandv.evaluate.calibration import Calibration, calibrate
from commandv.evaluate.catalogue import load_task
from commandv.evaluate.controls import ARMS, PASTED, Material, arms_without
from commandv.evaluate.price import drift_values, reply_log_probs
from commandv.evaluate.tasks import Task, measure
from commandv.generation import generate
from commandv.load import load_adapter
from commandv.match import MATCHERS
from commandv.models import LM
from commandv.pasting import fidelity, paste
from commandv.paths import cache_dir, digest
from commandv.profiles import Profile, profile
from commandv.progress import track
from commandv.prompts import load_prompts
from commandv.results import Arm, Cell, Point, Run, Sample, load_run, save_cell, save_head
from commandv.store import save
from commandv.study.models import ModelSource
from commandv.study.schema import Behaviour, CellSpec, Method, Study
from commandv.training import TRAINABLE, TrainSettings, train

log = logging.getLogger(__name__)

LIBRARIES = ("commandv", "torch", "transformers", "numpy", "scipy")
CALIBRATED = (PASTED, "pinv", "text-bridge")  # arms whose strength is chosen; the others mirror the pasted one
N_SAMPLES, SAMPLE_TOKENS = 3, 40


def run_study(study: Study, out: Path | str, *, models: ModelSource | None = None) -> Run:
    """Run a study, or go on with one that was cut off; return its results.

    Args:
        study: what to run.
        out: run directory: `run.json` and `cells/`. Finished cells of the same content are kept and not run again.
        models: where models come from; by default the study's own.

    Raises:
        InputError: the directory holds another study, or another process is writing it.
        StorageError: the disk is full; finished cells are kept.
    """
    out = Path(out)
    with _alone(out):
        _claim(study, out)
        source = models or ModelSource(study)
        run = Run(
            name=study.name,
            question=study.question,
            study=study.model_dump(mode="json"),
            planned=len(study.cells()),
            versions=_versions(),
            hashes=_hashes(study),
            left_out=list(study.leave_out),
        )
        save_head(run, out)
        worker = _Worker(study, source)
        with track(f"study {study.name}", total=run.planned) as advance:
            for spec in study.cells():
                worker.finish(spec, out / "cells" / f"{spec}.json")
                advance(1)
    return load_run(out)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(
            f"{out}: another process is writing this run; wait for it, or choose another directory"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _claim(study: Study, out: Path) -> None:
    """Refuse a directory that holds results of another study."""
    if (out / "run.json").exists():
        found = load_run(out)
        if found.name != study.name:
            raise InputError(f"{out}: holds the study {found.name!r}, not {study.name!r}; choose another directory")


def _versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **libraries, "cores": str(os.cpu_count())}


def _hashes(study: Study) -> dict[str, str]:
    sources = [study.prompts, study.text, *(one.examples for one in study.behaviours.values())]
    return {source: load_prompts(source).hash for source in sources if source is not None}


class _Worker:
    """What cells of one study share: models, profiles, adapters, references."""

    def __init__(self, study: Study, models: ModelSource) -> None:
        self.study, self.models = study, models
        self.passages = load_prompts("builtin:drift")
        self.profiles: dict[str, Profile] = {}
        self.reference = functools.lru_cache(maxsize=2)(self._reference)

    def finish(self, spec: CellSpec, file: Path) -> None:
        """Run a cell unless it is finished; an error becomes part of its result."""
        content = digest(self._content(spec))
        if file.exists():
            found = Cell.model_validate_json(file.read_bytes())
            if found.state == "done" and found.settings.get("content") == content:
                log.info("%s: finished before", spec)
                return
        log.info("%s: running", spec)
        began = time.monotonic()
        identity: dict[str, Any] = {**spec._asdict(), "settings": {"content": content, **self._content(spec)}}
        try:
            cell = _CellRun(self, spec).run(identity)
        except (CommandVError, RuntimeError, MemoryError, OSError) as error:
            log.warning("%s: failed: %s", spec, error)
            cell = Cell(**identity, state="failed", error=f"{type(error).__name__}: {error}")
        save_cell(cell.model_copy(update={"seconds": round(time.monotonic() - began, 1)}), file)

    def _content(self, spec: CellSpec) -> dict[str, Any]:
        """Return all that a cell's result depends on, but for the code."""
        study = self.study
        return {
            "donor": study.models[spec.donor].model_dump(mode="json"),
            "recipient": study.models[spec.recipient].model_dump(mode="json"),
            "rehearsed": self.models.rehearsal,
            "behaviour": study.behaviours[spec.behaviour].model_dump(mode="json"),
            "seed": spec.seed,
            **study.model_dump(
                mode="json",
                include={"limit", "methods", "scales", "layers", "budget", "n_dev", "n_test", "leave_out"},
            ),
            "hashes": _hashes(study),
        }

    def profiled(self, name: str) -> Profile:
        """Return a model's profile; from the cache directory when it was made before."""
        if name not in self.profiles:
            study = self.study
            text = load_prompts(study.text) if study.text else None
            made = profile(self.models[name], load_prompts(study.prompts, limit=study.limit), text=text)
            self.profiles[name] = made
        return self.profiles[name]

    def adapter(self, behaviour: str, name: str, seed: int) -> Adapter | None:
        """Return a ready adapter, or train one; None when there is neither."""
        spec = self.study.behaviours[behaviour]
        if name in spec.adapters:
            return load_adapter(spec.adapters[name])
        return None if spec.examples is None else self._trained(spec, behaviour, name, seed)

    def _trained(self, spec: Behaviour, behaviour: str, name: str, seed: int) -> Adapter:
        lm, examples, how = self.models[name], load_prompts(spec.examples or ""), spec.training
        rate = how.rates.get(name, how.learning_rate)
        kind = TRAINABLE[how.kind](rank=how.rank, layers=how.layers, positions=how.positions)
        settings = TrainSettings(
            epochs=how.epochs, learning_rate=rate, max_response=how.max_response, batch_size=how.batch_size, seed=seed
        )
        stamp = digest(lm.ref.revision, lm.ref.id, lm.ref.template, examples.hash, how.model_dump(), rate, seed)
        path = cache_dir() / "adapters" / f"{behaviour}-{stamp}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):
            if not path.exists():
                log.info("training %s on %s, seed %d", behaviour, name, seed)
                made = train(lm, examples, kind, settings, name=behaviour, checkpoint=path.with_suffix(".checkpoint"))
                save(made, path)
                path.with_suffix(".checkpoint").unlink(missing_ok=True)
            return load_adapter(path)

    def _reference(self, name: str) -> list[Tensor]:
        return reply_log_probs(self.models[name], self.passages)


class _CellRun:
    """One cell: calibrate, make every arm, measure them all on the test split."""

    def __init__(self, worker: _Worker, spec: CellSpec) -> None:
        self.worker, self.spec, self.study = worker, spec, worker.study
        self.behaviour = self.study.behaviours[spec.behaviour]
        self.task = load_task(self.behaviour.task)
        self.also = [load_task(name) for name in self.behaviour.also]
        self.recipient = worker.models[spec.recipient]
        adapter = worker.adapter(spec.behaviour, spec.donor, spec.seed)
        if adapter is None:
            raise InputError(f"behaviour {spec.behaviour}: no adapter for the donor {spec.donor}")
        self.material = Material(
            adapter,
            worker.profiled(spec.donor),
            worker.profiled(spec.recipient),
            worker.models[spec.donor],
            self.recipient,
            load_prompts(self.study.prompts, limit=self.study.limit),
            None if "direct" in self.study.leave_out else worker.adapter(spec.behaviour, spec.recipient, spec.seed),
            layers=self.study.layers[0],
            seed=spec.seed,
            store=FactorStore(),
        )

    def run(self, identity: dict[str, Any]) -> Cell:
        """Return the cell's result."""
        chosen, curve = self._calibrated()
        settings = chosen[PASTED].chosen
        self.material = replace(self.material, layers=settings.layers)
        arms = [self._measured("unmodified", self.recipient, None, 1.0)]
        made: dict[str, Adapter] = {}
        for name, make in arms_without(self.study.leave_out).items():
            pick = chosen[name].chosen if name in chosen else settings
            material = replace(self.material, layers=pick.layers, published_layers=pick.layers)
            made[name] = make(material)
            scale = 1.0 if name in ("mean-ablation", "direct") else pick.scale
            arms.append(self._measured(name, self.recipient, made[name], scale))
        for name, method in self.study.methods.items():
            made[name] = self._paste(method, settings.layers)
            arms.append(self._measured(name, self.recipient, made[name], settings.scale))
        donor = self.worker.models[self.spec.donor]
        arms.append(self._measured("donor", donor, self.material.adapter, 1.0, model=self.spec.donor))
        fits = {name: one for name, one in made.items() if name == PASTED or name in self.study.methods}
        identity["settings"]["success"] = {task.name: task.success for task in (self.task, *self.also)}
        return Cell(
            **identity,
            arms=arms,
            curve=curve,
            fidelity={name: self._fidelity(one) for name, one in fits.items()},
            samples=self._samples(made[PASTED], settings.scale),
        )

    def _calibrated(self) -> tuple[dict[str, Calibration], list[Point]]:
        """Choose the strength of the arms that have one, each with the same choice."""
        found, points = {}, []
        for name in CALIBRATED:
            if name in self.study.leave_out:
                continue

            def make(layers: str, name: str = name) -> Adapter:
                return ARMS[name](replace(self.material, layers=layers, published_layers=layers))

            found[name] = calibrate(
                self.recipient,
                self.task,
                make,
                layers=self.study.layers,
                scales=self.study.scales,
                budget=self.study.budget,
                passages=self.worker.passages,
                reference=self.worker.reference(self.spec.recipient),
                limit=self.study.n_dev,
                batch_size=self.study.batch_size,
            )
            best = found[name].chosen
            points += [Point(**one._asdict(), method=name, chosen=one == best) for one in found[name].tried]
        return found, points

    def _measured(self, method: str, lm: LM, adapter: Adapter | None, scale: float, model: str = "") -> Arm:
        began = time.monotonic()
        labels: dict[str, list[float | None]] = {}
        units = {}
        for task in (self.task, *self.also):
            outcome = self._outcome(lm, task, adapter, scale)
            labels[task.name] = [None if np.isnan(label) else label for label in outcome.labels]
            units[task.name] = outcome.unit
        price: dict[str, list[float]] = {}
        if adapter is not None:
            reference = self.worker.reference(model or self.spec.recipient)
            price["kl"] = drift_values(lm, self.worker.passages, adapter, scale=scale, reference=reference)
        return Arm(
            method=method,
            scale=scale,
            layers=adapter.layers if adapter else [],
            labels=labels,
            units=units,
            price=price,
            seconds=round(time.monotonic() - began, 1),
        )

    def _outcome(self, lm: LM, task: Task, adapter: Adapter | None, scale: float) -> Any:
        return measure(lm, task, adapter, scale=scale, limit=self.study.n_test, batch_size=self.study.batch_size)

    def _paste(self, method: Method, layers: str) -> Adapter:
        donor, recipient = self.material.donor, self.material.recipient
        if method.prompts is not None:
            donor, recipient = donor.first(method.prompts), recipient.first(method.prompts)
        return paste(
            self.material.adapter,
            donor,
            recipient,
            fit=FITTERS[method.fit](),
            match=MATCHERS[method.match],
            layers=method.layers or layers,
            read_rows=method.read_rows,
            write_rows=method.write_rows,
        )

    def _fidelity(self, pasted: Adapter) -> list[dict[str, float]]:
        """Tell the converters' quality; none for a method on part of the prompts, whose held-out ones are others."""
        if pasted.provenance["prompts"] != self.material.donor.prompts:
            return []
        return [row._asdict() for row in fidelity(pasted, self.material.donor, self.material.recipient)]

    def _samples(self, adapter: Adapter, scale: float) -> list[Sample]:
        if not self.task.keep_answers:
            return []
        prompts = self.task.test.texts[:N_SAMPLES]
        before = generate(self.recipient, prompts, max_new_tokens=SAMPLE_TOKENS)
        with attach(self.recipient, adapter, scale=scale):
            after = generate(self.recipient, prompts, max_new_tokens=SAMPLE_TOKENS)
        return [Sample(prompt=a, before=b, after=c) for a, b, c in zip(prompts, before, after, strict=True)]
