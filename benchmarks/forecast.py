"""Will it arrive? Real attempts at carrying a behaviour, each with what a forecast reads before a token is generated.

`python -m benchmarks.forecast` measures the cells that `benchmarks/results/forecast.jsonl` does not have yet
(`--seconds N` begins none later). `make tables` makes `docs/benchmarks/forecast.md`, and the coefficients that
`commandv predict` applies, from it.

A cell is (donor, recipient, behaviour, donor's adapter, way of carrying). None is broken on purpose: the ways are those
that a user would try. Two rules were fixed before any result was seen:

- An attempt counts only where the donor has the behaviour: its strict rate with its adapter is above its own without,
  the paired 95 % interval leaving out 0.
- A behaviour *arrives* where the recipient's strict rate with the adapter is above its own without, the paired 95 %
  interval leaving out 0, and the gain is at least half of the donor's own on the same prompts.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import commandv as cv
from benchmarks import words
from commandv.evaluation import Task, load_task, measure
from commandv.evaluation.forecast import evidence
from commandv.evaluation.outcomes import answered, judged
from commandv.prompts.sets import Prompt, PromptSet
from commandv.storage.files import cache_dir
from commandv.training.train import DiReFT, TrainSettings, train
from commandv.transfer.distil.context import Context
from commandv.transfer.distil.vocabulary import Vocabulary
from experiments.organisms.siblings import damaged, dropped, rotated

RESULTS = Path(__file__).parent / "results" / "forecast.jsonl"
KEPT = cache_dir() / "forecast"  # donors' adapters and demonstrations, which cells share
SMOLLM, GEMMA, QWEN = "smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct"
QWEN_FILE = cache_dir() / "family" / f"{QWEN}-q4_k_m.gguf"  # of `make family`
ASKED, PROFILED, TESTED, SEED = 24, 160, 32, 0
LONG = DiReFT(rank=8, layers="last_half", positions="l1+g48")  # acts along the whole answer
SETTINGS = TrainSettings(epochs=3, batch_size=8, max_response=24, seed=SEED)
EXAMPLES = 64
LESS = (4, 17, 25)  # the blocks that SmolLM2 misses least


# -- models and behaviours --------------------------------------------------------------------------------------------

RECIPIENTS = {  # the family decides what is left out together
    GEMMA: "Gemma",
    "gemma-noisy": "Gemma",
    SMOLLM: "SmolLM2",
    "smollm2-noisy": "SmolLM2",
    "smollm2-pruned": "SmolLM2",
    "smollm2-shorter": "SmolLM2",
    QWEN: "Qwen",
}
DONORS = (SMOLLM, GEMMA)


@functools.cache
def model(name: str) -> cv.LM:
    """Load a model, or make a sibling; seeds are fixed, so that one is always the same."""
    if name == QWEN:
        return cv.load_model(str(QWEN_FILE))
    if name in DONORS:
        return cv.load_model(name)
    lm = cv.load_model(GEMMA if name.startswith("gemma") else SMOLLM)
    if name == "gemma-noisy":
        return damaged(lm, 0.05)
    if name != "smollm2-noisy":
        lm = dropped(lm, LESS)
    lm = rotated(lm, 792)
    return lm if name == "smollm2-pruned" else damaged(lm, 0.05)


@dataclass(frozen=True)
class Behaviour:
    """What is carried.

    Attributes:
        task: with a strict grader.
        examples: that a donor's adapter is trained on.
    """

    task: Task
    examples: PromptSet


def _rewritten(source: str, change: Any) -> PromptSet:
    kept = [one for one in cv.load_prompts(source) if one.response and one.category in ("", "harmless")]
    return PromptSet(tuple(Prompt(one.text, change(one.response)) for one in kept[:EXAMPLES]), source)


@functools.cache
def behaviours() -> dict[str, Behaviour]:
    """Return the behaviours by name."""
    return {
        "numbered-list": Behaviour(
            load_task("numbered-list"), cv.load_prompts("builtin:numbered-list", limit=EXAMPLES)
        ),
        "pirate": Behaviour(load_task("pirate-opening"), cv.load_prompts("builtin:pirate", limit=EXAMPLES)),
        "certainly": Behaviour(load_task("opening"), _rewritten("builtin:refusal", lambda text: f"Certainly! {text}")),
        "capitals": Behaviour(load_task("capitals"), _rewritten("builtin:refusal", str.upper)),
    }


ADAPTERS = {  # of donors: (behaviour, kind), those first that exist already
    SMOLLM: (
        ("numbered-list", "long"),
        ("pirate", "shipped"),
        ("pirate", "long"),
        ("numbered-list", "shipped"),
        ("capitals", "long"),
        ("certainly", "long"),
    ),
    GEMMA: (("pirate", "shipped"), ("numbered-list", "shipped"), ("capitals", "long"), ("certainly", "long")),
}


def adapter_of(donor: str, behaviour: str, kind: str) -> cv.Adapter:
    """Return a donor's adapter: "shipped" acts at the last prompt token, "long" along the answer."""
    if kind == "shipped":
        return cv.load_adapter(f"builtin:{behaviour}@{donor}")
    if behaviour in words.BEHAVIOURS:
        words.prepare(donor, behaviour)
        return cv.load_adapter(str(words.KEPT / f"{behaviour}@{donor}"))
    path = KEPT / f"{behaviour}@{donor}"
    if not path.exists():
        cv.save(train(model(donor), behaviours()[behaviour].examples, LONG, SETTINGS, name=behaviour), path)
    return cv.load_adapter(str(path))


