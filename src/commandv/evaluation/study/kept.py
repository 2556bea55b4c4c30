"""Arms that were measured before, with their answers: a new grader reads these and asks no model again.

They lie in the cache directory, named by all that decides the answers and the price, which the grader does not. Tasks
that keep no answers keep their labels; a new grader has to have those asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pydantic

from commandv.evaluation.meter import Measured
from commandv.evaluation.outcomes import judged
from commandv.evaluation.results import Arm, found, graded, write_result
from commandv.evaluation.tasks import Task
from commandv.evaluation.versions import VERSIONS
from commandv.storage.files import cache_dir, digest

log = logging.getLogger(__name__)


class KeptArm(pydantic.BaseModel):
    """One arm as it was measured."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    arm: Arm  # what was found
    graded: dict[str, str]  # task -> judge and version of the graders
    answers: dict[str, list[str]]  # task -> answers, of tasks that keep them


def answers_key(content: dict[str, Any], *more: Any) -> str:
    """Return the hash of what decides an arm's answers: a cell's content but for who grades them."""
    versions = {part: n for part, n in content.get("versions", {}).items() if part != "graders"}
    tasks = {
        name: {key: value for key, value in task.items() if key != "judge"}
        for name, task in content.get("tasks", {}).items()
    }
    return digest({**content, "versions": versions, "tasks": tasks}, *more)


def measured_once(key: str, tasks: Sequence[Task], measure: Callable[[Sequence[Task]], tuple[Arm, Measured]]) -> Arm:
    """Return an arm: as kept under a key (see `answers_key`), graded anew from kept answers, or measured."""
    file = cache_dir() / "answers" / f"{key}.json"
    kept = found(file, KeptArm)
    stale = [task for task in tasks if kept is None or kept.graded.get(task.name) != _grader(task)]
    if kept is not None and not stale:
        return kept.arm
    from_answers = [task for task in stale if kept is not None and task.name in kept.answers]
    asked = [task for task in stale if task not in from_answers]
    answers = dict(kept.answers) if kept is not None else {}
    arm = None if kept is None else kept.arm
    if arm is not None and from_answers:
        log.info("%s: graded anew from kept answers", arm.method)
        arm = _joined(arm, graded({task.name: judged(task, answers[task.name]) for task in from_answers}))
    if asked:
        fresh, measured = measure(asked)
        answers |= {task.name: list(measured.outcomes[task.name].answers) for task in asked if task.keep_answers}
        arm = fresh if arm is None else _joined(arm, graded(measured.outcomes))
    assert arm is not None
    write_result(KeptArm(arm=arm, graded={one.name: _grader(one) for one in tasks}, answers=answers), file)
    return arm


def _grader(task: Task) -> str:
    return f"{task.judge.name}, graders {VERSIONS['graders']}"


def _joined(arm: Arm, more: dict[str, dict[str, Any]]) -> Arm:
    """Return an arm with other labels for some tasks."""
    return Arm.model_validate({**dict(arm), **{part: {**getattr(arm, part), **of} for part, of in more.items()}})
