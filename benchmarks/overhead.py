"""What measuring adds to generating, and what running a shared beginning once saves.

`commandv.measure` against plain batched `generate` of the same prompts; `commandv.profile` against itself with every
prompt run whole.

    python -m benchmarks.overhead     # writes results/overhead.json and ../docs/benchmarks/overhead.md

Both run at the same batch size, in turns; figures are medians of ratios within one turn. Plain generation gets its
batches tokenised and padded in advance and its tokens are not decoded: what it leaves out is counted as our overhead.
It runs every prompt whole, `measure` what they all begin with once.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import commandv as cv
from commandv.evaluation.catalogue import load_task
from commandv.models.encoding import encode, pad
from commandv.models.generation import batches, greedy
from commandv.models.lm import LM
from commandv.models.running import own_pass

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "overhead.json"
TABLE = ROOT.parent / "docs" / "benchmarks" / "overhead.md"
TURNS, N, BATCH, PROFILED = 5, 64, 32, 320
TARGET = 0.9


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(one: Callable[[], object], other: Callable[[], object]) -> dict[str, float]:
    """Return how many times as long the first takes as the second."""
    one(), other()  # warm up
    found = []
    for turn in range(TURNS):
        order = (one, other) if turn % 2 == 0 else (other, one)
        taken = {work: seconds(work) for work in order}
        found.append(taken[one] / taken[other])
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def profiling(lm: LM) -> dict[str, float]:
    """Return the time of a profile of whole prompts over that with a shared beginning."""
    prompts = cv.load_prompts("builtin:general")[:PROFILED]

    def shared() -> None:
        cv.profile(lm, prompts, cache=False, text=None)

    def whole() -> None:
        with mock.patch("commandv.models.prefix.WORTHWHILE", 10**9):
            shared()

    return ratios(whole, shared)


def throughput(lm: LM, name: str) -> dict[str, dict[str, float]]:
    """Return measured over plain throughput, without and with a prefill adapter."""
    task = load_task("numbered-list")
    adapter = cv.load_adapter(f"builtin:numbered-list@{name}")
    rows = [encode(lm, text).ids for text in task.test.texts[:N]]
    padded = [pad(lm, [rows[i] for i in members]) for members in batches([len(row) for row in rows], BATCH)]

    def plain() -> None:
        for batch in padded:
            with torch.inference_mode(), own_pass(lm):
                lm.model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=greedy(lm, task.max_new_tokens),
                )

    def attached() -> None:
        with cv.attach(lm, adapter):
            plain()

    arms: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "unmodified": (plain, lambda: cv.measure(lm, task, limit=N, batch_size=BATCH)),
        # An adapter changes how long answers get, so it is attached on both sides.
        "with an adapter": (attached, lambda: cv.measure(lm, task, adapter, limit=N, batch_size=BATCH)),
    }
    return {arm: ratios(*works) for arm, works in arms.items()}


def main() -> None:
    result: dict[str, dict[str, dict[str, float]]] = {}
    saved: dict[str, dict[str, float]] = {}
    for name in ("smollm2-135m-instruct", "gemma-3-270m"):
        lm = cv.load_model(name)
        result[name], saved[name] = throughput(lm, name), profiling(lm)
    RESULTS.write_text(json.dumps({"measure": result, "profile": saved}, indent=1) + "\n")
    TABLE.write_text(page())
    print(page())


def page() -> str:
    """Return the page, from the results."""
    result, saved = json.loads(RESULTS.read_text("utf-8")).values()
    lines = [
        "# What measuring adds to generating\n",
        f"Written by `python -m benchmarks.overhead`: throughput of `measure` over plain `generate`, {N} prompts, "
        f"batch {BATCH}, {TURNS} turns; target at least {TARGET}. `measure` runs what all prompts begin with once, "
        "plain `generate` runs every prompt whole.\n",
        "| model | | median | least | greatest | |",
        "|---|---|---|---|---|---|",
    ]
    for name, arms in result.items():
        for arm, one in arms.items():
            verdict = "met" if one["median"] >= TARGET else "**not met**"
            lines.append(f"| {name} | {arm} | {one['median']:.2f} | {one['min']:.2f} | {one['max']:.2f} | {verdict} |")
    lines += [
        "\n## What a shared beginning saves in a profile\n",
        f"Time of a profile of {PROFILED} prompts run whole, over the time with their beginning run once.\n",
        "| model | median | least | greatest |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {one['median']:.2f} | {one['min']:.2f} | {one['max']:.2f} |" for name, one in saved.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
