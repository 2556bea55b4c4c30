"""The pages that are made whole from what is committed: labels, figures per prompt, times that were taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    batching,
    cluster,
    coverage,
    graders,
    growth,
    judges,
    likeness,
    memory,
    mutation,
    overhead,
    several,
    speed,
    speed_reading,
    words,
)
from commandv.evaluation.report import markdown
from commandv.evaluation.results import load_run
from experiments.mapping import table as validation
from experiments.sae import features
from experiments.tables import claims, forecast, mappers, vectors

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "studies" / "results"


def _graders() -> str:
    data = graders.labelled()
    return graders.page(data, graders.measure(data))


def _kept(results: Path, page: Callable[[Any], str]) -> Callable[[], str]:
    return lambda: page(json.loads(results.read_text("utf-8")))


def _report(run: Path) -> Callable[[], str]:
    return lambda: markdown(load_run(run))


PAGES: dict[str, Callable[[], str]] = {
    "docs/benchmarks/batching.md": batching.page,
    "docs/benchmarks/claims.md": claims.page,
    "docs/benchmarks/cluster.md": cluster.page,
    "docs/benchmarks/forecast.md": forecast.page,
    "docs/benchmarks/coverage.md": _kept(coverage.RESULTS, coverage.page),
    "docs/benchmarks/graders.md": _graders,
    "docs/benchmarks/growth.md": growth.page,
    "docs/benchmarks/judges.md": _kept(judges.RESULTS, judges.page),
    "docs/benchmarks/likeness.md": _kept(likeness.RESULTS, likeness.page),
    "docs/benchmarks/mappers.md": _kept(mappers.RESULTS, mappers.report),
    "docs/benchmarks/memory.md": memory.page,
    "docs/benchmarks/mutation.md": mutation.page,
    "docs/benchmarks/overhead.md": overhead.page,
    "docs/benchmarks/reading.md": speed_reading.page,
    "docs/benchmarks/several.md": several.page,
    "docs/benchmarks/sae.md": _kept(features.RESULTS, features.report),
    "docs/benchmarks/speed.md": _kept(speed.RESULTS, speed.report),
    "docs/benchmarks/validation.md": _kept(validation.RESULTS, validation.report),
    "docs/benchmarks/vectors.md": _kept(vectors.RESULTS, vectors.page),
    "docs/benchmarks/words.md": words.page,
    "src/commandv/evaluation/data/forecast.json": forecast.coefficients,
    **{f"docs/studies/{run.name}/report.md": _report(run) for run in sorted(RUNS.iterdir())},
}
