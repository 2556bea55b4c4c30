"""Do the graders agree with a reader? Precision and recall on labelled answers; writes docs/benchmarks/graders.md.

    python -m benchmarks.graders

From the committed labels alone, in a second; graders_answers.py makes the answers, graders_labels.py the labels.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from commandv.errors import FormatError
from commandv.evaluation import GRADERS, Judge, load_task, loops, rate
from commandv.prompts.sets import Prompt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "graders"
PAGE = ROOT / "docs" / "benchmarks" / "graders.md"
VERSION = 1  # of the label files
SETS = ("numbered-list", "pirate", "pirate-throughout", "refusal", "over-refusal", "arithmetic", "easy-sums")
HALVES = ("dev", "test")
Row = dict[str, Any]

# what is graded: title, sets whose answers it is checked on, label, what must hold besides for the grader to be right
CHECKS = {
    "numbered-list": ("numbered list", ("numbered-list",), "numbered-list"),
    "pirate": ("pirate dialect", ("pirate", "pirate-throughout"), "pirate"),
    "pirate-opening": ("pirate opening", ("pirate", "pirate-throughout"), "pirate-opening"),
    "refusal": ("refusal", ("refusal", "over-refusal"), "refusal"),
    "answered": ("answered", ("refusal", "over-refusal"), "answered"),
    "arithmetic": ("right value", ("arithmetic", "easy-sums"), "arithmetic"),
}


def load_labels(path: Path) -> list[Row]:
    """Read a file of labelled answers: a header with version, set, n and definitions, then a row per answer.

    Raises:
        FormatError: another version, fewer or more rows than the header says, an answer that is there twice, a label
            that is missing or not 0 or 1.
    """
    try:
        header, *rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: not a file of labels ({error}); take the committed one") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        found = header.get("version") if isinstance(header, dict) else header
        raise FormatError(f"{path}: labels of version {found}, expected {VERSION}; label the answers anew")
    if len(rows) != header["n"]:
        raise FormatError(f"{path}: {len(rows)} labelled answers, its header says {header['n']}; take the whole file")
    seen = set()
    for number, row in enumerate(rows, start=2):
        place = (row.get("model"), row.get("arm"), row.get("prompt"))
        if place in seen:
            raise FormatError(f"{path}, line {number}: {place} is labelled twice; keep one of them")
        seen.add(place)
        wanted = {*(name for name in header["definitions"]), "loops", "readable"}
        labels = row.get("labels", {})
        if not wanted <= labels.keys() or not set(labels.values()) <= {0, 1} or row.get("half") not in HALVES:
            raise FormatError(
                f"{path}, line {number}: half {row.get('half')!r}, labels {labels}; expected a half in {HALVES} and 0 "
                f"or 1 for each of {sorted(wanted)}"
            )
    return rows


def verdict(check: str, row: Row) -> bool:
    """Return what the library's grader says of an answer."""
    return _verdict(check, row["answer"], row["prompt"], row.get("reference", ""))


@functools.cache
def _sums() -> Judge:
    return load_task("arithmetic").judge


@functools.cache
def _verdict(check: str, answer: str, prompt: str, reference: str) -> bool:
    if check == "loops":
        return loops(answer)
    if check == "arithmetic":
        return bool(_sums()([Prompt(prompt, reference)], [answer])[0])
    return GRADERS[check](answer)


def truth(label: str, row: Row) -> bool:
    """Return what the reader says: the behaviour shows, in a text that does not loop and can be read."""
    labels = row["labels"]
    if label == "loops":
        return bool(labels["loops"])
    return bool(labels[label] and labels["readable"] and not labels["loops"])


def compared(check: str, label: str, rows: Iterable[Row]) -> list[tuple[bool, bool]]:
    """Return (found by the grader, said by the reader) of each answer."""
    return [(verdict(check, row), truth(label, row)) for row in rows]


def measure(data: dict[str, list[Row]]) -> list[Row]:
    """Return per check and half: n, positives, precision and recall with their intervals, and so by arm."""
    out = []
    checks = [(name, *rest) for name, rest in CHECKS.items()] + [("loops", "loops", SETS, "loops")]
    for check, title, sets, label in checks:
        for half in HALVES:
            rows = [row for name in sets for row in data[name] if row["half"] == half]
            out.append({"check": title, "half": half, "arm": "all", **figures(compared(check, label, rows))})
            for arm in dict.fromkeys(row["arm"] for row in rows) if half == "test" else ():
                some = [row for row in rows if row["arm"] == arm]
                out.append({"check": title, "half": half, "arm": arm, **figures(compared(check, label, some))})
    return out


def figures(pairs: Sequence[tuple[bool, bool]]) -> Row:
    found = {"n": len(pairs), "positive": sum(true for _, true in pairs), "found": sum(hit for hit, _ in pairs)}
    right = sum(hit and true for hit, true in pairs)
    for name, of in (("precision", found["found"]), ("recall", found["positive"])):
        found[name] = list(rate(name, [True] * right + [False] * (of - right))[1:4]) if of else None
    return found


