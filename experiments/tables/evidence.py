"""Measure again what is stale of the studies behind README and docs, then make the tables; says the hours first.

    python -m experiments.tables.evidence               # all studies on the packaged models and organisms made of them
    python -m experiments.tables.evidence packaged      # some
    python -m experiments.tables.evidence --dry-run     # only the hours

A cell is stale when anything that decides it has changed: models, prompts, settings, versions of the code. What is cut
off goes on where it was; arms whose answers are kept are only graded anew. Hours are those of the whole work, from the
speed of this machine: kept answers and adapters make them fewer.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pydantic

from commandv.evaluation.study import Study, load_study, plan, run_study, unfinished
from experiments.organisms.make import MODELS, OUT, make
from experiments.organisms.tasks import TASKS
from experiments.tables.figures import made, whole, write
from experiments.tables.pages import ROOT, RUNS

FOLDERS = ("small", "steering", "family")


class Work(pydantic.BaseModel):
    """What is stale of a study."""

    study: str
    stale: int
    cells: int
    hours: float | None


def studies() -> dict[str, Path]:
    """Return the files of the studies that can be run on the packaged models."""
    return {file.stem: file for folder in FOLDERS for file in sorted((ROOT / "studies" / folder).glob("*.yaml"))}


def lacking(model: str) -> bool:
    """Tell whether a model is a file of a family that was not fetched."""
    return Path(model).suffix == ".gguf" and not Path(model).exists()


def work(study: Study, run: Path) -> Work:
    """Count what is stale; where an organism is not made yet, all of its cells are, at the speed of its base model."""
    stale = unfinished(study, run, tasks=TASKS)
    bases = {
        name: spec.model_copy(update={"id": MODELS[Path(spec.id).name].id})
        if Path(spec.id).parent == OUT and not Path(spec.id).exists()
        else spec
        for name, spec in study.models.items()
    }
    like = study.model_copy(update={"models": bases})
    seconds = plan(like, tasks=TASKS, cells=stale).seconds if stale else 0.0
    return Work(study=study.name, stale=len(stale), cells=len(study.cells()), hours=seconds and seconds / 3600)


def main() -> None:
    """Tell the hours; run; make the tables."""
    known = studies()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=", ".join(known))
    parser.add_argument("--dry-run", action="store_true", help="only tell the hours")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("commandv").setLevel(logging.ERROR if options.dry_run else logging.INFO)
    chosen = {name: load_study(known[name]) for name in options.names or known}
    for name in [name for name, study in chosen.items() if any(lacking(spec.id) for spec in study.models.values())]:
        print(f"{name}: its models are not here; make family fetches them")
        del chosen[name]
    rows = [work(study, RUNS / name) for name, study in chosen.items()]
    for row in rows:
        hours = "hours unknown" if row.hours is None else f"{row.hours:.2f} h"
        print(f"{row.study:<20} {row.stale:>3} of {row.cells:>3} cells stale, {hours}")
    print(f"{'all':<20} {sum(row.stale for row in rows):>3} cells, {sum(row.hours or 0 for row in rows):.1f} h at most")
    if options.dry_run:
        return
    for study, row in zip(chosen.values(), rows, strict=True):
        if row.stale:
            make(Path(spec.id).name for spec in study.models.values() if Path(spec.id).parent == OUT)
            run = run_study(study, RUNS / study.name, tasks=TASKS)
            for file in (RUNS / study.name / "cells").glob("*.json"):
                if file.stem not in run.plan:  # of other settings, or older code
                    file.unlink()
    print("\n".join(write(made(whole()))) or "every figure is what the committed labels give")


if __name__ == "__main__":
    main()
