"""Several adapters on one model: what each still does beside the others, and what it does to their behaviours.

`python -m benchmarks.several` measures the rows that `benchmarks/results/several.jsonl` does not have yet, and writes
`docs/benchmarks/several.md` from it; `--page` only writes. Three adapters trained on each model, and the same
behaviours carried by context from the other packaged model; nothing is chosen on the test prompts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import commandv as cv
from commandv.evaluation import load_task, rate
from commandv.evaluation.graders import refusal
from commandv.evaluation.outcomes import judged
from commandv.storage.files import cache_dir

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "several.jsonl", HERE.parent / "docs" / "benchmarks" / "several.md"
KEPT = cache_dir() / "several"
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
TASKS = {"list": "numbered-list", "pirate": "pirate-opening", "refusal": "refusal"}
WAYS = ("native", "context")
TESTED, ASKED, SEED = 64, 128, 0


class Row(NamedTuple):
    """Adapters on a model, in the order in which they act, each at one scale."""

    model: str
    way: str
    names: tuple[str, ...]
    scale: float = 1.0

    def __str__(self) -> str:
        return (" + ".join(self.names) or "none") + (f", each at {self.scale:g}" if self.scale != 1 else "")


SETS = [(), ("list",), ("pirate",), ("refusal",), ("list", "pirate"), ("pirate", "list"), ("list", "refusal"),
        ("pirate", "refusal"), ("list", "pirate", "refusal")]  # fmt: skip
ROWS = [Row(model, way, names, scale)
        for way in WAYS for model in MODELS for names in SETS
        for scale in ((1.0, 0.6) if names == ("list", "pirate") else (1.0,))]  # fmt: skip


@functools.cache
def model(name: str) -> cv.LM:
    """Return a model, loaded once."""
    return cv.load_model(name)


@functools.cache
def native(name: str, behaviour: str) -> cv.Adapter:
    """Return an adapter trained on the model: two are shipped."""
    if behaviour != "refusal":
        return cv.load_adapter(f"builtin:{behaviour_set(behaviour)}@{name}")
    place = KEPT / f"{behaviour}@{name}"
    if not place.exists():
        kind, settings = cv.DiReFT(layers="every_other"), cv.TrainSettings(epochs=4, max_response=8, seed=SEED)
        cv.save(cv.train(model(name), cv.load_prompts("builtin:refusal"), kind, settings, name=behaviour), place)
    return cv.load_adapter(str(place))


@functools.cache
def carried(name: str, behaviour: str) -> cv.Adapter:
    """Return the other model's adapter, carried by context."""
    place, donor = KEPT / f"{behaviour}-into-{name}", next(one for one in MODELS if one != name)
    if not place.exists():
        asked = cv.load_prompts(f"builtin:{behaviour_set(behaviour)}")
        harmful = {one.text for one in asked if one.category == "harmful"}
        shown = cv.demonstrate(
            model(donor), native(donor, behaviour), asked[:ASKED],
            keep=lambda prompt, answer: prompt not in harmful or refusal(answer),
        )  # fmt: skip
        cv.save(cv.distil(model(name), shown, by="context", seed=SEED), place)
    return cv.load_adapter(str(place))


def behaviour_set(behaviour: str) -> str:
    """Return the name of the prompts that a behaviour's donor was trained on."""
    return TASKS[behaviour].removesuffix("-opening")


def measured(row: Row) -> dict[str, Any]:
    """Return labels by task, 1 where the behaviour shows, and loops."""
    lm, made = model(row.model), native if row.way == "native" else carried
    labels, loops = {}, {}
    for name, wanted in TASKS.items():
        task = load_task(wanted)
        with contextlib.ExitStack() as attached:
            for one in row.names:
                attached.enter_context(cv.attach(lm, made(row.model, one), scale=row.scale))
            answers = cv.generate(lm, task.test.texts[:TESTED], max_new_tokens=task.max_new_tokens, batch_size=TESTED)
        found = judged(task, answers, arm=str(row))
        labels[name] = "".join(str(int(bool(label) == (task.success == "more"))) for label in found.labels)
        loops[name] = "".join(str(int(one)) for one in found.loops)
    return {"labels": labels, "loops": loops}


def run() -> None:
    """Measure what is not in the results yet."""
    done = rows()
    for row in ROWS:
        if row not in done:
            with RESULTS.open("a") as file:
                file.write(json.dumps({"row": row, **measured(row)}) + "\n")
            print(*row, flush=True)
    PAGE.write_text(page())


def rows() -> dict[Row, dict[str, Any]]:
    """Return what was measured."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    found = {}
    for content in map(json.loads, lines):
        name, way, names, scale = content["row"]
        found[Row(name, way, tuple(names), scale)] = content
    return found


def page() -> str:
    """Return the page."""
    found, lines = rows(), [INTRODUCTION]
    for name in MODELS:
        for way in WAYS:
            table = [(row, found[row]) for row in ROWS if row[:2] == (name, way) and row in found]
            if table:
                lines += ["", f"## {name}: {TITLES[way]}", "", "| attached | " + " | ".join(COLUMNS) + " |",
                          "|" + "---|" * (1 + len(COLUMNS))]  # fmt: skip
                lines += [f"| {row} | {_cells(one)} |" for row, one in table]
    return "\n".join(lines) + "\n"


def _cells(one: dict[str, Any]) -> str:
    return " | ".join([*(_share(bits) for bits in one["labels"].values()), _share(one["loops"]["list"])])


def _share(bits: str) -> str:
    one = rate("", [bit == "1" for bit in bits])
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]".replace("0.", ".")


COLUMNS = ("list", "pirate's opening", "harmful requests refused", "loops")
TITLES = {"native": "adapters of its own", "context": "carried by context from the other model"}
INTRODUCTION = f"""# Several adapters at once

What each adapter does beside the others, on {TESTED} test prompts of each task, strict graders, greedy, one seed; 95 %
intervals over prompts; loops are counted on the list's prompts. Adapters are attached in the order of the row, each
reads the stream that the earlier ones have changed, and all are at full scale unless the row says so. The list and
the pirate are the shipped adapters (last half of the layers, the last prompt token), the refusal is a DiReFT trained
like the studies' (every other layer), so that all share layers. By context every behaviour comes from the other
model's adapter, demonstrated on {ASKED} of the prompts that it was trained on. Made by `python -m
benchmarks.several`."""


if __name__ == "__main__":
    if "--page" in sys.argv:
        PAGE.write_text(page())
    else:
        run()