TEXT = """# Do the graders agree with a reader?

Written by `python -m benchmarks.graders` from {n} answers of the two packaged models and their labels
(`benchmarks/results/graders/`). The answers are those of the arms that get graded: the model as it is, an adapter
pasted (default), pasted as published, random of equal norm, the text bridge, a few-shot prompt with the donor's
answers, and the adapter trained on the model itself; 48 tokens (64 for some sums), development prompts, fixed seeds.

Labelled by reading: in shuffled order, question and answer alone, without model, arm or any grader's verdict. What each
label means was settled before, and put into these words while reading (when a third repeat that is cut off counts, for
one). One reader, a language model that also wrote the graders: no second reader's agreement is known. Half
of the answers (*dev*) served to tune the graders; the figures are those of the other half (*test*). The reader had read
both halves before tuning, so the halves are apart in the figures and not in the reader's mind. A grader is right where
it finds the behaviour and the reader says that it shows *in a text that does not loop and can be read*. 95 % Wilson
intervals over answers; two arms' answers to one prompt count as two.

## Definitions

{definitions}

## Precision and recall, test half

{overall}

Few answers refuse and few sums are right, so those intervals are wide. On the dev half: {dev}.

## By arm, test half

n answers, of these positive by the reader; precision and recall (a dash where there is nothing to take them of).

{arms}

## Before and now

Rates on all labelled answers, dev and test, by arm: what the reader says, what the graders said that these replace
(openings of lists and pirates; refusals and answers in fewer wordings; repeated words as the only loops), what they say
now, and the share that loops by the reader and by the one check.

{before}

## Harmful requests

Answers to harmful requests are read by nobody and kept nowhere, so the grader of refusals is validated on the answers
above alone, which are to benign requests, some of which merely sound dangerous. On {n_harmful} harmful development
requests it counts:

{harmful}

## What donors do to benign prompts

Of each built-in set, how many answers each donor refuses and loops on (and, for the list and the pirate opening, how
many show what it was trained to do). A donor that refuses what is profiled puts its refusals into a profile of answers.
The list and the pirate are the shipped adapters; *refusal* is the one of the answers above, *refusal-studied* is
trained as in `studies/small/refusal.yaml`. `general-dev` has one prompt for each kind of prompt in `general`, none
of them the same; `questions-dev` has short questions alone.

{donors}
"""


def shown(interval: list[float] | None) -> str:
    return "-" if interval is None else "{:.2f} [{:.2f}, {:.2f}]".format(*interval)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def before(data: dict[str, list[Row]]) -> str:
    """Return the table of rates by the reader, by the graders that these replace, and by these."""
    rows = []
    for check, (title, sets, label) in CHECKS.items():
        some = [row for name in sets for row in data[name]]
        for arm in dict.fromkeys(row["arm"] for row in some):
            mine = [row for row in some if row["arm"] == arm]
            columns = (
                [truth(label, row) for row in mine],
                [bool(row["earlier"][check]) for row in mine],
                [verdict(check, row) for row in mine],
                [truth("loops", row) for row in mine],
                [verdict("loops", row) for row in mine],
            )
            rows.append([title, arm, len(mine), *(f"{sum(column) / len(column):.2f}" for column in columns)])
    return table(("graded", "arm", "n", "reader", "before", "now", "loops, reader", "loops, check"), rows)


def counts(name: str) -> tuple[list[str], list[Row]]:
    """Return the columns and rows of a file of counts."""
    found = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["counts"]
    columns = list(dict.fromkeys(key for one in found.values() for key in one))
    return columns, [{"what": what, **one} for what, one in found.items()]


def counted(name: str, first: Sequence[str]) -> str:
    columns, rows = counts(name)
    return table(
        [*first, *columns], [[*row["what"].split(": "), *(row.get(key, "") for key in columns)] for row in rows]
    )


def definitions() -> str:
    found: dict[str, str] = {}
    for name in SETS:
        found |= json.loads((RESULTS / f"{name}.jsonl").read_text("utf-8").splitlines()[0])["definitions"]
    return "\n".join(f"- *{name}*: {text}" for name, text in found.items())


def page(data: dict[str, list[Row]], measured: list[Row]) -> str:
    """Return the documentation page."""
    overall = [row for row in measured if row["arm"] == "all"]
    test = [
        [r["check"], r["n"], r["positive"], shown(r["precision"]), shown(r["recall"])]
        for r in overall
        if r["half"] == "test"
    ]
    dev = [
        f"{row['check']} {row['precision'][0]:.2f} and {row['recall'][0]:.2f} of {row['positive']}"
        for row in overall
        if row["half"] == "dev" and row["precision"] and row["recall"]
    ]
    arms = [
        [r["check"], r["arm"], r["n"], r["positive"], shown(r["precision"]), shown(r["recall"])]
        for r in measured
        if r["arm"] != "all"
    ]
    return TEXT.format(
        n=sum(map(len, data.values())),
        definitions=definitions(),
        overall=table(("graded", "n", "positive", "precision", "recall"), test),
        dev="; ".join(dev),
        arms=table(("graded", "arm", "n", "positive", "precision", "recall"), arms),
        before=before(data),
        n_harmful=counts("harmful")[1][0]["n"],
        harmful=counted("harmful", ("model", "arm")),
        donors=counted("donors", ("model", "donor", "prompts")),
    )


def labelled() -> dict[str, list[Row]]:
    """Return the committed labels by set."""
    return {name: load_labels(RESULTS / f"{name}.jsonl") for name in SETS}


if __name__ == "__main__":
    data = labelled()
    text = page(data, measure(data))
    PAGE.write_text(text, "utf-8")
    print(text)
