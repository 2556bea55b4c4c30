"""What the cells of one study share: models, profiles, adapters, directions, arms that no pair changes."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.store import save
from commandv.errors import CommandVError
from commandv.evaluation.arms import DIRECT, UNMODIFIED, Cost, Made
from commandv.evaluation.catalogue import NO_TASKS, load_task
from commandv.evaluation.meter import Measured, Meter
from commandv.evaluation.results import Arm, recorded
from commandv.evaluation.study.kept import measured_once
from commandv.evaluation.study.models import ModelSource
from commandv.evaluation.study.parts import Behaviour
from commandv.evaluation.study.schema import Study
from commandv.evaluation.tasks import Task
from commandv.evaluation.tuning import Setting, Tried, Tuned
from commandv.evaluation.versions import VERSIONS
from commandv.interop.load import load_adapter
from commandv.models.layers import choose_layers
from commandv.models.state import identity
from commandv.profiles.profile import Profile
from commandv.profiles.profiling import profile
from commandv.profiles.work import Wanted, Work
from commandv.prompts.sets import load_prompts
from commandv.steering import directions, from_directions, load_contrast
from commandv.storage.directories import CONFIG, kept
from commandv.storage.files import cache_dir, digest, file_name, remove
from commandv.storage.kinds import ADAPTER
from commandv.training.train import TRAINABLE, TrainSettings, train

log = logging.getLogger(__name__)


def fingerprint(adapter: Adapter) -> str:
    """Return a hash of all that an adapter does."""
    parts = [
        (
            layer,
            str(one.positions),
            one.activation,
            [hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for t in many],
        )
        for layer in adapter.layers
        for one in adapter.interventions[layer]
        if (many := [tensor.float() for tensor in _tensors(one)])
    ]
    return digest(parts)


def _tensors(one: Any) -> Iterator[Tensor]:
    """Yield the tensors of an object and of the objects in it."""
    for value in vars(one).values():
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dict__"):
            yield from _tensors(value)


@dataclass(frozen=True)
class Native:
    """A model's own direction for a behaviour, at the strength chosen for it, and what it does there."""

    adapter: Adapter  # the direction on the layers chosen
    arm: Arm  # its labels and price on the test split
    curve: list[Tried]  # settings tried on the development split


class Shared:
    """Made when first asked for, then kept; by model name, what depends on a seed by seed."""

    def __init__(self, study: Study, models: ModelSource, tasks: Mapping[str, Task] = NO_TASKS) -> None:
        self.study, self.models, self.known = study, models, tasks
        self.identities: dict[tuple[str, str], dict[str, str]] = {}  # of models and behaviours, as workers told them
        self.batch_size = study.batch_size
        self.passages = load_prompts("builtin:drift", limit=study.n_drift)
        self.meter = functools.lru_cache(maxsize=2)(self._meter)
        self.work = functools.cache(lambda name: Work(models[name], self.wanted()))
        self.profiled = functools.cache(self._profiled)
        self.directions = functools.cache(self._directions)
        self.native = functools.cache(self._native)
        self.unmodified = functools.cache(self._unmodified)

    def tasks(self, behaviour: str) -> list[Task]:
        """Return a behaviour's own task and those measured beside it."""
        spec = self.study.behaviours[behaviour]
        return [load_task(name, self.known) for name in (spec.task, *spec.also)]

    def identity(self, name: str, behaviour: str) -> dict[str, str]:
        """Return what a model, and a ready adapter for it, are: names and places alone do not tell.

        Where one cannot be loaded the reason stands for it; its cells fail and are tried again.
        """
        if (name, behaviour) in self.identities:
            return self.identities[name, behaviour]
        spec = self.study.behaviours[behaviour]
        try:
            known = {key: str(value) for key, value in asdict(self.models[name].ref).items() if value and key != "id"}
            if name in spec.adapters:
                known["adapter"] = fingerprint(load_adapter(spec.adapters[name]))
        except CommandVError as error:
            return {"not there": str(error)}
        return known

    def limit_batches(self, size: int) -> None:
        """Measure in batches of this size from now on."""
        if size != self.batch_size:
            self.batch_size = size
            self.meter.cache_clear()

    def adapter(self, behaviour: str, name: str, seed: int) -> Adapter | None:
        """Return a ready adapter, or train one; None when there is neither."""
        spec = self.study.behaviours[behaviour]
        if name in spec.adapters:
            return load_adapter(spec.adapters[name])
        return None if spec.examples is None else self._trained(spec, behaviour, name, seed)

    def measured(
        self,
        method: str,
        name: str,
        behaviour: str,
        make: Callable[[], Made],
        setting: Setting = Setting(),
        key: str = "",
    ) -> Arm:
        """Measure a model as an arm has it, on the behaviour's tasks; with a key, see `measured_once`."""

        def measure(tasks: Sequence[Task]) -> tuple[Arm, Measured]:
            made = make()
            found = self.meter(name, behaviour).on(tasks).measured(made, setting.scale)
            return recorded(method, found, made, setting), found

        tasks = self.tasks(behaviour)
        return measured_once(key, tasks, measure) if key else measure(tasks)[0]

    def tuned(self, name: str, behaviour: str, make: Callable[[Setting], Adapter]) -> Tuned:
        """Choose the strength and the layers of an arm on the development split."""
        study = self.study
        return self.meter(name, behaviour).tuned(make, study.settings(), budget=study.budget, limit=study.n_dev)

    def _meter(self, name: str, behaviour: str) -> Meter:
        study = self.study
        return Meter(
            self.models[name], self.tasks(behaviour), passages=self.passages, limit=study.n_test,
            batch_size=self.batch_size,
        )  # fmt: skip

    def _unmodified(self, behaviour: str, name: str) -> Arm:
        tasks = [(task.name, task.test.hash, task.max_new_tokens) for task in self.tasks(behaviour)]
        asked = {"tasks": tasks, "limit": self.study.n_test, "passages": self.passages.hash}
        parts = {part: VERSIONS[part] for part in ("arms", "price", "answering")}
        key = digest(UNMODIFIED, self.identity(name, behaviour), asked, parts)
        return self.measured(UNMODIFIED, name, behaviour, Made, key=key)

    def wanted(self) -> Wanted:
        """Return what profiles are of."""
        study = self.study
        return Wanted.of(study.profile_prompts(), load_prompts(study.text) if study.text else None, places=study.places)

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
        began, lm, found = time.monotonic(), self.models[name], self.directions(behaviour, name, seed)
        cost = Cost(round(time.monotonic() - began, 2))

        def make(setting: Setting) -> Adapter:
            chosen = choose_layers(setting.layers, lm.n_layers)
            return from_directions(
                {layer: found[layer] for layer in chosen}, lm.ref, kind=how.kind, strength=how.strength, at=how.at,
                typical=self.profiled(name), name=behaviour,
            )  # fmt: skip

        tried = self.tuned(name, behaviour, make)
        setting = tried.chosen.setting
        adapter = make(setting)
        arm = self.measured(DIRECT, name, behaviour, lambda: Made(adapter, cost=cost), setting)
        return Native(adapter, arm, list(tried.tried))

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
            return load_adapter(path)

        found = kept(path, CONFIG, lambda: load_adapter(path), make, kind=ADAPTER)
        if checkpoint.exists():  # of this training, or of one that was killed once it was saved
            remove(checkpoint)
        return found
