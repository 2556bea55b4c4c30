"""The server under load: 64 clients at once, with and without behaviours, beside plain batched `generate`.

python benchmarks/serving.py            writes docs/benchmarks/serving.md
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import openai
import psutil
import torch

import commandv as cv
from commandv.models.encoding import encode, pad
from commandv.models.generation import greedy
from commandv.models.template import stop_tokens

MODEL = "smollm2-135m-instruct"
OUT = Path(__file__).parents[1] / "docs/benchmarks/serving.md"
CLIENTS = 64
# "all" acts at every token, on every layer; the shipped adapters act at prompts' ends.
MIXED = ("list", "pirate", "list@0.5", "pirate@0.6", "all", "all@0.5", "all+list", "pirate@0.8+all")
ARMS = {
    "server without adapters": ("base",),
    "one behaviour, at prompts' ends": ("base+list",),
    "one behaviour, at every token": ("base+all",),
    "eight behaviours, by turns": tuple(f"base+{one}" for one in MIXED),
}
PLAIN = "plain `generate`, one batch"


class Run(NamedTuple):
    tokens: int  # generated
    cpu: float  # seconds of the process that runs the model
    wall: float


@contextlib.contextmanager
def server(*adapters: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start `commandv serve` in a process of its own."""
    command = [sys.executable, "-m", "commandv.cli", "serve", MODEL, "--port", "0", "--dtype", "float32", "--json"]
    for one in adapters:
        command += ["--adapter", one]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            text += (line := process.stdout.readline())
            if not line:
                sys.exit("the server did not start")
        yield json.loads(text)["api"], psutil.Process(process.pid)
        process.terminate()


async def load(url: str, prompts: list[str], models: tuple[str, ...], n: int, stream: bool) -> int:
    """Ask everything at once; returns how many tokens came."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=None, max_retries=0) as client:

        async def ask(i: int) -> int:
            given = {
                "model": models[i % len(models)], "messages": [{"role": "user", "content": prompts[i]}],
                "max_tokens": n, "temperature": 0,
            }  # fmt: skip
            if not stream:
                return (await client.chat.completions.create(**given)).usage.completion_tokens
            pieces = await client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
            return [one.usage async for one in pieces][-1].completion_tokens

        return sum(await asyncio.gather(*(ask(i) for i in range(len(prompts)))))


def served(url: str, process: psutil.Process, prompts: list[str], models: tuple[str, ...], n: int, stream: bool) -> Run:
    before, begun = process.cpu_times(), time.perf_counter()
    tokens = asyncio.run(load(url, prompts, models, n, stream))
    after = process.cpu_times()
    return Run(tokens, after.user + after.system - before.user - before.system, time.perf_counter() - begun)


def plain(lm: cv.LM, prompts: list[str], n: int) -> Run:
    """Run the model's own `generate` over all prompts as one batch."""
    batch = pad(lm, [encode(lm, prompt).ids for prompt in prompts])
    begun, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        out = lm.model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=greedy(lm, n)
        )
    cpu, wall = time.process_time() - cpu, time.perf_counter() - begun
    ends, tokens = set(stop_tokens(lm)), 0
    for row in out[:, batch.input_ids.shape[1] :].tolist():
        tokens += next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return Run(tokens, cpu, wall)


def everywhere(lm: cv.LM, folder: Path) -> str:
    """Save an adapter that acts at every token of every layer, with hardly any effect."""
    generator = torch.Generator().manual_seed(0)

    def small(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 1e-3

    def one() -> cv.Intervention:
        where = cv.Positions.parse("all")
        return cv.Intervention(small(8, lm.d_model), small(8), small(8, lm.d_model), positions=where)

    return f"all={cv.save(cv.Adapter({layer: (one(),) for layer in range(lm.n_layers)}, lm.ref, 'all'), folder)}"


def measure(n: int, rounds: int) -> dict[str, list[Run]]:
    torch.set_num_threads(1)
    lm = cv.load_model(MODEL, dtype="float32")
    prompts = list(cv.load_prompts("builtin:general", limit=CLIENTS).texts)
    found: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        adapters = [
            f"{name}=builtin:{full}@{MODEL}" for name, full in (("list", "numbered-list"), ("pirate", "pirate"))
        ]
        without = stack.enter_context(server())
        with_adapters = stack.enter_context(server(*adapters, everywhere(lm, Path(folder) / "all")))
        for one in (without, with_adapters):
            served(*one, prompts[:4], ("base",), 2, False)  # first passes are slow
        for i in range(rounds):
            found.setdefault(PLAIN, []).append(plain(lm, prompts, n))
            for arm, models in ARMS.items():
                one = without if models == ("base",) else with_adapters
                found.setdefault(arm, []).append(served(*one, prompts, models, n, False))
            found.setdefault("server without adapters, streaming", []).append(
                served(*without, prompts, ("base",), n, True)
            )
            print(
                f"round {i + 1}",
                {arm: f"{runs[-1].tokens / runs[-1].cpu:.1f}" for arm, runs in found.items()},
                flush=True,
            )
    return found


def page(found: dict[str, list[Run]], n: int, rounds: int) -> str:
    def rate(arm: str) -> list[float]:
        return [run.tokens / run.cpu for run in found[arm]]

    def ratio(arm: str, other: str) -> str:
        values = [one / two for one, two in zip(rate(arm), rate(other), strict=True)]
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    base, plain_ = "server without adapters", PLAIN
    ends, every, mixed = list(ARMS)[1:]
    lines = [
        "# How fast is serving?",
        "",
        f"`benchmarks/serving.py`: {CLIENTS} clients of the official `openai` package ask at once, {n} tokens each, of",
        f"`commandv serve {MODEL}` in float32 on one thread of a CPU ({platform.machine()}), all in one batch;",
        f"plain `generate` reads the same prompts as one batch of {CLIENTS}. {rounds} rounds, the arms by turns. The",
        "machine was shared with other work, so that seconds are the processor time of the process that runs the",
        "model, server and tokenizer included; wall times say little. Ratios are taken within a round: median, lowest",
        "and highest.",
        "",
        "| | tokens a second | tokens |",
        "|---|---|---|",
        *(f"| {arm} | {statistics.median(rate(arm)):.0f} | {runs[-1].tokens} |" for arm, runs in found.items()),
        "",
        "| Throughput of | against | ratio | wanted |",
        "|---|---|---|---|",
        f"| {ends} | {base} | {ratio(ends, base)} | .85 |",
        f"| {every} | {base} | {ratio(every, base)} | .85 |",
        f"| {mixed} | {base} | {ratio(mixed, base)} | .85 |",
        f"| {mixed} | {every} | {ratio(mixed, every)} | .95 |",
        f"| {base} | {plain_} | {ratio(base, plain_)} | .90 |",
        f"| {base}, streaming | {plain_} | {ratio(base + ', streaming', plain_)} | .90 |",
        "",
        f"The behaviours by turns are {', '.join(f'`{one}`' for one in MIXED)},",
        "of two shipped adapters that act at prompts' ends and one of rank 8 that acts at every token of every layer.",
        "",
        "The server is ahead of plain `generate` because it reads prompts in groups of similar length, where one batch",
        "pads all of them to the longest; answers are short, so that reading prompts is most of the work. Steps of",
        "generation alone are not compared here.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    OUT.write_text(page(measure(chosen.tokens, chosen.rounds), chosen.tokens, chosen.rounds), "utf-8")
