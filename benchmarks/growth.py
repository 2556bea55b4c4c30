"""What carrying costs as work grows: rows, layers, adapters, recipients, measured; and a rehearsal at true width.

    python -m benchmarks.growth            # about two minutes; writes results/growth.json
    commandv rehearse studies/paper/refusal-enhancement.yaml --prompts 24 -o DIR    # DIR/rehearsal.json: results/

Profiles are synthetic, as those of `benchmarks.speed_paste`. One thread; every point is the median of some turns, in
which all points take their turn.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import speed_paste
from benchmarks.speed_paste import linked, open_profiles, random_adapter, where, write_profiles

RESULTS = Path(__file__).resolve().parent / "results"
GROWTH, REHEARSAL = RESULTS / "growth.json", RESULTS / "rehearsal.json"
WIDTH, ROWS, LAYERS, TURNS = 768, 768, 4, 3
POINTS: dict[str, tuple[int, ...]] = {
    "rows": (192, 384, 768, 1536, 3072),
    "layers": (1, 2, 4, 8, 16),
    "adapters": (1, 2, 4, 8, 16),
    "recipients": (1, 2, 4, 8),
}
FIT = speed_paste.PASTES["ridge"]


def cell(rows: int, pairs: int) -> Any:
    """Return a synthetic pair of profiles of so many rows and layers."""
    return speed_paste.Cell(rows, WIDTH, WIDTH, {}, pairs)


def work(what: str, number: int, folder: Path) -> Callable[[], Any]:
    """Return what is timed: `number` of rows, layers, adapters or recipients, all else as it stands."""
    size = {"rows": ROWS, "layers": LAYERS, "adapters": 1, "recipients": 1, what: number}
    place = folder / f"{what}-{number}"
    write_profiles(cell(size["rows"], size["layers"]), place)

    def run() -> None:
        for _ in range(size["recipients"]):
            link = linked(FIT, *open_profiles(place))
            for seed in range(1, size["adapters"]):
                link.paste(random_adapter(link.donor, seed), **where(link.donor))

    return run


def measured() -> dict[str, dict[str, float]]:
    """Return seconds by axis and number."""
    torch.set_num_threads(1)
    taken: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        works = {(axis, n): work(axis, n, Path(folder)) for axis, many in POINTS.items() for n in many}
        for _ in range(TURNS):
            for point, run in works.items():
                began = time.perf_counter()
                run()
                taken.setdefault(point, []).append(time.perf_counter() - began)
    return {axis: {str(n): round(statistics.median(taken[axis, n]), 4) for n in many} for axis, many in POINTS.items()}


def formula(axis: str, points: dict[str, float]) -> Callable[[int], float]:
    """Return seconds by number, with the constants of the least squares, in relative terms, over the points.

    Rows n of width d: a n k d + b k^3 with k = min(n, d). All else: a + b number.
    """
    numbers = [int(one) for one in points]
    seconds = torch.tensor(list(points.values()), dtype=torch.float64)

    def terms(n: int) -> list[float]:
        k = min(n, WIDTH)
        return [float(n * k * WIDTH), float(k) ** 3] if axis == "rows" else [1.0, float(n)]

    table = torch.tensor([terms(n) for n in numbers], dtype=torch.float64)
    scale = table.amax(0)
    found = torch.linalg.lstsq(table / scale / seconds[:, None], torch.ones(len(numbers), 1, dtype=torch.float64))
    a, b = (found.solution[:, 0] / scale).tolist()
    return lambda n: a * terms(n)[0] + b * terms(n)[1]


def page() -> str:
    """Return the page, from the results."""
    kept = json.loads(GROWTH.read_text("utf-8"))
    lines = [
        "# Cost as work grows\n",
        f"Written by `python -m benchmarks.growth` ({kept['versions']}, one thread; other jobs share the machine). Two "
        f"synthetic profiles of {ROWS:,} rows, {LAYERS} layers and width {WIDTH:,} are linked and one rank-8 adapter "
        "is pasted by ridge, its strength chosen for every layer; then one of the numbers changes. Medians of "
        f"{TURNS} turns, beside the formula with its two constants fitted to the points.\n",
        "With n rows, width d and k = min(n, d), a layer pair takes a n d k for the Gram matrices and b k³ for their "
        "reduction, both sides alike. Layer pairs add up. A further adapter goes through the fits that are there, and "
        "a further recipient needs its own: seconds = recipients x layers x (a n d k + b k³ + adapters x c n d).\n",
        "| what grows | | seconds | formula |",
        "| --- | --- | --- | --- |",
    ]
    for axis, points in kept["seconds"].items():
        told = formula(axis, points)
        lines += [f"| {axis} | {int(n):,} | {taken:.2f} | {told(int(n)):.2f} |" for n, taken in points.items()]
    lines += [
        "\nWith fewer rows than dimensions the formula is far too low: opening, reading and scaling the rows then take "
        "more than the products. A rehearsal with few prompts tells as little of a fit.",
        "\nBytes: a profile on disk takes 2 x rows x layers x width, a pasted adapter 8 x rank x width a layer.\n",
    ]
    return "\n".join(lines) + "\n" + rehearsal()


def rehearsal() -> str:
    """Return the part on the rehearsal."""
    kept = json.loads(REHEARSAL.read_text("utf-8"))
    models = "; ".join(
        f"{one['id']} ({one['layers'][0]} of {one['layers'][1]} layers of {one['d_model']:,}, "
        f"{one['parameters'][0] / 1e9:.2f} of {one['parameters'][1] / 1e9:.2f} billion parameters, {one['dtype']})"
        for one in kept["models"].values()
    )
    lines = [
        "## A rehearsal at true width\n",
        f"`commandv rehearse` on {kept['device']}, threads: {kept['threads']}, {kept['prompts']} prompts and as many "
        f"passages ({kept['rows']['end']} last-token rows, {kept['rows']['text']} text rows), random weights: "
        f"{models}; whole vocabularies, the tokenizer of {kept['tokenizer']}. The process took "
        f"{kept['most_memory'] / 1e9:.1f} GB at most. *Full depth* and *70B* (both models of width 8,192 with 80 "
        "layers) are extrapolated by the work of each stage ([formula](../cluster.md#before-the-weights-are-there)), "
        "for the same prompts. How far that can be trusted the two directions tell, which extrapolate to the same 70B "
        "pair from models of different size.\n",
    ]
    for pair, stages in kept["pairs"].items():
        lines += [
            f"### {pair}\n",
            "| stage | seconds | MB | full depth: seconds | MB | 70B: seconds | MB |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for one in stages:
            cells = [
                _told(one[f"{at}seconds"]) + " | " + _told(one[f"{at}bytes"], 1e6) for at in ("", "full_", "large_")
            ]
            lines.append(f"| {one['stage']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _told(value: float | None, unit: float = 1) -> str:
    if value is None:
        return ""
    return f"{value / unit:,.0f}" if value / unit >= 100 else f"{value / unit:.2g}"


def main() -> None:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    GROWTH.write_text(json.dumps({"versions": versions, "seconds": measured()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
