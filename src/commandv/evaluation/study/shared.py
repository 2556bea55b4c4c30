"""What the cells of one study share: models, profiles, adapters, directions, arms that no pair changes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.store import ADAPTER, save
from commandv.directories import CONFIG, kept
from commandv.evaluation.calibration import Calibration, calibrate
from commandv.evaluation.catalogue import NO_TASKS, load_task
from commandv.evaluation.price import divergences, reply_log_probs, reply_nats
from commandv.evaluation.results import Arm, Point
from commandv.evaluation.study.models import ModelSource
from commandv.evaluation.study.parts import Behaviour
from commandv.evaluation.study.schema import Study
from commandv.evaluation.tasks import Task, answered, judged
from commandv.files import cache_dir, digest, file_name, remove
from commandv.interop.load import load_adapter
from commandv.models.identity import identity
from commandv.models.layers import choose_layers
from commandv.profiles.profile import Profile
from commandv.profiles.profiling import profile
from commandv.prompts.sets import load_prompts
from commandv.steering import directions, from_directions, load_contrast
from commandv.training.train import TRAINABLE, TrainSettings, train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Native:
    """A model's own direction for a behaviour, at the strength chosen for it, and what it does there.

    Attributes:
        adapter: the direction on the layers chosen.
        arm: its labels and price on the test split.
        curve: settings tried on the development split.
    """

    adapter: Adapter
    arm: Arm
    curve: list[Point]


class Shared:
    """Made when first asked for, then kept; by model name, what depends on a seed by seed."""

    def __init__(self, study: Study, models: ModelSource, tasks: Mapping[str, Task] = NO_TASKS) -> None:
        self.study, self.models, self.known = study, models, tasks
        self.passages = load_prompts("builtin:drift", limit=study.n_drift)
        self.reference = functools.lru_cache(maxsize=2)(self._reference)
        self.profiled = functools.cache(self._profiled)
        self.directions = functools.cache(self._directions)
        self.native = functools.cache(self._native)
        self.unmodified = functools.cache(self._unmodified)

    def tasks(self, behaviour: str) -> list[Task]:
        """Return a behaviour's own task and those measured beside it."""
        spec = self.study.behaviours[behaviour]
        return [load_task(name, self.known) for name in (spec.task, *spec.also)]

    def adapter(self, behaviour: str, name: str, seed: int) -> Adapter | None:
        """Return a ready adapter, or train one; None when there is neither."""
        spec = self.study.behaviours[behaviour]
        if name in spec.adapters:
            return load_adapter(spec.adapters[name])
        return None if spec.examples is None else self._trained(spec, behaviour, name, seed)

    def measured(
        self, method: str, name: str, behaviour: str, adapter: Adapter | None = None, scale: float = 1.0
    ) -> Arm:
        """Measure a model, with an adapter or without, on the behaviour's tasks."""
        began, lm, study = time.monotonic(), self.models[name], self.study
        labels: dict[str, list[float | None]] = {}
        units = {}
        loops: list[float] = []  # of answers to the behaviour's own task, which comes first
        answers: dict[tuple[str, int], list[str]] = {}  # tasks that ask the same are asked once
        for task in self.tasks(behaviour):
            key = (task.test.hash, task.max_new_tokens)
            if key not in answers:
                answers[key] = answered(lm, task, adapter, scale=scale, limit=study.n_test, batch_size=study.batch_size)
            outcome = judged(task, answers[key])
            loops = loops or [float(one) for one in outcome.loops]
            labels[task.name] = [None if np.isnan(label) else label for label in outcome.labels]
            units[task.name] = outcome.unit
        plain = changed = self.reference(name)
        price: dict[str, list[float]] = {"loops": loops}
        if adapter is not None:
            changed = reply_log_probs(lm, self.passages, adapter, scale=scale)
            price["kl"] = divergences(plain, changed)
        price["perplexity"] = reply_nats(lm, self.passages, changed)
        return Arm(
            method=method,
            scale=scale,
            layers=adapter.layers if adapter else [],
            labels=labels,
            units=units,
            price=price,
            seconds=round(time.monotonic() - began, 1),
        )

    def calibrated(self, name: str, behaviour: str, make: Callable[[str], Adapter]) -> Calibration:
        """Choose the strength and the layers of an arm on the development split."""
        study = self.study
        return calibrate(
            self.models[name],
            self.tasks(behaviour)[0],
            make,
            layers=study.layers,
            scales=study.scales,
            budget=study.budget,
            passages=self.passages,
            reference=self.reference(name),
            limit=study.n_dev,
            batch_size=study.batch_size,
        )

    def _unmodified(self, behaviour: str, name: str) -> Arm:
        return self.measured("unmodified", name, behaviour)

    def _profiled(self, name: str) -> Profile:
        """Return a model's profile; from the cache directory when it was made before."""
        study = self.study
        text = load_prompts(study.text) if study.text else None
        return profile(self.models[name], study.profile_prompts(), text=text, places=study.places)

    def _directions(self, behaviour: str, name: str, seed: int) -> Tensor:
        """Return a model's own directions, float64 [n_layers, d_model]."""
        how = self.study.behaviours[behaviour].vector
        assert how is not None
        contrast = load_contrast(how.contrast, how.negative)
        if how.pairs is not None:
            contrast = contrast.drawn(how.pairs, seed)
        return directions(self.models[name], contrast, how.method, how.positions, trigger=how.trigger)

    def _native(self, behaviour: str, name: str, seed: int) -> Native:
        how = self.study.behaviours[behaviour].vector
        assert how is not None
        lm, found = self.models[name], self.directions(behaviour, name, seed)

        def make(layers: str) -> Adapter:
            chosen = choose_layers(layers, lm.n_layers)
            return from_directions(
                {layer: found[layer] for layer in chosen}, lm.ref, kind=how.kind, strength=how.strength, at=how.at,
                typical=self.profiled(name), name=behaviour,
            )  # fmt: skip

        tried = self.calibrated(name, behaviour, make)
        adapter = make(tried.chosen.layers)
        arm = self.measured("direct", name, behaviour, adapter, tried.chosen.scale)
        return Native(adapter, arm, points("direct", tried))

    def _trained(self, spec: Behaviour, behaviour: str, name: str, seed: int) -> Adapter:
        lm, examples, how = self.models[name], load_prompts(spec.examples or ""), spec.training
        rate = how.rates.get(name, how.learning_rate)
        kind = TRAINABLE[how.kind](rank=how.rank, layers=how.layers, positions=how.positions)
        settings = TrainSettings(
            epochs=how.epochs, learning_rate=rate, max_response=how.max_response, batch_size=how.batch_size, seed=seed
        )
        stamp = digest(identity(lm).key, examples.hash, how.model_dump(), rate, seed)
        path = cache_dir() / "adapters" / f"{file_name(behaviour)}-{stamp}"
        checkpoint = path.with_suffix(".checkpoint")

        def make() -> Adapter:
            log.info("training %s on %s, seed %d", behaviour, name, seed)
            save(train(lm, examples, kind, settings, name=behaviour, checkpoint=checkpoint), path)
            remove(checkpoint)
            return load_adapter(path)

        return kept(path, CONFIG, lambda: load_adapter(path), make, kind=ADAPTER)

    def _reference(self, name: str) -> list[Tensor]:
        return reply_log_probs(self.models[name], self.passages)


def points(method: str, found: Calibration) -> list[Point]:
    """Return a calibration's curve as it is stored."""
    return [Point(**one._asdict(), method=method, chosen=one == found.chosen) for one in found.tried]