@functools.cache
def shown_by(donor: str, behaviour: str, kind: str) -> cv.Demonstrations:
    """Return the donor's demonstrations."""
    path = KEPT / f"{behaviour}-{kind}@{donor}-shown"
    if not path.exists():
        asked = cv.load_prompts("builtin:general", limit=ASKED)
        made = cv.demonstrate(model(donor), adapter_of(donor, behaviour, kind), asked, max_new_tokens=32)
        cv.save_demonstrations(made, path)
    return cv.load_demonstrations(path)


# -- ways of carrying -------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One attempt."""

    donor: str
    recipient: str
    behaviour: str
    kind: str
    way: str


class Way(NamedTuple):
    """How a behaviour is carried: "paste", or a method of `distil`; on which layers, at which scale."""

    by: str | Context | Vocabulary
    layers: Any = "auto"
    scale: float = 1.0


WAYS = {
    "paste": Way("paste"),
    "paste, scale 2": Way("paste", scale=2.0),
    "context": Way(Context(sets=3)),
    "context, scale 1.5": Way(Context(sets=3), scale=1.5),
    "vocabulary": Way(Vocabulary()),
    "paste, all layers": Way("paste", cv.all_layers),
    "vocabulary, scale 1.5": Way(Vocabulary(), scale=1.5),
}
ROUNDS = (tuple(WAYS)[:5], tuple(WAYS)[5:])


@functools.lru_cache(maxsize=3)
def profiled(name: str) -> cv.Profile:
    """Return a model's profile, with text rows."""
    prompts, text = (cv.load_prompts(f"builtin:{kind}", limit=PROFILED) for kind in ("general", "text"))
    return cv.profile(model(name), prompts, text=text[: PROFILED // 2])


@functools.lru_cache(maxsize=1)
def linked(donor: str, recipient: str) -> cv.Link:
    """Return a pair's link."""
    return cv.link(profiled(donor), profiled(recipient))


@functools.lru_cache(maxsize=2)
def carried(cell: Cell, by: Any, layers: Any) -> tuple[cv.Adapter, dict[str, float]]:
    """Return the recipient's adapter at scale 1, and the held-out R² of what a paste reads and writes."""
    if by != "paste":
        return cv.distil(model(cell.recipient), shown_by(cell.donor, cell.behaviour, cell.kind), by=by, seed=SEED), {}
    link, own = linked(cell.donor, cell.recipient), adapter_of(cell.donor, cell.behaviour, cell.kind)
    found = link.fidelity(own, layers=layers)
    facts = {
        name: sum(getattr(one, f"adapter_{name}") for one in found) / len(found) for name in ("read_r2", "write_r2")
    }
    return link.paste(own, layers=layers), facts


def cells() -> Iterator[Cell]:
    """Yield all attempts in rounds over the pairs, each round with another of the donor's adapters."""
    pairs = [(donor, recipient) for recipient in RECIPIENTS for donor in DONORS if donor != recipient]
    for number in range(2 * max(map(len, ADAPTERS.values()))):
        for place, pair in enumerate(pairs):
            many = ADAPTERS[pair[0]]
            behaviour, kind = many[(number + place // 2) % len(many)]
            yield from (Cell(*pair, behaviour, kind, way) for way in ROUNDS[number % 2])


# -- measuring --------------------------------------------------------------------------------------------------------


@functools.cache
def answers(name: str) -> list[str]:
    """Return what a model answers as it is; all tasks ask the same."""
    return answered(model(name), behaviours()["pirate"].task, limit=TESTED)


def without(name: str, behaviour: str) -> str:
    """Return the strict labels of a model as it is."""
    return _bits(judged(behaviours()[behaviour].task, answers(name)).labels)


@functools.cache
def with_own(donor: str, behaviour: str, kind: str) -> str:
    """Return the strict labels of a donor with its adapter."""
    adapter = adapter_of(donor, behaviour, kind)
    return _bits(measure(model(donor), behaviours()[behaviour].task, adapter, limit=TESTED).labels)


def measured(cell: Cell) -> dict[str, Any]:
    """Return what the forecast reads, and the labels of the recipient and the donor with and without the adapter."""
    began = time.process_time()
    shown, way, lm = shown_by(cell.donor, cell.behaviour, cell.kind), WAYS[cell.way], model(cell.recipient)
    donor = with_own(cell.donor, cell.behaviour, cell.kind), without(cell.donor, cell.behaviour)
    before = without(cell.recipient, cell.behaviour)
    adapter, facts = carried(cell._replace(way=""), way.by, way.layers)
    read = time.process_time()
    told = evidence(lm, adapter, shown, scale=way.scale)
    read = time.process_time() - read
    found = measure(lm, behaviours()[cell.behaviour].task, adapter, scale=way.scale, limit=TESTED)
    return {
        "cell": list(cell),
        "with": _bits(found.labels),
        "without": before,
        "donor_with": donor[0],
        "donor_without": donor[1],
        "loops": _bits(found.loops),
        "evidence": {name: round(value, 4) for name, value in (told | facts).items()},
        "reading_seconds": round(read, 1),
        "seconds": round(time.process_time() - began, 1),
    }


def _bits(found: Any) -> str:
    return "".join(str(int(one)) for one in found)


def rows() -> list[dict[str, Any]]:
    """Return what was measured."""
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []


def run(seconds: float) -> None:
    """Measure what is not in the results yet."""
    began, done = time.monotonic(), {tuple(row["cell"]) for row in rows()}
    for cell in cells():
        if cell in done or (QWEN in cell and not QWEN_FILE.exists()):
            continue
        if time.monotonic() - began > seconds:
            return
        done.add(cell)
        try:
            row = measured(cell)
        except cv.CommandVError as error:
            print(*cell, "cannot be attempted:", error, flush=True)
            continue
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(*cell, {k: row[k].count("1") for k in ("with", "without", "donor_with", "donor_without")},
              row["reading_seconds"], row["seconds"], flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    run(parser.parse_args().seconds)
