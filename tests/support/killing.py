"""A program that has work killed at random moments; run by `test_kills.py` in a process that has no threads yet.

It prints one JSON object: how many of the children were killed, and what was wrong.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

import commandv as cv
import runs
import tiny
from commandv.evaluation.arms import ARMS
from commandv.evaluation.report import write_report
from commandv.evaluation.results import Run
from commandv.evaluation.study import load_study, run_study, shared as shared_module
from gguf_model import tensors, write

torch.set_num_threads(1)
LEFT = (".tmp", ".lock", "commandv.build", "commandv.moving", ".parts", ".checkpoint")


class Killing:
    """Children of this process that are killed; `wrong` tells what does not hold."""

    def __init__(self, seed: int) -> None:
        self.random, self.kills, self.wrong = random.Random(seed), 0, []

    def during(
        self, work: Callable[[], Any], seconds: float, kills: int, check: Callable[[], Any] = lambda: None
    ) -> None:
        """Kill `work`, which takes so long, at so many random moments, and `check` after each."""
        done = 0
        for _ in range(4 * kills):
            if done == kills:
                break
            done += self._once(work, self.random.uniform(0, seconds))
            check()
        self.kills += done

    def _once(self, work: Callable[[], Any], after: float) -> bool:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                work()
            except BaseException as error:  # noqa: BLE001
                sys.stdout.write(f"{type(error).__name__}: {error}\n")
                sys.stdout.flush()
                os._exit(3)
            os._exit(0)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        self.expect(status in (0, signal.SIGKILL), f"a child failed ({status})")
        return status == signal.SIGKILL

    def expect(self, good: bool, what: str) -> None:
        """Note what does not hold."""
        if not good:
            self.wrong.append(what)

    def nothing_left(self, folder: Path, what: str) -> None:
        """Expect no leftovers of killed writers."""
        left = [str(one.relative_to(folder)) for one in folder.rglob("*") if one.name.endswith(LEFT)]
        self.expect(not left, f"{what}: left {left[:3]}")


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what work gives and how long it takes."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def same(one: cv.Adapter, two: cv.Adapter) -> bool:
    """Tell whether two adapters are equal bit for bit."""
    return one.layers == two.layers and all(
        torch.equal(getattr(a, part), getattr(b, part))
        for layer in one.layers
        for a, b in zip(one.interventions[layer], two.interventions[layer], strict=True)
        for part in ("read", "bias", "write")
    )


def fresh_cache(folder: Path) -> Path:
    """Use another, empty cache directory from now on."""
    os.environ["COMMANDV_CACHE"] = str(folder)
    return folder


def save(kill: Killing, folder: Path) -> None:
    lm = tiny.tiny_lm()
    both = [tiny.random_adapter(lm, (0, 1, 2), rank=4, seed=seed) for seed in (1, 2)]
    target = folder / "adapter"
    cv.save(both[0], target)

    def work() -> None:
        for n in range(400):
            cv.save(both[n % 2], target)

    kill.during(
        work, 0.3, 8, lambda: kill.expect(any(same(cv.load_adapter(target), one) for one in both), "save: torn")
    )
    cv.save(both[1], target)
    kill.expect(same(cv.load_adapter(target), both[1]), "save: another adapter")
    kill.expect(len(list(target.iterdir())) == 2, f"save: left {sorted(one.name for one in target.iterdir())}")


def profile(kill: Killing, folder: Path) -> None:
    lm, prompts = tiny.tiny_lm(), [f"Why is {n} a number? " + "x " * (n % 9) for n in range(240)]
    truth, taken = seconds(lambda: cv.profile(lm, prompts, batch_size=2, cache=False, text=None))
    for number in range(2):
        fresh_cache(folder / f"cache-{number}")
        kill.during(lambda: cv.profile(lm, prompts, batch_size=2, text=None), 0.4 * taken, 3)
        found = cv.profile(lm, prompts, batch_size=2, text=None)
        equal = all(torch.equal(found.layer(layer), truth.layer(layer)) for layer in range(lm.n_layers))
        kill.expect(equal and (found.keys == truth.keys).all(), "profile: another one")
        kill.nothing_left(folder, "profile")


def train(kill: Killing, folder: Path) -> None:
    lm, file = tiny.tiny_lm(), folder / "checkpoint.safetensors"
    examples = cv.load_prompts("builtin:numbered-list")[:24]
    settings = cv.TrainSettings(epochs=8, batch_size=8, max_response=8)
    kind = cv.DiReFT(rank=2, layers="all_layers")
    truth, taken = seconds(lambda: cv.train(lm, examples, kind, settings))
    for _ in range(2):
        kill.during(lambda: cv.train(lm, examples, kind, settings, checkpoint=file), 0.5 * taken, 3)
        kill.expect(same(cv.train(lm, examples, kind, settings, checkpoint=file), truth), "train: another adapter")
        kill.expect([one.name for one in folder.iterdir()] == [file.name], "train: left")
        file.unlink()


def study(kill: Killing, folder: Path) -> None:
    passages, original = cv.load_prompts("builtin:drift")[:2], cv.load_prompts
    shared_module.load_prompts = lambda source, **how: (
        passages if source == "builtin:drift" else original(source, **how)
    )
    for seed, name in enumerate(("one", "two")):
        lm = tiny.tiny_lm(seed=seed)
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"Say {n}", "response": "1. tea"} for n in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "name": "kill", "prompts": str(folder / "rows.jsonl"), "text": None,
        "models": {name: {"id": str(folder / name), "dtype": "float32"} for name in ("one", "two")},
        "pairs": [["one", "two"]],
        "behaviours": {"list": {
            "task": "numbered-list", "examples": str(folder / "rows.jsonl"),
            "training": {"epochs": 2, "max_response": 4, "rank": 2, "layers": "last_third"},
        }},
        "seeds": [0, 1], "scales": [1.0], "layers": ["last_third"], "n_dev": 2, "n_test": 2,
        "leave_out": [name for name in ARMS if name not in ("unmodified", "pasted", "random", "direct")],
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    wanted = load_study(folder / "study.yaml")
    fresh_cache(folder / "undisturbed")
    truth, taken = seconds(lambda: run_study(wanted, folder / "truth"))
    kill.expect(
        [cell.state for cell in truth.cells] == ["done", "done"], f"study: {[one.error for one in truth.cells]}"
    )
    fresh_cache(folder / "cache")
    kill.during(lambda: run_study(wanted, folder / "run"), 0.5 * taken, 6)
    kill.expect(_timeless(run_study(wanted, folder / "run")) == _timeless(truth), "study: other results")
    kill.nothing_left(folder, "study")
    kill.expect(len(list((folder / "run" / "cells").iterdir())) == 2, "study: more files than cells")


def _timeless(run: Run) -> list[Any]:
    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(one) for key, one in value.items() if key not in ("seconds", "cost")}
        return [without(one) for one in value] if isinstance(value, list) else value

    return [without(cell.model_dump(mode="json")) for cell in run.cells]


def report(kill: Killing, folder: Path) -> None:
    run = runs.study(("json",), (0,))
    out = folder / "report"
    (html, markdown), taken = seconds(lambda: write_report(run, out))
    pages = html.read_bytes(), markdown.read_bytes()

    def whole() -> None:
        kill.expect((html.read_bytes(), markdown.read_bytes()) == pages, "report: torn")

    kill.during(lambda: write_report(run, out), 1.1 * taken, 6, whole)
    write_report(run, out)
    whole()
    kill.expect(sorted(one.name for one in out.iterdir()) == ["report.html", "report.md"], "report: left")


def gguf(kill: Killing, folder: Path) -> None:
    file = write(folder / "tiny.gguf", tensors(tiny.tiny_lm().model))
    fresh_cache(folder / "undisturbed")
    truth = cv.load_model(str(file))
    for number in range(3):
        shutil.rmtree(fresh_cache(folder / "again"), ignore_errors=True)
        _, taken = seconds(lambda: cv.load_model(str(file)))
        fresh_cache(folder / f"cache-{number}")
        kill.during(lambda: cv.load_model(str(file)), 0.9 * taken, 2)
        found = cv.load_model(str(file))
        weights = dict(found.model.named_parameters())
        equal = all(torch.equal(one, weights[name]) for name, one in truth.model.named_parameters())
        kill.expect(equal and found.revision == truth.revision, "gguf: another model")
        kill.nothing_left(folder, "gguf")


def main() -> None:
    """Run every sort of work in a folder given as the argument."""
    logging.disable(logging.CRITICAL)
    kill, took = Killing(seed=7), {}
    for work in (save, profile, train, study, report, gguf):
        folder = Path(sys.argv[1]) / work.__name__
        folder.mkdir(parents=True)
        fresh_cache(folder / "own-cache")
        _, took[work.__name__] = seconds(lambda work=work, folder=folder: work(kill, folder))
    sys.stdout.write(json.dumps({"kills": kill.kills, "wrong": kill.wrong, "seconds": took}) + "\n")


if __name__ == "__main__":
    main()
