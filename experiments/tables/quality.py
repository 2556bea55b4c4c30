"""Does a pasted behaviour arrive? Twins of one model, siblings with damage, and two families; 3 seeds; all controls.

    python -m experiments.tables.quality            # everything; finished cells are kept and not run again
    python -m experiments.tables.quality --only twin
    python -m experiments.tables.quality --report   # tables from the finished cells

Settings (scale, layers, rows) are picked on development prompts with the first seed and reported on test prompts that
no training, fit or choice has seen. The published method gets the same choice. Refusal uses the AdvBench prompts in
../shared/data and is skipped where that folder is absent; its answers are graded and not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock
import torch

import commandv as cv
from commandv.evaluation import GRADERS, rate
from experiments.organisms.siblings import damaged, dropped, rotated

HERE = Path(__file__).resolve().parents[1]
SHARED = HERE.parents[1] / "shared" / "data"
WORK = HERE.parent / "build" / "quality"
RESULTS = HERE / "results" / "quality.json"
TABLE = HERE.parent / "docs" / "benchmarks" / "quality.md"

SMOL, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
SEEDS = (0, 1, 2)
N_TEST, N_DEV = 100, 48
KIND = cv.DiReFT(rank=8, layers="last_half", positions="l1")
TRAINING = cv.TrainSettings(epochs=2, max_response=16)
# At the common rate Gemma's held-out loss on refusals rises (1.66 to 1.77) and it learns nothing.
LEARNING_RATES = {("refusal", GEMMA): 1.5e-3}
TOKENS = {"numbered-list": 48, "pirate": 48, "refusal": 48}
SCALES, LAYERS, ROWS = (0.6, 1.0), ("last_third", "all_layers"), ("text", "both")
REFUSAL = "I'm sorry, but I can't help with that."


# -- models and data --------------------------------------------------------------------------------------------------


@functools.cache
def model(name: str) -> cv.LM:
    if name in (SMOL, GEMMA):
        return cv.load_model(name)
    makers: dict[str, Callable[[cv.LM], cv.LM]] = {
        "twin": lambda lm: rotated(lm, 768),
        "twin, 5 % noise": lambda lm: damaged(rotated(lm, 768), 0.05),
        "twin, 5 % noise, 3 layers less": lambda lm: dropped(damaged(rotated(lm, 768), 0.05), (4, 17, 25)),
    }
    return makers[name](cv.load_model(SMOL))


@functools.cache
def profiled(name: str) -> cv.Profile:
    return cv.profile(model(name), cv.load_prompts("builtin:general"), text=cv.load_prompts("builtin:text"))


def rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / file).read_text("utf-8").splitlines()]


@functools.cache
def harmful(split: str) -> list[str]:
    return [row["prompt"] for row in rows("advbench_shared.jsonl") if row["split"] == split]


def dev_and_test(behaviour: str) -> tuple[cv.PromptSet, cv.PromptSet]:
    if behaviour == "refusal":
        unseen = cv.PromptSet(tuple(map(cv.Prompt, harmful("test"))), "advbench")
        learned = cv.PromptSet(tuple(map(cv.Prompt, harmful("train")[200 : 200 + N_DEV])), "advbench")
        return learned, unseen[:N_TEST]
    return cv.load_prompts("builtin:questions-dev")[:N_DEV], cv.load_prompts("builtin:questions-test")[:N_TEST]


def examples(behaviour: str, name: str) -> cv.PromptSet:
    """Return training data: 256 rows, or for refusal 160 harmful requests and 96 benign ones with plain answers."""
    if behaviour != "refusal":
        return cv.load_prompts(f"builtin:{behaviour}")
    benign = cv.load_prompts("builtin:numbered-list")[:96].texts
    answers = cv.generate(model(name), benign, max_new_tokens=16, batch_size=48)
    pairs = [cv.Prompt(text, REFUSAL) for text in harmful("train")[:160]]
    return cv.PromptSet((*pairs, *map(cv.Prompt, benign, (a.strip() or "Yes." for a in answers))), "refusal")


def trained(behaviour: str, name: str, seed: int) -> cv.Adapter:
    """Train an adapter, or load the one that was trained before."""
    path = WORK / "adapters" / f"{behaviour}@{name.replace(' ', '_')}-{seed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if path.exists():
            return cv.load_adapter(path)
        learning_rate = LEARNING_RATES.get((behaviour, name), TRAINING.learning_rate)
        settings = replace(TRAINING, seed=seed, learning_rate=learning_rate)
        adapter = cv.train(model(name), examples(behaviour, name), KIND, settings, name=behaviour)
        cv.save(adapter, path)
    return adapter


# -- one cell ---------------------------------------------------------------------------------------------------------


def hits(name: str, prompts: cv.PromptSet, behaviour: str, adapter: cv.Adapter | None) -> list[int]:
    """Return 1 or 0 per prompt; the answers themselves are not kept."""
    lm = model(name)
    with cv.attach(lm, adapter) if adapter else contextlib.nullcontext():
        answers = cv.generate(lm, prompts, max_new_tokens=TOKENS[behaviour], batch_size=50)
    return [int(GRADERS[behaviour](answer)) for answer in answers]


def pick(donor: str, recipient: str, behaviour: str, how: dict[str, Any]) -> dict[str, Any]:
    """Choose scale and layers on development prompts with the first seed; the mildest of the best wins."""
    file = WORK / "picks" / f"{behaviour}-{donor}-{recipient}-{how['fit'].name}.json".replace(" ", "_")
    if file.exists():
        return json.loads(file.read_text())
    dev, _ = dev_and_test(behaviour)
    adapter = trained(behaviour, donor, SEEDS[0])
    tried = []
    for layers, rows in itertools.product(LAYERS, ROWS if "write_rows" not in how else (how["write_rows"],)):
        whole = cv.paste(adapter, profiled(donor), profiled(recipient), layers=layers, **{**how, "write_rows": rows})
        for scale in SCALES:
            share = sum(hits(recipient, dev, behaviour, whole.scaled(scale))) / len(dev)
            tried.append({"layers": layers, "write_rows": rows, "scale": scale, "dev_rate": share})
    best = max(
        tried,
        key=lambda one: (
            one["dev_rate"], -abs(one["scale"] - 1), one["layers"] == "last_third", one["write_rows"] == ROWS[0]
        ),
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**best, "tried": tried}))
    return best


OURS: dict[str, Any] = {"fit": cv.Ridge()}
PUBLISHED: dict[str, Any] = {"fit": cv.Pinv(), "match": cv.nearest, "write_rows": "end"}


def cell(donor: str, recipient: str, behaviour: str, seed: int) -> dict[str, Any]:
    """Measure every column of one donor, recipient, behaviour and seed on the test prompts."""
    _, test = dev_and_test(behaviour)
    adapter = trained(behaviour, donor, seed)
    one, two = profiled(donor), profiled(recipient)
    ours, published = (pick(donor, recipient, behaviour, how) for how in (OURS, PUBLISHED))
    picked: dict[str, Any] = {**OURS, **{key: ours[key] for key in ("layers", "scale", "write_rows")}}
    pasted = cv.paste(adapter, one, two, **picked)
    columns: dict[str, cv.Adapter | None] = {
        "unmodified": None,
        "ours": pasted,
        "ours, default setting": cv.paste(adapter, one, two),
        "pinv": cv.paste(adapter, one, two, layers=published["layers"], scale=published["scale"], **PUBLISHED),
        "random": cv.random_like(pasted, seed),
        "shuffled": cv.paste(adapter, one, two, shuffle=seed, **picked),
    }
    if recipient != "twin":  # the same function as its donor, so direct training on it is the donor's
        columns["direct training"] = trained(behaviour, recipient, seed)
    outcomes = {title: hits(recipient, test, behaviour, made) for title, made in columns.items()}
    outcomes["donor"] = hits(donor, test, behaviour, adapter)
    settings = {"ours": ours, "pinv": published}
    facts = {"donor": donor, "recipient": recipient, "behaviour": behaviour, "seed": seed, "settings": settings}
    if behaviour == "refusal":
        benign = cv.load_prompts("builtin:questions-test")[:N_TEST]
        facts["over-refusal"] = {
            title: hits(recipient, benign, behaviour, columns[title]) for title in ("unmodified", "ours")
        }
    return {**facts, "outcomes": outcomes}


def cells() -> list[tuple[str, str, str, int]]:
    behaviours = [one for one in TOKENS if one != "refusal" or SHARED.exists()]
    twins = ("twin", "twin, 5 % noise", "twin, 5 % noise, 3 layers less")
    pairs = [(GEMMA, SMOL), (SMOL, GEMMA), *((SMOL, twin) for twin in twins)]
    return [(*pair, behaviour, seed) for seed in SEEDS for pair in pairs for behaviour in behaviours]


# -- report -----------------------------------------------------------------------------------------------------------

COLUMNS = ["unmodified", "ours", "ours, default setting", "pinv", "random", "shuffled", "direct training", "donor"]
HEAD = f"""# Does it arrive?

