"""Behaviours carried through words between real models, beside a few-shot prompt and training on the donor's answers.

`python benchmarks/words.py` measures the cells that `benchmarks/results/words.jsonl` does not have yet, and writes
`docs/benchmarks/words.md` from it. Each cell runs in a process of its own, for its peak of memory. Settings are the
defaults; nothing is chosen on the test prompts. Models that are not on this machine are left out, and said.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import commandv as cv
from commandv.evaluation import Made, Meter, load_task, price_scores, rate
from commandv.evaluation.arms import DEMONSTRATIONS, practised
from commandv.prompts.sets import Prompt, PromptSet
from commandv.storage.files import cache_dir
from commandv.training.train import DiReFT, TrainSettings, train
from commandv.transfer.distil.context import MANY, demonstration_sets

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "words.jsonl", HERE.parent / "docs" / "benchmarks" / "words.md"
KEPT = cache_dir() / "words"  # donors' adapters and demonstrations, which cells share
SMOLLM, GEMMA, QWEN = "smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct"
FILES = {QWEN: cache_dir() / "family" / f"{QWEN}-q4_k_m.gguf"}  # of `make family`
PAIRS = ((SMOLLM, GEMMA), (GEMMA, SMOLLM), (SMOLLM, QWEN))
BEHAVIOURS = {"numbered-list": ("numbered-list",), "pirate": ("pirate-opening", "pirate")}
ARMS = ("donor", "unmodified", "few-shot", "many-shot", "context", "auto", "vocabulary", "trained")
BASE = (GEMMA,)  # recipients without a chat template; into the others "auto" is the context
OF_BASE = ("many-shot", "auto")
ASKED, TESTED, SEED = 128, 64, 0
DONOR = DiReFT(rank=8, layers="last_half", positions="l1+g48")  # along the whole answer: a style has to last
DONOR_SETTINGS = TrainSettings(epochs=3, max_response=40, seed=SEED)

Cell = tuple[str, str, str, str]  # donor, recipient, behaviour, arm


def cells() -> Iterator[Cell]:
    """Yield all cells, what matters most first."""
    for donor, recipient in PAIRS:
        for behaviour in BEHAVIOURS:
            for arm in arms(recipient):
                yield donor, recipient, behaviour, arm


def arms(recipient: str) -> tuple[str, ...]:
    """Return the arms that differ."""
    return tuple(arm for arm in ARMS if arm not in OF_BASE or recipient in BASE)


def model(name: str) -> cv.LM:
    """Load a model by its name here."""
    return cv.load_model(str(FILES.get(name, name)))


def prepare(donor: str, behaviour: str) -> None:
    """Train the donor's adapter and have it demonstrate, unless that is there."""
    adapter, shown = KEPT / f"{behaviour}@{donor}", KEPT / f"{behaviour}@{donor}-shown"
    if shown.exists():
        return
    lm = model(donor)
    if not adapter.exists():
        cv.save(train(lm, cv.load_prompts(f"builtin:{behaviour}"), DONOR, DONOR_SETTINGS, name=behaviour), adapter)
    made = cv.demonstrate(lm, cv.load_adapter(str(adapter)), cv.load_prompts("builtin:general", limit=ASKED))
    cv.save_demonstrations(made, shown)


def made(lm: cv.LM, donor: str, behaviour: str, arm: str) -> Made:
    """Make an arm."""
    shown = cv.load_demonstrations(KEPT / f"{behaviour}@{donor}-shown")
    pairs = list(zip(shown.prompts, shown.answers, strict=True))
    if arm == "donor":
        return Made(cv.load_adapter(str(KEPT / f"{behaviour}@{donor}")))
    if arm == "few-shot":
        return Made(turns=tuple(pairs[:DEMONSTRATIONS]))
    if arm == "many-shot":  # what "auto" is fitted to
        return Made(turns=tuple(pairs[i] for i in demonstration_sets(shown, MANY.sets, MANY.size, None)[0]))
    if arm == "trained":
        answers = PromptSet(tuple(Prompt(*one) for one in pairs), "answers of the donor")
        return Made(practised(lm, answers, seed=SEED, name=behaviour))
    return Made(None if arm == "unmodified" else cv.distil(lm, shown, by=arm, seed=SEED))


