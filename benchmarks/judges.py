"""Precision and recall of the text judges on hand-labelled hard cases: writes results/judges.json and the docs page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from commandv.evaluation import rate
from commandv.evaluation.judges import load_judge
from commandv.prompts.sets import Prompt

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "data" / "judged.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "judges.json"
PAGE = ROOT / "docs" / "benchmarks" / "judges.md"
# judge -> the behaviour that it looks for
JUDGED = {
    "refusal": "refusal",
    "gcg": "refusal",
    "arditi": "refusal",
    "xstest": "refusal",
    "pirate-opening": "pirate-opening",
}

TEXT = """# How far can the judges be trusted?

Written by `python -m benchmarks.judges`. {n} short answers, written and labelled by hand, chosen to be hard: idioms
("I can't wait"), apologies that refuse nothing, refusals in other words or after a preamble, quotations, partial
refusals, empty and looping answers. They say which judge fails where, and are no estimate of how often it fails on a
model's everyday answers. An answer is labelled a *refusal* when it declines what was asked, whatever the reason,
also when it offers something else instead; not when it voices doubts and then answers. *pirate-opening* asks
how the answer opens. A text that loops shows no behaviour. [Answers of models](graders.md), read and labelled, say how
often the graders are right on what they grade.

The refusal grader was written on the half named dev; only the half named test is fair to it, and less than it would be
with somebody else's examples, since one author wrote both halves. The phrase lists (`gcg`, `arditi`, `xstest`) are as
published; they were made to find refusals of harmful requests among answers of a few models, not for this. Intervals
are 95 % Wilson.

{table}

## Found wrong on the test half

{wrong}
"""


def measure() -> list[dict[str, Any]]:
    """Return per judge and half: n, positives, precision, recall, and how often it is wrong on which kind of case."""
    cases = [json.loads(line) for line in CASES.read_text("utf-8").splitlines()]
    rows = []
    for judge, behaviour in JUDGED.items():
        for split in ("test", "dev"):
            mine = [case for case in cases if case["split"] == split and behaviour in case["labels"]]
            answers = [case["answer"] for case in mine]
            said = load_judge(judge)([Prompt(case["prompt"]) for case in mine], answers)
            truth = [bool(case["labels"][behaviour]) for case in mine]
            hits = [(bool(found), true) for found, true in zip(said, truth, strict=True)]
            missed, wrong = {}, {}
            for case, (found, true) in zip(mine, hits, strict=True):
                if found != true:
                    table = missed if true else wrong
                    table[case["kind"]] = table.get(case["kind"], 0) + 1
            precision = rate("precision", [true for found, true in hits if found])
            recall = rate("recall", [found for found, true in hits if true])
            rows.append(
                {
                    "judge": judge,
                    "behaviour": behaviour,
                    "split": split,
                    "n": len(mine),
                    "positive": sum(truth),
                    "precision": [round(figure, 4) for figure in precision[1:4]],
                    "recall": [round(figure, 4) for figure in recall[1:4]],
                    "missed": missed,
                    "wrongly_found": wrong,
                }
            )
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """Return the documentation page."""
    lines = ["| judge | behaviour | half | n | precision | recall |", "|---|---|---|---|---|---|"]
    for row in rows:
        figures = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[name]) for name in ("precision", "recall")]
        lines.append(f"| {row['judge']} | {row['behaviour']} | {row['split']} | {row['n']} | {' | '.join(figures)} |")
    wrong = []
    for row in rows:
        if row["split"] == "test":
            parts = [
                f"{what} {', '.join(f'{kind} ({number})' for kind, number in row[key].items()) or 'nothing'}"
                for what, key in (("misses:", "missed"), ("false alarms:", "wrongly_found"))
            ]
            wrong.append(f"- `{row['judge']}`: {'; '.join(parts)}.")
    total = sum(1 for line in CASES.read_text("utf-8").splitlines() if line)
    return TEXT.format(n=total, table="\n".join(lines), wrong="\n".join(wrong))


if __name__ == "__main__":
    measured = measure()
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(measured), "utf-8")
    print(PAGE.read_text("utf-8"))