Written by `python -m experiments.tables.quality`. Share of test answers that show the behaviour, with 95 %
Wilson intervals, seeds and prompts pooled ({N_TEST} prompts a seed; donor training is part of a seed). Scale and
layers of *ours* and of *pinv* (the published method: pseudo-inverse, nearest layers, last-token rows) were
picked on {N_DEV} development prompts with the first seed, for *ours* also the rows of the writing converter (text
rows, or these and last-token
rows); *default setting* is `paste()` as it comes. *Random* is turned at equal norm, *shuffled* is
fitted on wrongly paired prompts. The twin is SmolLM2 in a rotated stream of width 768: the same function, so direct
training on it is the donor's own training.

"""


def summarise(many: list[dict[str, Any]]) -> dict[str, Any]:
    """Pool the seeds of one donor, recipient and behaviour."""
    first = many[0]
    outcomes = {
        title: [one["outcomes"][title] for one in many if title in one["outcomes"]]
        for title in COLUMNS
        if any(title in one["outcomes"] for one in many)
    }
    refused = {
        title: list(itertools.chain(*(one["over-refusal"][title] for one in many)))
        for title in first.get("over-refusal", {})
    }
    return {
        **{key: first[key] for key in ("donor", "recipient", "behaviour", "settings")},
        "seeds": [one["seed"] for one in many],
        "scores": {title: rate(title, list(itertools.chain(*lists)))._asdict() for title, lists in outcomes.items()},
        "by_seed": {title: [sum(hit) / len(hit) for hit in lists] for title, lists in outcomes.items()},
        "over_refusal": {title: rate(title, hit)._asdict() for title, hit in refused.items()},
    }


def shown(score: dict[str, Any] | None) -> str:
    return f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]" if score else "as donor"


def note(entry: dict[str, Any]) -> str:
    """Say which settings were picked, and how many benign prompts are refused."""
    picks = "; ".join(
        f"{who} {one['layers']}, {one['write_rows']} rows, × {one['scale']}" for who, one in entry["settings"].items()
    )
    benign = "".join(f"; benign prompts refused, {title}: {shown(one)}" for title, one in entry["over_refusal"].items())
    return f"- {entry['donor']} -> {entry['recipient']}, {entry['behaviour']}: {picks}{benign}"


def report() -> None:
    """Write results/quality.json and the table in docs from the finished cells."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for file in sorted((WORK / "cells").glob("*.json")):
        one = json.loads(file.read_text())
        groups.setdefault((one["donor"], one["recipient"], one["behaviour"]), []).append(one)
    entries = [summarise(many) for many in groups.values()]
    lines = ["| donor -> recipient | behaviour | seeds × n | " + " | ".join(COLUMNS) + " |", "|---" * 11 + "|"]
    for entry in entries:
        head = (
            f"| {entry['donor']} -> {entry['recipient']} | {entry['behaviour']} | {len(entry['seeds'])} × {N_TEST} | "
        )
        lines.append(head + " | ".join(shown(entry["scores"].get(title)) for title in COLUMNS) + " |")
    lines += ["", "## Settings picked on development prompts", "", *map(note, entries)]
    facts = {"torch": torch.__version__, "n_test": N_TEST, "n_dev": N_DEV, "training": asdict(TRAINING)}
    for file, text in ((RESULTS, json.dumps({**facts, "cells": entries}, indent=1)), (TABLE, HEAD + "\n".join(lines))):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run cells whose name holds this")
    parser.add_argument("--report", action="store_true", help="only write the tables")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ["TQDM_DISABLE"] = "1"
    for spec in [] if options.report else cells():
        name = "-".join(map(str, spec)).replace(" ", "_")
        file = WORK / "cells" / f"{name}.json"
        if options.only in name and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            result = cell(*spec)
            file.write_text(json.dumps(result))
            print(name, {title: sum(hit) / len(hit) for title, hit in result["outcomes"].items()}, flush=True)
    report()


if __name__ == "__main__":
    main()
