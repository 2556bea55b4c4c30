"""Workers of a Ray cluster: how much two gain over one, what Ray costs, and what a node that is killed loses.

    python -m benchmarks.cluster           # writes results/cluster.json
    python -m benchmarks.cluster scaling   # this part anew; the others are killed and overhead

Workers have one thread each. Profiles of the two packaged models and a study of 12 cells are run with one worker and
with two, on caches of their own that hold nothing but the converted models, and their results compared. Several nodes
are simulated on this machine, and one is killed in the middle of a profile and another of a study, of tiny models.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import commandv as cv
from commandv.evaluation.arms import ARMS
from commandv.evaluation.results import Cell, Run
from commandv.evaluation.study import load_study, run_study
from commandv.evaluation.study.schema import CellSpec
from commandv.storage.files import cache_dir

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "cluster.json"
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
PROMPTS, KILLED_PROMPTS, BATCH, TARGET = 128, 192, 2, 1.7
MEASURED = {"unmodified", "pasted", "random", "direct"}
STUDY = """
name: twelve
prompts: builtin:general
limit: 48
text: null
models: {one: {id: "ONE"}, two: {id: "TWO"}}
pairs: [[one, two], [two, one]]
behaviours:
  list: {task: numbered-list, adapters: {one: "OF-ONE", two: "OF-TWO"}}
  again: {task: numbered-list, adapters: {one: "OF-ONE", two: "OF-TWO"}}
seeds: [0, 1, 2]
scales: [1.0]
layers: [last_third]
n_dev: 4
n_test: 12
n_drift: 2
leave_out: LEFT_OUT
"""


class Sides(NamedTuple):
    """Two models and an adapter for each."""

    models: tuple[str, str]
    adapters: tuple[str, str]

    def profiles(self, executor: Any, prompts: int) -> list[Any]:
        """Profile both on workers, in parts."""
        asked = cv.load_prompts("builtin:general")[:prompts]
        return [
            cv.profile_on(executor, functools.partial(cv.load_model, name), asked, batch_size=BATCH)
            for name in self.models
        ]

    def study(self, executor: Any, out: Path) -> Run:
        """Run the study."""
        text = STUDY.replace("LEFT_OUT", json.dumps(sorted(set(ARMS) - MEASURED)))
        for side, model, adapter in zip(("ONE", "TWO"), self.models, self.adapters, strict=True):
            text = text.replace(f"OF-{side}", adapter).replace(side, model)
        file = out.parent / "study.yaml"
        file.write_text(text)
        return run_study(load_study(file), out, executor=executor)


PACKAGED = Sides(MODELS, (f"builtin:numbered-list@{MODELS[0]}", f"builtin:numbered-list@{MODELS[1]}"))


def tiny_sides(folder: Path) -> Sides:
    """Write two tiny models of random weights and an adapter for each."""
    sys.path.insert(0, str(ROOT.parent / "tests" / "support"))
    import tiny

    for seed, name in enumerate(("one", "two")):
        lm = tiny.tiny_lm(seed=seed, max_position_embeddings=2048)
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
        cv.save(tiny.random_adapter(cv.load_model(str(folder / name)), layers=(1, 2, 3)), folder / f"{name}-adapter")
    one, two = (str(folder / name) for name in ("one", "two"))
    return Sides((one, two), (f"{one}-adapter", f"{two}-adapter"))


def found(run: Run) -> str:
    """Return what a run found, without its times, as text: NaN is the same as NaN there."""
    return json.dumps(
        [
            (*CellSpec(cell.donor, cell.recipient, cell.behaviour, cell.seed), cell.error, cell.fidelity, arms(cell))
            for cell in run.cells
        ]
    )


def arms(cell: Cell) -> list[Any]:
    return [(arm.method, arm.labels, arm.words, arm.price) for arm in cell.arms]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    value = work()
    return round(time.perf_counter() - began, 1), value


def equal(first: list[Any], second: list[Any]) -> bool:
    """Tell whether profiles have the same rows."""
    return all(
        torch.equal(one.layer(layer), other.layer(layer))
        for one, other in zip(first, second, strict=True)
        for layer in range(one.n_layers)
    )


def scaling(folder: Path) -> dict[str, Any]:
    """Run the same with one worker and two."""
    figures: dict[str, Any] = {}
    results: dict[int, tuple[Any, Any]] = {}
    for name in MODELS:
        cv.load_model(name)  # converts it, where that has not been done
    models = cache_dir() / "models"
    for workers in (1, 2):
        shutil.copytree(models, folder / f"cache-{workers}" / "models")
        os.environ["COMMANDV_CACHE"] = str(folder / f"cache-{workers}")
        executor = cv.Ray(workers=workers)
        taken, made = timed(functools.partial(PACKAGED.profiles, executor, PROMPTS))
        lasted, run = timed(functools.partial(PACKAGED.study, executor, folder / f"run-{workers}"))
        figures[f"profiles, {workers}"], figures[f"study, {workers}"] = taken, lasted
        results[workers] = (made, found(run))
        print(figures, flush=True)
    figures["equal profiles"] = equal(results[1][0], results[2][0])
    figures["equal studies"] = results[1][1] == results[2][1]
    return figures


def overhead() -> dict[str, float]:
    """Return the seconds that Ray takes beside the work: to start, to get workers, to give out a task, to end."""
    began = time.perf_counter()
    with cv.Ray(workers=1).pool(list) as pool:
        connected = time.perf_counter()
        first = list(pool.run(_nothing, [_task(0)], _silent))
        ready = time.perf_counter()
        many = list(pool.run(_nothing, [_task(n) for n in range(200)], _silent))
        done = time.perf_counter()
    assert len(first) + len(many) == 201
    ended = time.perf_counter()
    return {
        "start": round(connected - began, 2),
        "worker": round(ready - connected, 2),
        "task": round((done - ready) / 200, 4),
        "end": round(ended - done, 2),
    }


def _task(number: int) -> Any:
    from commandv.executors.executor import Task

    return Task(str(number), (number,))


def _nothing(_kept: Any, _report: Any, number: int) -> int:
    return number


def _silent(_steps: int) -> None:
    pass


def killed(folder: Path) -> dict[str, Any]:
    """Kill a node in the middle of a profile and of a study of tiny models on three simulated nodes."""
    import ray
    from ray.cluster_utils import Cluster

    sides, figures = tiny_sides(folder), dict[str, Any]()
    os.environ["COMMANDV_CACHE"] = str(folder / "cache-here")
    rows, expected = sides.profiles(cv.Local(), KILLED_PROMPTS), found(sides.study(cv.Local(), folder / "run-here"))
    os.environ["COMMANDV_CACHE"] = str(folder / "cache-killed")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(3)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    executor, cells = cv.Ray(workers=3), folder / "run-killed" / "cells"
    lost = Lost()
    logging.getLogger("commandv.executors.ray").addHandler(lost)
    try:
        with _killer(cluster, nodes.pop(), lambda: len(list(folder.rglob(".parts/part-*"))) >= 6) as done:
            made = sides.profiles(executor, KILLED_PROMPTS)
        figures |= {"mid-profile": done(), "profiles equal": equal(made, rows), "tasks lost": lost.count}
        print(figures, flush=True)
        with _killer(cluster, nodes.pop(), lambda: len(list(cells.glob("*.json"))) >= 3) as done:
            run = sides.study(executor, folder / "run-killed")
        figures |= {"mid-study": done(), "study equal": found(run) == expected, "tasks lost": lost.count}
        print(figures, flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
    return figures


class Lost(logging.Handler):
    """Counts the tasks whose worker was lost."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "is lost" in record.getMessage()