def measured(donor: str, recipient: str, behaviour: str, arm: str) -> dict[str, Any]:
    """Return one cell's labels on the test prompts, and what it cost."""
    lm = model(donor if arm == "donor" else recipient)
    meter = Meter(lm, [load_task(name) for name in BEHAVIOURS[behaviour]], limit=TESTED)
    start, before = time.process_time(), _peak()
    one = made(lm, donor, behaviour, arm)
    seconds, peak = time.process_time() - start, _peak()
    found = meter.measured(one)
    asked = next(iter(meter.tasks)).test.texts[:8]
    tokens = sum(len(cv.encode(lm, text, turns=one.turns).ids) - len(cv.encode(lm, text).ids) for text in asked) / 8
    first = next(iter(found.outcomes.values()))
    provenance = one.adapter.provenance if one.adapter else {}
    return {
        "labels": {name: _bits(outcome.labels) for name, outcome in found.outcomes.items()},
        "loops": _bits(first.loops),
        "words": round(first.mean_words(), 1),
        "kl": {name: [round(x, 3) for x in values] for name, values in found.price.items() if name in KL},
        "seconds": round(seconds, 1),
        "loaded_gb": round(before, 2),
        "peak_gb": round(peak, 2),
        "tokens": round(tokens),
        "by": provenance.get("by", provenance.get("settings", {}).get("learning_rate")),
        "opening": [one[:80] for one in first.answers[:2]],
    }


KL = ("kl_first", "kl_after")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _bits(labels: Any) -> str:
    return "".join(str(int(one)) for one in labels)


def run(wanted: Callable[[Cell], bool]) -> None:
    """Measure what is not in the results yet, cell by cell."""
    done = set(rows())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for cell in cells():
            here = all(FILES[name].exists() for name in cell[:2] if name in FILES)
            if cell in done or not here or not wanted(cell):
                continue
            pool.submit(prepare, cell[0], cell[2]).result()
            facts = pool.submit(measured, *cell).result()
            with RESULTS.open("a") as file:
                file.write(json.dumps({"cell": cell, **facts}) + "\n")
            PAGE.write_text(page())
            print(*cell, facts["labels"], facts["seconds"], flush=True)


def rows() -> dict[Cell, dict[str, Any]]:
    """Return what was measured, by cell."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {tuple(row["cell"]): row for row in map(json.loads, lines)}


def page() -> str:
    """Return the page."""
    found, lines, missing = rows(), [INTRODUCTION], []
    for donor, recipient in PAIRS:
        for behaviour, names in BEHAVIOURS.items():
            table = [(arm, found.get((donor, recipient, behaviour, arm))) for arm in arms(recipient)]
            if without := [arm for arm, row in table if row is None]:
                missing.append(f"{donor} -> {recipient}, {behaviour}: {', '.join(without)}")
            if len(without) == len(table):
                continue
            columns = [*names, "loops", "KL first / after", "words", "seconds", "GB", "tokens a request"]
            lines += ["", f"## {donor} -> {recipient}: {behaviour}", "", f"| arm | {' | '.join(columns)} |"]
            lines += ["|" + "---|" * (len(columns) + 1), *(_told(arm, row, names) for arm, row in table if row)]
    if missing:
        lines += ["", "## Not measured yet", "", *(f"- {one}" for one in missing)]
    return "\n".join(lines) + "\n"


def _told(arm: str, row: dict[str, Any], names: tuple[str, ...]) -> str:
    cells = [_share(row["labels"][name]) for name in names] + [_share(row["loops"])]
    kl = price_scores({name: values for name, values in row["kl"].items() if values})
    cells.append(" / ".join(f"{kl[name].value:.2f}" for name in KL if name in kl))
    free = arm in ("donor", "unmodified", "few-shot", "many-shot")
    cells += [f"{row['words']:.0f}", "" if free else f"{row['seconds']:.0f}", "" if free else f"{row['peak_gb']:.1f}"]
    by = f" (rate {row['by']})" if arm == "trained" else ""
    return f"| {arm}{by} | {' | '.join(cells)} | {row['tokens'] or ''} |"


def _share(bits: str) -> str:
    one = rate("", [bit == "1" for bit in bits])
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]".replace("0.", ".")


INTRODUCTION = f"""# Through words: real models

Strict graders, {TESTED} test prompts, answers of 48 tokens, greedy, default settings, **one seed** of everything; 95 %
intervals over prompts. The donors are DiReFT adapters of rank 8 on the last half of the layers that act along the whole
answer (l1+g48), trained on the built-in examples; they answered {ASKED} task-agnostic prompts. "trained" is a DiReFT of
the same form trained on these answers, its learning rate the best of three on held-out answers. "few-shot" has
{DEMONSTRATIONS} of them as earlier turns, "many-shot" the {MANY.size} strongest. `by="auto"` is the context of many
strong demonstrations into Gemma, a base model, and the context into the others. KL is from the unmodified model, in
nats, at the first token of benign replies and after it. Seconds are CPU seconds of one thread for making the adapter,
from the demonstrations on (choosing a learning rate included); GB is the peak of a process that holds the recipient
and makes it. Made by `python benchmarks/words.py`."""


if __name__ == "__main__":
    if "--page" in sys.argv:
        PAGE.write_text(page())
    else:
        only = sys.argv[1:]
        run(lambda cell: all(any(word in part for part in cell) for word in only))
