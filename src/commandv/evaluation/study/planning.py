"""What a study will do, and about how long that takes, told before it starts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from commandv.errors import CommandVError
from commandv.evaluation.arms import BRIDGE_PROMPTS, BRIDGE_TOKENS, DIRECT, PRACTICE_SETTINGS
from commandv.evaluation.catalogue import NO_TASKS, load_task
from commandv.evaluation.material import ANSWER_TOKENS
from commandv.evaluation.price import REPLY_TOKENS
from commandv.evaluation.study.cell import N_ASKED, N_SAMPLES, SAMPLE_TOKENS, is_tuned
from commandv.evaluation.study.models import ModelSource
from commandv.evaluation.study.schema import CellSpec, Study
from commandv.evaluation.tasks import Task
from commandv.models.load import resolve_dtype
from commandv.prompts.sets import load_prompts

log = logging.getLogger(__name__)

PROMPT_TOKENS = 40  # of a usual prompt with its template, for estimates
SLOWNESS = 1.5  # generation and small batches run at about this fraction below matrix products of the probe


@dataclass(frozen=True)
class Plan:
    """Counts of the work and its expected duration.

    Attributes:
        cells: of the study.
        adapters: to train, donors and direct controls.
        profiles: one per model.
        arms: measured in every cell.
        answers: generated in all.
        tokens: forward tokens in all, by model.
        seconds: expected on this machine, alone on it; None where a model's size is not known.
    """

    cells: int
    adapters: int
    profiles: int
    arms: int
    answers: int
    tokens: dict[str, int]
    seconds: float | None


def plan(
    study: Study,
    models: ModelSource | None = None,
    tasks: Mapping[str, Task] = NO_TASKS,
    cells: Sequence[CellSpec] | None = None,
    *,
    convert: bool = True,
) -> Plan:
    """Count a study's work, or that of some of its cells.

    Args:
        study: what is to be run.
        models: of the study, where they are not those of its file; their sizes give the duration on this machine.
        tasks: known besides the built-in ones.
        cells: count these; None for all.
        convert: models of GGUF files that are not converted yet, which takes a minute; else no duration is told.
    """
    wanted = study.cells() if cells is None else cells
    arms = study.arms()
    n_arms = len(arms) + len(study.methods)
    tokens = dict.fromkeys(study.models, 0)
    answers = 0
    for spec in wanted:
        behaviour = study.behaviours[spec.behaviour]
        # A native vector is tuned as well, once for several cells; here it counts in each.
        tuned = [name for name, arm in arms.items() if is_tuned(name, arm, behaviour.vector is not None)]
        settings = len(study.settings()) * len(tuned)
        asked_of = [load_task(name, tasks) for name in (behaviour.task, *behaviour.also)]
        for number, task in enumerate(asked_of):
            asked = min(study.n_test, len(task.test)) * n_arms
            if number == 0:
                asked += min(study.n_dev, len(task.dev)) * settings
            answers += asked + min(study.n_test, len(task.test))
            tokens[spec.recipient] += asked * (PROMPT_TOKENS + task.max_new_tokens)
            tokens[spec.donor] += min(study.n_test, len(task.test)) * (PROMPT_TOKENS + task.max_new_tokens)
        passes = len(load_prompts("builtin:drift", limit=study.n_drift)) * (PROMPT_TOKENS + REPLY_TOKENS)
        tokens[spec.recipient] += passes * (n_arms + settings) + 2 * N_SAMPLES * SAMPLE_TOKENS
        if "text-bridge" in arms:
            tokens[spec.donor] += 2 * BRIDGE_PROMPTS * (PROMPT_TOKENS + BRIDGE_TOKENS)
        answered = N_ASKED * (PROMPT_TOKENS + ANSWER_TOKENS)
        if any("asked" in arm.needs for arm in arms.values()):
            tokens[spec.donor] += answered
        if "donor-answers" in arms:
            tokens[spec.recipient] += 3 * PRACTICE_SETTINGS.epochs * answered
    to_train = trained(study, wanted)
    for name, trained_on, _ in to_train:
        behaviour = study.behaviours[trained_on]
        assert behaviour.examples is not None
        tokens[name] += _training_tokens(behaviour.examples, behaviour.training.epochs, behaviour.training.max_response)
    n_rows = len(study.profile_prompts()) + (len(load_prompts(study.text)) if study.text else 0)
    for name in {name for spec in wanted for name in spec[:2]}:
        tokens[name] += n_rows * PROMPT_TOKENS
    seconds = _seconds(tokens, models or ModelSource(study), convert=convert)
    return Plan(len(wanted), len(to_train), len(study.models), n_arms, answers, tokens, seconds)


def _seconds(tokens: dict[str, int], models: ModelSource, *, convert: bool) -> float | None:
    """Return the expected duration; None when a model's size is not known here."""
    rate, total = _flops_per_second(), 0.0
    for name, count in tokens.items():
        try:
            size = models.parameters(name, convert=convert)
        except CommandVError as error:
            log.warning("how long it takes cannot be told without the size of %s: %s", name, error)
            return None
        total += 2 * size * count / rate * SLOWNESS
    return round(total, 1)


def trained(study: Study, specs: Sequence[CellSpec]) -> set[tuple[str, str, int]]:
    """Return (model, behaviour, seed) of every adapter that is trained for cells."""
    found = set()
    for spec in specs:
        behaviour = study.behaviours[spec.behaviour]
        if behaviour.examples is not None:
            sides = [spec.donor] + ([] if DIRECT in study.leave_out else [spec.recipient])
            found |= {(name, spec.behaviour, spec.seed) for name in sides if name not in behaviour.adapters}
    return found


def _training_tokens(source: str, epochs: int, max_response: int) -> int:
    examples = load_prompts(source)
    labelled = min(max_response, math.ceil(sum(len(one.response) for one in examples) / len(examples) / 4))
    return 3 * epochs * len(examples) * (PROMPT_TOKENS + labelled)  # a backward pass costs two forward ones


def _flops_per_second() -> float:
    """Measure a matrix product in the usual dtype."""
    a = torch.randn(1024, 1024).to(resolve_dtype(None))
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        best = max(best, 2 * 1024**3 / (time.perf_counter() - began))
    return best