class _killer:
    """Kill a node once something is true; tells whether it came to that."""

    def __init__(self, cluster: Any, node: Any, when: Callable[[], bool]) -> None:
        self.cluster, self.node, self.when = cluster, node, when
        self.ended, self.killed = threading.Event(), False
        self.thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self.ended.wait(0.2):
            if self.when():
                self.cluster.remove_node(self.node, allow_graceful=False)
                self.killed = True
                return

    def __enter__(self) -> Callable[[], bool]:
        self.thread.start()
        return lambda: self.killed

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def page() -> str:
    """Return the page, from the results."""
    figures = json.loads(RESULTS.read_text("utf-8"))
    scale, cost, lost = figures["scaling"], figures["overhead"], figures["killed"]
    lines = [
        "# Workers of a Ray cluster\n",
        f"Written by `python -m benchmarks.cluster` on {figures['cores']} cores ({figures['versions']}); "
        f"workers have one thread each. Others share the machine: "
        f"before the first run {figures['load']:.1f} processes ran. Models were converted before.\n",
        "| | one worker | two workers | gain | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for what, name in (("profiles", f"profiles of {' and '.join(MODELS)}, {PROMPTS} prompts"), ("study", "12 cells")):
        one, two = scale[f"{what}, 1"], scale[f"{what}, 2"]
        verdict = "met" if one / two >= TARGET else f"**not met** (at least {TARGET})"
        lines.append(f"| {name} | {one:.0f} s | {two:.0f} s | {one / two:.2f}x | {verdict} |")
    same = scale["equal profiles"] and scale["equal studies"]
    fixed = cost["start"] + cost["worker"] + cost["end"]
    lines += [
        f"\nResults of one and two workers are {_equal(same)}: all rows, and labels, prices and fits of all cells.\n",
        f"What Ray takes itself: {cost['start']:.1f} s to start on this machine, {cost['worker']:.1f} s until the "
        f"first worker answers (most of it importing torch), {1000 * cost['task']:.0f} ms a task, {cost['end']:.1f} s "
        f"to end: {fixed / 60:.0%} of a run of one minute, {fixed / 600:.1%} of one of ten. An address adds a few "
        "seconds to try it first.\n",
        "A cluster of three nodes simulated on this machine (Ray's `cluster_utils`), two tiny models of random "
        f"weights: one node killed in the middle of their profiles, which are {_equal(lost['profiles equal'])} to "
        f"those of one process; a second one killed in the middle of a study of 12 cells, whose results are "
        f"{_equal(lost['study equal'])} to those of one process. {lost['tasks lost']} tasks that were running were "
        "lost with the nodes and run again.",
    ]
    return "\n".join(lines) + "\n"


def _equal(same: bool) -> str:
    return "equal" if same else "**not equal**"


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "killed": killed,
    "overhead": lambda _: overhead(),
    "scaling": scaling,
}


def main() -> None:
    import ray

    figures: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Ray {ray.__version__}"
    figures |= {"versions": versions, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        for part in sys.argv[1:] or PARTS:
            figures[part] = PARTS[part](Path(name))
            print(part, figures[part], flush=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
