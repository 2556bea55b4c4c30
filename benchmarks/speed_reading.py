"""What reading directions adds to running a model: `steering.directions` against the model's blocks alone.

    python -m benchmarks.speed_reading     # writes results/speed_reading.json and ../docs/benchmarks/reading.md

512 pairs of prompts, every layer's difference in means in one pass. Both arms run the same batches with the same
padding, none computes logits, and they take turns; figures are ratios within one turn. The plain arm gets its batches
tokenised and padded in advance: what it leaves out is counted as overhead. Ratios of processor time stand beside those
of wall time, because other work on the machine changes them less.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import commandv as cv
from commandv.models.encoding import encode, pad_replies, run_blocks
from commandv.models.generation import batches
from commandv.models.lm import LM
from commandv.steering import Contrast, directions

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "speed_reading.json"
TABLE = ROOT.parent / "docs" / "benchmarks" / "reading.md"
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
PAIRS, BATCH, TURNS = 512, 16, 3
TARGET = 0.9
POSITIONS = {"l1": "last prompt token", "all": "every token"}


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return (wall, processor) seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def peak() -> int:
    """Return the process's peak memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(lm: LM) -> dict[str, dict[str, float]]:
    """Return plain over reading time per kind of positions, and what 512 pairs take in memory beyond 64."""
    prompts = cv.load_prompts("builtin:general")
    contrast = Contrast(prompts[:PAIRS], prompts[PAIRS : 2 * PAIRS])
    few = Contrast(contrast.positive[: PAIRS // 8], contrast.negative[: PAIRS // 8])
    encoded = [encode(lm, one.text) for side in (contrast.positive, contrast.negative) for one in side]
    order = batches([len(one.ids) for one in encoded], BATCH)
    padded = [pad_replies(lm, [encoded[i] for i in members])[0] for members in order]

    def plain() -> None:
        with torch.inference_mode():
            for batch in padded:
                run_blocks(lm, batch)

    def read(positions: str) -> Callable[[], object]:
        return lambda: directions(lm, contrast, "caa", positions, batch_size=BATCH)

    longest = contrast.positive.prompts + contrast.negative.prompts
    longest = tuple(sorted(longest, key=lambda one: -len(encode(lm, one.text).ids)))[:BATCH]
    both = cv.PromptSet(longest)
    directions(lm, Contrast(both, both[::-1]), "caa", "all", batch_size=BATCH)  # the largest batch there is
    directions(lm, few, "caa", "all", batch_size=BATCH)
    before = peak()
    arms = {"plain": plain, **{positions: read(positions) for positions in POSITIONS}}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for turn in range(TURNS):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            taken[name].append(seconds(arms[name]))
    found = {}
    for positions in POSITIONS:
        ratios = [
            [one[kind] / other[kind] for one, other in zip(taken["plain"], taken[positions], strict=True)]
            for kind in (0, 1)
        ]
        found[positions] = {
            "wall": statistics.median(ratios[0]), "least": min(ratios[0]), "greatest": max(ratios[0]),
            "processor": statistics.median(ratios[1]), "more MiB": peak() - before,
        }  # fmt: skip
    return found


def main() -> None:
    result = {name: measure(cv.load_model(name)) for name in MODELS}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    TABLE.write_text(page())
    print(page())


def page() -> str:
    """Return the page, from the results."""
    result = json.loads(RESULTS.read_text("utf-8"))
    lines = [
        "# What reading directions adds to running the model\n",
        f"Written by `python -m benchmarks.speed_reading`: throughput of `steering.directions` (difference in means, "
        f"every layer, {PAIRS} pairs, batch {BATCH}) over running the same padded batches through the blocks alone, "
        f"without logits in either; {TURNS} turns; target at least {TARGET}. The last column is what {PAIRS} pairs add "
        f"to the peak memory that {PAIRS // 8} pairs had reached.\n",
        "| model | tokens read | median | least | greatest | processor time | | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, kinds in result.items():
        for positions, one in kinds.items():
            verdict = "met" if one["wall"] >= TARGET else "**not met**"
            lines.append(
                f"| {name} | {POSITIONS[positions]} | {one['wall']:.2f} | {one['least']:.2f} | {one['greatest']:.2f} | "
                f"{one['processor']:.2f} | {verdict} | {one['more MiB']} MiB |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
