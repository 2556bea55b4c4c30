"""The executor whose workers are actors of a Ray cluster, on this machine or at an address.

Workers get their tasks one by one and send back what these give, so that this process alone writes files and a worker
that is lost loses the task it is at. It is replaced, and the task goes to whichever worker is free first.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from commandv.arguments import checked
from commandv.errors import CommandVError, InputError, WorkerError, require_positive
from commandv.executors.address import WAIT, connected
from commandv.executors.executor import (
    Do,
    Make,
    Outcome,
    Pool,
    Smaller,
    Task,
    out_of_memory,
    require_same_versions,
    versions,
    with_less,
)
from commandv.progress import Report
from commandv.storage.files import CACHE_VARIABLE

log = logging.getLogger(__name__)

TRIES = 4  # of a task whose workers are lost, the first included
GPU_BYTES = 40e9  # of weights on one GPU; the rest is for activations
TICK = 0.5  # seconds between looks at the workers' progress


@checked
@dataclass(frozen=True)
class Ray:
    """Runs tasks on workers of a Ray cluster, each with models of its own.

    Attributes:
        address: of a running cluster, `HOST:PORT` or `auto` for the one that this machine belongs to. None starts Ray
            on this machine for as long as the work takes.
        workers: how many at most; by default as many as the cluster has room for.
        cpus: of one worker, which is also how many threads it computes with.
        gpus: of one worker, a fraction where several share one. None gives as many as `size` needs where the cluster
            has any, else none.
        size: bytes of the weights that a worker holds; 0 where that is not known, which counts as one GPU.
        wait: seconds that an address has to answer.
        patience: seconds without a single worker after which the work is given up.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float | None = None
    size: int = 0
    wait: float = WAIT
    patience: float = 600.0

    def __post_init__(self) -> None:
        require_positive(workers=self.workers)
        if not (0 < self.cpus < math.inf and 0 <= (self.gpus or 0) < math.inf):
            raise InputError(f"cpus={self.cpus}, gpus={self.gpus}: expected more than 0 cpus and no fewer than 0 gpus")

    @contextlib.contextmanager
    def pool(self, make: Make, here: Any = None, tasks: int | None = None) -> Iterator[Pool]:
        """Yield the pool; see `Executor`. What this process has already is of no use to workers.

        All workers are started at once and make what they keep, such as models, before their first task comes.

        Raises:
            InputError: Ray is not installed.
            WorkerError: the address does not answer, or no node has room for a worker.
        """
        with connected(self.address, self.wait):
            made = _Workers(self, make, tasks)
            try:
                yield made
            finally:
                made.close()


# -- the cluster ------------------------------------------------------------------------------------------------------


def _room(settings: Ray) -> tuple[int, float]:
    """Return how many workers the cluster's nodes have room for, and how many GPUs each takes."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = settings.gpus
    if gpus is None:
        gpus = max(1, math.ceil(settings.size / GPU_BYTES)) if any(node.get("GPU") for node in nodes) else 0
    fits = [min([node.get("CPU", 0) / settings.cpus] + ([node.get("GPU", 0) / gpus] if gpus else [])) for node in nodes]
    count = sum(int(one + 1e-6) for one in fits)
    if not count:
        raise WorkerError(
            f"no node of the Ray cluster has {settings.cpus:g} CPUs and {gpus:g} GPUs for a worker; ask for less, or "
            "add nodes"
        )
    return count, gpus


# -- a worker ---------------------------------------------------------------------------------------------------------


class _Actor:
    """In a worker's process: what it keeps, and the task that it is at."""

    def __init__(self, make: Make, threads: int, environment: dict[str, str]) -> None:
        import threadpoolctl
        import torch

        os.environ.update(environment)
        torch.set_num_threads(threads)
        self._limits = threadpoolctl.threadpool_limits(threads)
        self._make, self._threads, self._kept, self._steps = make, threads, None, 0

    def hello(self) -> tuple[dict[str, str], str]:
        """Return versions and the name of the machine."""
        return versions(), socket.gethostname()

    def do(self, do: Do, args: tuple[Any, ...]) -> tuple[Any, int]:
        """Do a task; return what it gives and the steps that it reported."""
        import torch

        torch.set_num_threads(self._threads)  # counted thread by thread
        self._steps = 0
        self.make()
        return do(self._kept, self._advance, *args), self._steps

    def make(self) -> None:
        """Make what it keeps, where that has not been done."""
        if self._kept is None:
            self._kept = self._make()

    def _advance(self, steps: int) -> None:
        self._steps += steps

    def steps(self) -> int:
        """Return the steps of the task that it is at; answered while that runs."""
        return self._steps


