"""What runs tasks: an executor gives a pool of workers; the local one is this process."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from commandv.errors import MismatchError
from commandv.progress import Report

log = logging.getLogger(__name__)

LIBRARIES = ("commandv", "torch", "transformers", "numpy", "scipy")
Make = Callable[[], Any]  # makes what a worker keeps from task to task, such as its models
Do = Callable[..., Any]  # (what the worker keeps, report, *args) -> value


class Task(NamedTuple):
    """One piece of work."""

    key: str  # what it is, for messages
    args: tuple[Any, ...]  # what it is done with
    # what it has in common with others: a worker that had such a task before is asked first
    like: frozenset[str] = frozenset()


Smaller = Callable[[Task], Task | None]  # the same work in less memory, None where there is no less


class Outcome(NamedTuple):
    """What became of a task."""

    task: Task  # which one
    value: Any = None  # what it gave
    # why it gave nothing: too little memory even for the smallest task, or workers that were lost with it
    error: Exception | None = None


class Pool(Protocol):
    """Workers that keep what they have made, such as loaded models, from one `run` to the next."""

    @property
    def width(self) -> int:
        """How many tasks run at the same time."""

    def run(self, do: Do, tasks: Sequence[Task], report: Report, smaller: Smaller | None = None) -> Iterator[Outcome]:
        """Yield what becomes of every task, in the order in which they finish.

        Args:
            do: does one task; a module's own function, or a `functools.partial` of one.
            tasks: all of them.
            report: is told the steps that tasks report.
            smaller: gives a task that ran out of memory another try.

        Raises:
            CommandVError: what a task raised.
        """


class Executor(Protocol):
    """Something that gives a pool of workers."""

    def pool(self, make: Make, here: Any = None, tasks: int | None = None) -> contextlib.AbstractContextManager[Pool]:
        """Return a pool.

        Args:
            make: gives what a worker keeps, once per worker.
            here: the same, where this process has it already.
            tasks: so many are run at the same time at most, and no more workers started; None where that is unknown.
        """


@dataclass(frozen=True)
class Local:
    """The executor that is this process: one task after another."""

    @contextlib.contextmanager
    def pool(self, make: Make, here: Any = None, tasks: int | None = None) -> Iterator[Pool]:
        """Yield the pool; see `Executor`."""
        yield _Here(make, here)


class _Here:
    width = 1

    def __init__(self, make: Make, kept: Any) -> None:
        self._make, self._kept = make, kept

    def run(self, do: Do, tasks: Sequence[Task], report: Report, smaller: Smaller | None = None) -> Iterator[Outcome]:
        for task in tasks:
            if self._kept is None:
                self._kept = self._make()
            outcome: Outcome | None = None
            while outcome is None:
                try:
                    outcome = Outcome(task, do(self._kept, report, *task.args))
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    less = with_less(task, smaller, str(error))
                    outcome = Outcome(task, error=error) if less is None else None
                    task = less or task
            yield outcome


def with_less(task: Task, smaller: Smaller | None, reason: str) -> Task | None:
    """Return the smaller task that follows one that ran out of memory, and say so; None where there is none."""
    less = None if smaller is None else smaller(task)
    if less is not None:
        log.warning("%s: out of memory (%s); trying again as %s", task.key, reason.split("\n")[0][:200], less.key)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return less


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory did not suffice."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide what a task gives."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **found}


def require_same_versions(theirs: Mapping[str, str], host: str) -> None:
    """Raise `MismatchError` where a worker has other versions than this process."""
    mine = versions()
    other = {name: theirs.get(name, "none") for name in mine if theirs.get(name) != mine[name]}
    if other:
        told = ", ".join(f"{name} {version} (here {mine[name]})" for name, version in other.items())
        raise MismatchError(f"the worker on {host} has {told}; install the same versions on every node")
