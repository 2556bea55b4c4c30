"""Behaviours carried through words between the packaged models, beside a few-shot prompt and a paste.

`python benchmarks/words.py` measures what `benchmarks/results/words.jsonl` does not have yet, and writes
`docs/benchmarks/words.md` from it. Each arm runs in a process of its own, for its peak of memory. Settings are the
defaults; nothing was chosen on the test prompts.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import commandv as cv
from commandv.evaluation import GRADERS, load_task, loops

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "words.jsonl", HERE.parent / "docs" / "benchmarks" / "words.md"
PAIRS = (("smollm2-135m-instruct", "gemma-3-270m"), ("gemma-3-270m", "smollm2-135m-instruct"))
BEHAVIOURS = {"numbered-list": ("numbered-list",), "pirate": ("pirate-opening", "pirate")}
ARMS = ("donor", "unmodified", "few-shot", "context", "vocabulary", "paste")
ASKED, TESTED, SHOTS, SEED = 128, 40, 4, 0
PROFILED, PASSAGES = 256, 100


def demonstrated(donor: str, behaviour: str, out: str) -> dict[str, Any]:
    """Have the donor demonstrate, and return its cost."""
    lm, adapter = cv.load_model(donor), cv.load_adapter(f"builtin:{behaviour}@{donor}")
    start = time.process_time()
    made = cv.demonstrate(lm, adapter, cv.load_prompts("builtin:general", limit=ASKED))
    cv.save_demonstrations(made, out)
    size = sum(one.stat().st_size for one in Path(out).iterdir())
    return {"seconds": time.process_time() - start, "mb": size / 1e6, "n": len(made), "nats": made.mean_divergence}


def measured(donor: str, recipient: str, behaviour: str, arm: str, shown: str) -> dict[str, Any]:
    """Return one arm's labels on the test prompts, and its cost."""
    lm = cv.load_model(donor if arm == "donor" else recipient)
    own = cv.load_adapter(f"builtin:{behaviour}@{donor}")
    demonstrations = cv.load_demonstrations(shown)
    questions = load_task(behaviour).test[:TESTED]
    start, adapter, turns = time.process_time(), None, []
    if arm == "donor":
        adapter = own
    elif arm == "few-shot":
        turns = list(zip(demonstrations.prompts[:SHOTS], demonstrations.answers[:SHOTS], strict=True))
    elif arm == "paste":
        asked = cv.load_prompts("builtin:general", limit=PROFILED)
        text = cv.load_prompts("builtin:text", limit=PASSAGES)
        one, two = (cv.profile(cv.load_model(name), asked, text=text) for name in (donor, recipient))
        adapter = cv.paste(own, one, two)
    elif arm != "unmodified":
        adapter = cv.distil(lm, demonstrations, by=arm, seed=SEED)
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with cv.attach(lm, adapter) if adapter else contextlib.nullcontext():
        answers = cv.generate(lm, questions, max_new_tokens=48, turns=turns)
    labels = {name: [int(GRADERS[name](one)) for one in answers] for name in BEHAVIOURS[behaviour]}
    extra = 0
    if turns:
        plain, long = (len(cv.encode(lm, questions.texts[0], turns=many).ids) for many in ([], turns))
        extra = long - plain
    return {
        **{
            "labels": labels,
            "loops": [int(loops(one)) for one in answers],
            "words": sum(map(len, map(str.split, answers))),
        },
        **{"seconds": seconds, "peak_gb": peak, "tokens": extra, "opening": [one[:60] for one in answers[:2]]},
    }


def run() -> None:
    """Measure what is not in the results yet."""
    done = {tuple(row["cell"]) for row in rows()}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool, RESULTS.open("a") as file:
        for arm_group in (("demonstrate", *ARMS[:-2]), ARMS[-2:-1], ARMS[-1:]):  # what takes the longest comes last
            for behaviour in BEHAVIOURS:
                for donor, recipient in PAIRS:
                    shown = Path(tempfile.gettempdir()) / f"words-{behaviour}-{donor}"
                    for arm in arm_group:
                        if (cell := (donor, recipient, behaviour, arm)) in done:
                            continue
                        if arm == "demonstrate":
                            facts = pool.submit(demonstrated, donor, behaviour, str(shown)).result()
                        else:
                            facts = pool.submit(measured, *cell, str(shown)).result()
                        file.write(json.dumps({"cell": cell, **facts}) + "\n")
                        file.flush()


def rows() -> list[dict[str, Any]]:
    """Return what was measured."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def page() -> str:
    """Return the page."""
    found = {tuple(row["cell"]): row for row in rows()}
    lines = [
        "# Through words: the packaged models",
        "",
        f"Strict graders, {TESTED} test prompts, 48 tokens, greedy, default settings, **one seed** of everything: read "
        "differences of less than .15 as none. The donors are the shipped adapters, which act at the last prompt token "
        f"and were trained on 16 tokens an answer; {ASKED} prompts were demonstrated. Seconds are of one CPU thread, "
        "and of making the adapter alone; memory is the peak of a process that holds the recipient. Of the pastes they "
        "include profiling both models, where no profile was cached. Made by `python benchmarks/words.py`.",
    ]
    for behaviour, names in BEHAVIOURS.items():
        lines += ["", f"## {behaviour}", ""]
        lines += [f"| into | arm | {' | '.join(names)} | loops | seconds | peak GB | tokens a request |"]
        lines += ["|" + "---|" * (len(names) + 6)]
        for donor, recipient in PAIRS:
            for arm in ARMS:
                row = found.get((donor, recipient, behaviour, arm))
                if row is None:
                    lines.append(f"| {recipient} | {arm} | {'not measured | ' * (len(names) + 1)} | | |")
                    continue
                rates = [*(row["labels"][name] for name in names), row["loops"]]
                told = " | ".join(f"{sum(one) / len(one):.2f}".removeprefix("0") for one in rates)
                cost = f"{row['seconds']:.0f} | {row['peak_gb']:.1f} | {row['tokens'] or ''}"
                costless = arm in ("donor", "unmodified")
                lines.append(f"| {recipient} | {arm} | {told} | {'| | ' if costless else cost} |")
    lines += ["", "## Demonstrations", "", "| donor | behaviour | answers | nats a token | file MB | seconds |"]
    lines += ["|---|---|---|---|---|---|"]
    for (donor, _, behaviour, arm), row in found.items():
        if arm == "demonstrate":
            facts = f"{row['n']} | {row['nats']:.2f} | {row['mb']:.1f} | {row['seconds']:.0f}"
            lines.append(f"| {donor} | {behaviour} | {facts} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--page" not in sys.argv:
        run()
    PAGE.write_text(page())