@functools.cache
def _actor_class() -> Any:
    import ray

    made = type("Worker", (_Actor,), {"steps": ray.method(concurrency_group="steps")(_Actor.steps)})
    remote: Any = ray.remote
    return remote(concurrency_groups={"steps": 1})(made)


@dataclass(eq=False)
class _Worker:
    """This process's side of a worker."""

    actor: Any  # its handle
    hello: Any  # its greeting, until it has come
    host: str = ""  # the machine it is on
    made: Any = None  # whether it has made what it keeps; where that fails, so does its first task, which says why
    had: set[str] = field(default_factory=set)  # what the tasks that it had are like
    task: Task | None = None  # that it is at
    value: Any = None  # of that task, to come
    seen: int = 0  # steps of that task that have been told
    asked: Any = None  # for its steps


class _Workers:
    """The pool."""

    def __init__(self, settings: Ray, make: Make, tasks: int | None) -> None:
        self.settings, self._make = settings, make
        room, self._gpus = _room(settings)
        self._most = min(room, settings.workers or room, max(1, tasks or room))
        self._workers = [self._start() for _ in range(self._most)]
        self._lost = 0

    @property
    def width(self) -> int:
        """How many workers there are at most."""
        return self._most

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            _end(worker)
        self._workers.clear()

    def run(self, do: Do, tasks: Sequence[Task], report: Report, smaller: Smaller | None = None) -> Iterator[Outcome]:
        """Yield what becomes of every task; see `Pool`."""
        pending, lost = deque(tasks), dict[str, int]()
        try:
            yield from self._rounds(do, pending, lost, report, smaller)
        finally:  # after an error, tasks of this run are not to end in the next
            for worker in [one for one in self._workers if one.task is not None]:
                self._workers.remove(worker)
                _end(worker)

    def _rounds(
        self, do: Do, pending: deque[Task], lost: dict[str, int], report: Report, smaller: Smaller | None
    ) -> Iterator[Outcome]:
        """Give out tasks and take in what they give until there are none."""
        import ray

        alone = time.monotonic()
        while pending or any(worker.task for worker in self._workers):
            while len(self._workers) < min(self._most, len(pending) + sum(bool(one.task) for one in self._workers)):
                self._workers.append(self._start())  # in place of one that was lost
            while pending and (idle := [one for one in self._workers if one.host and one.task is None]):
                self._give(idle, do, pending)
            refs = {worker.value or worker.hello: worker for worker in self._workers if worker.task or not worker.host}
            done, _ = ray.wait(list(refs), num_returns=1, timeout=TICK)
            for ref in done:
                outcome = self._finished(refs[ref], pending, lost, report, smaller)
                if outcome is not None:
                    yield outcome
            self._tell(report)
            if any(worker.host for worker in self._workers):
                alone = time.monotonic()
            elif time.monotonic() - alone > self.settings.patience:
                raise WorkerError(
                    f"no worker of the Ray cluster is left or has started within {self.settings.patience:g} s; what is "
                    "finished is kept: run the same command again when the cluster has room"
                )

    def _start(self) -> _Worker:
        threads = max(1, int(self.settings.cpus))
        options = {"num_cpus": self.settings.cpus, "num_gpus": self._gpus, "max_restarts": 0}
        environment = {name: os.environ[name] for name in (CACHE_VARIABLE,) if name in os.environ}
        actor = _actor_class().options(**options).remote(self._make, threads, environment)
        return _Worker(actor, actor.hello.remote())

    def _give(self, idle: list[_Worker], do: Do, pending: deque[Task]) -> None:
        """Give out the task that has most in common with what one of the idle workers had, to that one."""
        pairs = ((worker, task) for worker in idle for task in pending)
        worker, task = max(pairs, key=lambda one: len(one[1].like & one[0].had))
        pending.remove(task)
        worker.task, worker.seen, worker.had = task, 0, worker.had | task.like
        worker.value = worker.actor.do.remote(do, task.args)
        log.info("%s: on %s", task.key, worker.host)

    def _finished(
        self, worker: _Worker, pending: deque[Task], lost: dict[str, int], report: Report, smaller: Smaller | None
    ) -> Outcome | None:
        """Take what a worker has sent, or find out that it is lost.

        Raises:
            MismatchError: it has other versions of the libraries.
            CommandVError: what its task raised.
        """
        import ray

        task = worker.task
        try:
            if task is None:
                theirs, host = ray.get(worker.hello)
                require_same_versions(theirs, host)
                worker.host = host
                worker.made = worker.actor.make.remote()
                return None
            value, steps = ray.get(worker.value)
        except ray.exceptions.RayTaskError as error:
            return self._failed(worker, error, pending, report, smaller)
        except ray.exceptions.RayError as error:
            return self._replaced(worker, error, pending, lost, report, smaller)
        report(steps - worker.seen)
        worker.task = worker.value = None
        return Outcome(task, value)

    def _failed(
        self, worker: _Worker, error: Any, pending: deque[Task], report: Report, smaller: Smaller | None
    ) -> Outcome | None:
        """Deal with a task that raised an error."""
        task, cause = worker.task, error.cause
        report(-worker.seen)
        worker.task = worker.value = None
        if task is not None and isinstance(cause, Exception) and out_of_memory(cause):
            less = with_less(task, smaller, f"on {worker.host}: {cause}")
            if less is None:
                return Outcome(task, error=cause)
            pending.appendleft(less)
            return None
        if isinstance(cause, CommandVError):
            raise cause from error
        what = "a worker" if task is None else task.key
        raise WorkerError(f"{what}, on {worker.host or 'a node'}: {str(error).strip().splitlines()[-1]}") from error

    def _replaced(
        self,
        worker: _Worker,
        error: Any,
        pending: deque[Task],
        lost: dict[str, int],
        report: Report,
        smaller: Smaller | None,
    ) -> Outcome | None:
        """Deal with a worker that is gone; its task is tried again, smaller where memory was what it lacked."""
        task = worker.task
        _end(worker)
        self._workers.remove(worker)
        told = " ".join(str(error).split())
        reason = told if len(told) < 300 else f"{told[:150]} ... {told[-150:]}"
        if task is None:
            self._lost += 1
            if self._lost >= TRIES * self._most:
                raise WorkerError(f"workers of the Ray cluster do not start: {reason}") from error
            return None
        report(-worker.seen)
        if "low on memory" in told and (less := with_less(task, smaller, reason)) is not None:
            pending.appendleft(less)
            return None
        lost[task.key] = lost.get(task.key, 0) + 1
        if lost[task.key] >= TRIES:
            problem = f"{task.key}: {TRIES} workers were lost with it, the last on {worker.host}: {reason}"
            return Outcome(task, error=WorkerError(problem))
        log.warning("%s: the worker on %s is lost (%s); the task is run again", task.key, worker.host, reason)
        pending.appendleft(task)
        return None

    def _tell(self, report: Report) -> None:
        """Report the steps of the tasks that run."""
        import ray

        for worker in self._workers:
            if worker.task is None:
                continue
            if worker.asked is None:
                worker.asked = worker.actor.steps.remote()
            elif ray.wait([worker.asked], timeout=0)[0]:
                with contextlib.suppress(ray.exceptions.RayError):  # a lost one is found out by its task
                    now = ray.get(worker.asked)
                    report(max(0, now - worker.seen))
                    worker.seen = max(worker.seen, now)
                worker.asked = None


def _end(worker: _Worker) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(worker.actor)
