"""What pasting costs: time, memory, accuracy and the hook, beside the published computation on the same machine.

    python -m benchmarks.speed            # everything; writes results/speed.json and ../docs/benchmarks/speed.md
    python -m benchmarks.speed --quick    # a few layer pairs, once, smaller batches; writes nothing
    python -m benchmarks.speed --report   # the table again, from results/speed.json

Every part runs in a process of its own. The methods of one shape take turns, and figures are medians of ratios within
one turn, so that another job on the machine slows both sides alike.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import speed_hook, speed_paste
from benchmarks.speed_paste import CELLS, Cell

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "speed.json"
TABLE = ROOT.parent / "docs" / "benchmarks" / "speed.md"
LIBRARIES = ("torch", "numpy", "scipy", "transformers")


# -- running ----------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Facts of the machine that bear on speed; nothing that names it."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def apart(*arguments: str) -> Any:
    """Run one part of this benchmark in a fresh process and return its result."""
    command = [sys.executable, "-m", "benchmarks.speed", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(quick: bool) -> dict[str, Any]:
    flags = ["--quick"] if quick else []
    result: dict[str, Any] = {"machine": machine(), "cells": {}}
    for name, cell in CELLS.items():
        cell = cell.quick() if quick else cell
        print(f"{name}: writing {2 * cell.pairs} profile layers", flush=True)
        with tempfile.TemporaryDirectory(prefix="commandv-speed-") as folder:
            speed_paste.write_profiles(cell, Path(folder))
            print(f"{name}: timing", flush=True)
            timed = apart("--part", "times", "--cell", name, "--folder", folder, *flags)
            peaks = {
                method: apart("--part", "memory", "--cell", name, "--folder", folder, "--method", method, *flags)
                for method in speed_paste.PASTES
            }
        result["cells"][name] = {**timed, "peak_bytes": peaks}
    print("accuracy", flush=True)
    result["accuracy"] = apart("--part", "accuracy", *flags)
    print("hook", flush=True)
    result["hook"] = apart("--part", "hook", *flags)
    return result


def part(options: argparse.Namespace) -> Any:
    """Do one part, in the process that was started for it."""
    if options.part == "accuracy":
        return speed_paste.accuracy()
    if options.part == "hook":
        return speed_hook.measure(quick=options.quick)
    cell: Cell = CELLS[options.cell].quick() if options.quick else CELLS[options.cell]
    if options.part == "memory":
        return speed_paste.peak_memory(cell, options.folder, options.method)
    return speed_paste.times(cell, options.folder)


# -- the table --------------------------------------------------------------------------------------------------------


def verdict(value: float, target: float, *, at_least: bool) -> str:
    met = value >= target if at_least else value <= target
    return "met" if met else "**not met**"


def faster(cell: dict[str, Any], method: str, target: float | None) -> tuple[str, str, str]:
    """(figure, target, verdict) of a speed-up over the published computation."""
    value = cell["speedup"][method]
    spread = f"{value['median']:.1f}x ({value['min']:.1f} to {value['max']:.1f})"
    if target is None:
        return spread, "", ""
    return spread, f">= {target:g}x", verdict(value["median"], target, at_least=True)


def cell_rows(name: str, cell: dict[str, Any]) -> list[tuple[str, ...]]:
    aims = CELLS[name].targets
    rows = [
        ("folded exact, over published", *faster(cell, "exact", aims["exact"])),
        ("ridge, strength by leave-one-out, over published", *faster(cell, "ridge", aims["ridge"])),
        ("ridge, strength by GCV, over published", *faster(cell, "ridge gcv", aims["ridge"])),
        ("second adapter, exact, over published", *faster(cell, "second, exact", aims["second"])),
        ("second adapter, ridge, over published", *faster(cell, "second, ridge", aims["second"])),
    ]
    bound = cell["over_bound"]["exact"]
    figure = f"{bound['median']:.2f} ({bound['min']:.2f} to {bound['max']:.2f})"
    rows.append(
        ("folded exact, in units of the two SYRKs", figure, "<= 1.35", verdict(bound["median"], 1.35, at_least=False))
    )
    kept = cell["retained_bytes"]
    rows.append(("kept: the pasted adapter", f"{kept / 1e6:.1f} MB", "<= 4 MB", verdict(kept, 4e6, at_least=False)))
    rows.append(("kept as published: the converters", f"{cell['converter_bytes'] / 1e9:.2f} GB", "", ""))
    for method, peak in cell["peak_bytes"].items():
        what = f"peak memory above the mapped profiles, {method}"
        rows.append((what, f"{peak / 1e6:.0f} MB", "< 150 MB", verdict(peak, 150e6, at_least=False)))
    return rows


def hook_rows(hook: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for one in hook["prefill"]:
        share, published = one["share_percent"], one["published_us"] / one["block_us"] * 100
        rows.append(
            (
                f"{one['dtype']}, batch {one['batch']}",
                f"{one['block_us'] / 1e3:.1f} ms",
                f"{one['hook_us']:.0f} + {one['owner_us']:.0f} µs",
                f"{share:.3f} %",
                "<= .05 %",
                verdict(share, 0.05, at_least=False),
                f"{one['published_us'] / 1e3:.2f} ms ({published:.1f} %)",
            )
        )
    return rows


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def report(result: dict[str, Any]) -> str:
    facts = result["machine"]
    versions = ", ".join(f"{name} {facts[name]}" for name in LIBRARIES)
    out = [
        "# Speed\n",
        f"Generated by `benchmarks/speed.py` on {facts['cores']} cores ({facts['cpu']}; Python {facts['python']}, "
        f"{versions}). Figures are medians of ratios within one turn, with the least and the greatest; other jobs "
        "share the machine.\n",
        "*Published*: float32 `torch.linalg.pinv` of X and of Y, both converters materialised, training loss computed; "
        "once with all cores on one pair after another and once with a core for each pair, and the faster of the two "
        "in each turn is what others are measured against. *Two SYRKs*: X Xᵀ and Y Yᵀ in float64 from arrays in "
        "memory, one BLAS thread, parallel over "
        "pairs. Everything else is from disk: profiles opened, read, converters solved, adapter of rank 8 folded.\n",
    ]
    for name, cell in result["cells"].items():
        seconds = ", ".join(f"{method} {value['median']:.2f}" for method, value in cell["seconds"].items())
        note = f"{cell['pairs']} layer pairs, {cell['turns']} turns. Median seconds: {seconds}."
        if cell["published_pairs"] < cell["pairs"]:
            note += f" Published was run on {cell['published_pairs']} of the {cell['pairs']} pairs and scaled."
        rows = cell_rows(name, cell)
        out += [f"## {name}\n", note + "\n", table(("what", "measured", "target", ""), rows)]
    if "note" in result:
        out.append(result["note"] + "\n")
    rows = [
        (
            f"{float(condition):.0e}",
            f"{error['solved']:.1e}",
            "< 1e-6",
            verdict(error["solved"], 1e-6, at_least=False),
            f"{error['stored']:.1e}",
        )
        for condition, error in result["accuracy"].items()
    ]
    out += ["## Error of the folded action against a float64 SVD pseudo-inverse\n"]
    out += [table(("condition number", "as solved, float64", "target", "", "as stored, float32"), rows)]
    hook = result["hook"]
    head = ("128 tokens", "block", "hook + owner's hooks per layer", "share", "target", "", "published hook")
    decode = hook["decode"]
    out += [
        "## The hook at prefill\n",
        "One block of Llama-3.2-3B's shape, random weights; CPU time of one thread, taken around the hooks themselves: "
        "with two a block takes half as long, and the share is twice as large. What the hooks of "
        f"the blocks' owner do once per pass is spread over {hook['layers']} edited layers. The published hook loops "
        "over the batch and applies both converters of a 4096-wide donor.\n",
        table(head, hook_rows(hook)),
        f"At batch 1, in bfloat16, a hook that changes nothing costs {hook['floor']['nothing_us']:.0f} µs after such a "
        f"block, and one with a single call of PyTorch's {hook['floor']['one_call_us']:.0f} µs: by that a share of one "
        "in a thousand fails there, not by the arithmetic. At larger batches the block grows and the hook hardly does, "
        "because the stream is changed in place.\n",
        f"At a decode step: {decode['block_hooks']} hooks on blocks (target 0), and {decode['owner_us']:.0f} µs per "
        "pass, not per layer, in the hooks that find out that nothing is to be done.\n",
    ]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few layer pairs, once; prints the table only")
    parser.add_argument("--report", action="store_true", help="the table again, from the results")
    parser.add_argument("--part", choices=("times", "memory", "accuracy", "hook"), help=argparse.SUPPRESS)
    parser.add_argument("--cell", choices=tuple(CELLS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=tuple(speed_paste.PASTES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(part(options)))
        return
    result = json.loads(RESULTS.read_text()) if options.report else run(options.quick)
    text = report(result)
    print(text)
    if options.quick:
        return
    write: list[tuple[Path, Callable[[], str]]] = [
        (RESULTS, lambda: json.dumps(result, indent=2) + "\n"),
        (TABLE, lambda: text),
    ]
    for path, content in write:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content())


if __name__ == "__main__":
    main()
