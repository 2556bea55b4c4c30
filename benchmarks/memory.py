"""Peak memory of a profile and of a paste as rows and layers grow.

    python -m benchmarks.memory            # all sizes; writes results/memory.json and ../docs/benchmarks/memory.md
    python -m benchmarks.memory --quick    # small sizes, prints only

A model of random weights has the true width and depth, and next to no heads and hidden units, so that its rows are as
large as a real model's and its passes cost little. Every stage runs in a process of its own, whose greatest resident
set the system tells (`ru_maxrss`): Python, torch and the model are in it, and so are the pages of mapped files that
were in memory. A thread watches what of it is the process's own (`RssAnon`).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import commandv as cv
from commandv.models.lm import LM
from commandv.profiles.profile import load_profile
from commandv.prompts.sets import Prompt, PromptSet

ROOT = Path(__file__).resolve().parent
RESULTS, TABLE = ROOT / "results" / "memory.json", ROOT.parent / "docs" / "benchmarks" / "memory.md"
SIZES = ((5_000, 8, 4096), (5_000, 32, 4096), (20_000, 32, 4096))
QUICK = ((600, 4, 256), (600, 8, 256))
PER_TEXT, PAIRS, TARGET = 20, 4, 2e9
WORDS = [
    "window",
    "door",
    "book",
    "letter",
    "river",
    "tea",
    "leaves",
    "water",
    "dog",
    "cat",
    "tree",
    "garden",
    "city",
    "name",
    "planet",
    "answer",
]


def model(layers: int, width: int, seed: int) -> LM:
    """Return random weights of this depth and width, with one small head and few hidden units."""
    sys.path.insert(0, str(ROOT.parent / "tests" / "support"))
    import tiny

    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=tiny.VOCAB,
        max_position_embeddings=512,
    )
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return cv.wrap_model(made, tiny.tiny_tokenizer(), f"random-{seed}")


def texts(rows: int) -> PromptSet:
    """Return passages of `PER_TEXT` words, which give a row at the end of each word but the last prompt token's."""
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(WORDS), (rows // PER_TEXT, PER_TEXT - 1), generator=generator)
    return PromptSet(tuple(Prompt(f"{n}", " ".join(WORDS[i] for i in row)) for n, row in enumerate(picked.tolist())))


def stage(what: str, rows: int, layers: int, width: int, folder: Path) -> dict[str, Any]:
    """Run one stage in this process and return its figures."""
    torch.set_num_threads(1)
    peak, ended = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, ended))
    watcher.start()
    began = time.perf_counter()
    if what == "paste":
        donor, recipient = (load_profile(folder / name) for name in ("donor", "recipient"))
        n = len(donor)
        adapter = _adapter(donor)
        cv.paste(adapter, donor, recipient, layers="all_layers")
    else:
        lm = model(layers, width, seed=len(what))
        passages = texts(rows)
        made = cv.profile(lm, ["Begin."], text=passages, places="words", rows_per_text=PER_TEXT, cache=folder / what)
        n = len(made)
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": n, "seconds": round(seconds, 1), "peak": most, "own": peak[0]}


def _adapter(donor: cv.Profile) -> cv.Adapter:
    """Return a rank-8 adapter on `PAIRS` layers of the donor, spread over its depth."""
    layers = [donor.n_layers * (2 * i + 1) // (2 * PAIRS) for i in range(PAIRS)]
    generator = torch.Generator().manual_seed(1)
    edits = {
        layer: (
            cv.Intervention(
                torch.randn(8, donor.d_model, generator=generator),
                torch.zeros(8),
                torch.randn(8, donor.d_model, generator=generator),
            ),
        )
        for layer in layers
    }
    return cv.Adapter(edits, donor.model, "random")


def _watch(peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.05):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], 1024 * int(line.split()[1]))


def measured(sizes: tuple[tuple[int, int, int], ...]) -> list[dict[str, Any]]:
    """Run every stage of every size in a process of its own."""
    found = []
    for rows, layers, width in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for what in ("donor", "recipient", "paste"):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.memory",
                    "--stage",
                    what,
                    str(rows),
                    str(layers),
                    str(width),
                    folder,
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT.parent)
                one = {"stage": what, "layers": layers, "width": width, **json.loads(done.stdout.splitlines()[-1])}
                found.append(one)
                print(one, flush=True)
    return found


def page() -> str:
    """Return the page, from the results."""
    kept = json.loads(RESULTS.read_text("utf-8"))
    found, versions = kept["stages"], kept["versions"]
    lines = [
        "# Peak memory as rows and layers grow\n",
        f"Written by `python -m benchmarks.memory` ({versions}, one thread; other jobs share the machine, which the "
        "seconds show). A model of random weights of this width "
        "and depth is profiled, twice with different weights; then a rank-8 adapter of "
        f"{PAIRS} layers is pasted from one profile into the other by the default ridge, its strength chosen. Each "
        f"stage has a process of its own. *Peak* is its greatest resident set as the system counts it, with Python, "
        "torch, the model and mapped pages; *own* is the part that is no file's. Target: at most "
        f"{TARGET / 1e9:.0f} GB.\n",
        "| rows | layers | width | rows on disk | stage | peak | own | seconds | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        name = "paste, both profiles" if one["stage"] == "paste" else "profile"
        if one["stage"] == "recipient":
            continue
        disk = 2 * one["rows"] * one["layers"] * one["width"]
        verdict = "met" if one["peak"] <= TARGET else "**not met**"
        lines.append(
            f"| {one['rows']:,} | {one['layers']} | {one['width']:,} | {disk / 1e9:.2f} GB | {name} | "
            f"{one['peak'] / 1e9:.2f} GB | {one['own'] / 1e9:.2f} GB | {one['seconds']:.0f} | {verdict} |"
        )
    lines += [
        "\nWith n rows of widths d and e, k = min(n, d), a profile takes what the model takes, one batch, and two "
        "copies of one layer (one that is joined, one as the file's bytes), 4 n d bytes. A pair's fit takes "
        "2 n (d + e) bytes for the rows and 12 k² for the Gram matrix in float32 and float64; pairs are fitted "
        "side by side as long as that stays under 1 GiB together. Neither grows with the number of layers.",
    ]
    if kept["remark"]:
        lines.append(f"\n{kept['remark']}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stage", nargs=5, metavar=("STAGE", "ROWS", "LAYERS", "WIDTH", "FOLDER"))
    given = parser.parse_args()
    if given.stage:
        what, *numbers, folder = given.stage
        print(json.dumps(stage(what, *map(int, numbers), Path(folder))))
        return
    found = measured(QUICK if given.quick else SIZES)
    if not given.quick:
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        RESULTS.write_text(json.dumps({"versions": versions, "remark": "", "stages": found}, indent=1) + "\n")
        TABLE.write_text(page())


if __name__ == "__main__":
    main()
