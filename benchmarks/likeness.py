"""How far the judge that learns from the donor agrees with a reader: writes results/likeness.json and the docs page."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import commandv as cv
from benchmarks.graders import labelled, truth
from commandv.evaluation import Judge, rate
from commandv.evaluation.likeness import like_the_donor
from commandv.models.names import PACKAGED
from commandv.prompts.sets import PromptSet

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "likeness.json"
PAGE = ROOT / "docs" / "benchmarks" / "likeness.md"
# shipped adapter -> the label of the readers that its donor shows
BEHAVIOURS = {"numbered-list": "numbered-list", "pirate": "pirate-opening"}
N_ASKED = 128

TEXT = """# How far can the donor's own answers serve as the measure?

Written by `python -m benchmarks.likeness`. Where `commandv transfer` is given no task it compares answers with the
donor's: a logistic regression over the characters' n-grams learns to tell the donor's answers with its adapter from the
donor's and the recipient's without it, to {asked} prompts of `builtin:general`, and labels the recipient's answers to
others. Here it labels [answers of all arms that a reader has labelled](graders.md), of the model that is the recipient.
No setting of it was chosen on them. *Told apart*: of the donor's own answers, prompts held out in turn. Intervals are
95 % Wilson.

{table}

It finds few that are none and misses a part of those that are: recipients phrase a behaviour in their own way. So it
compares arms on the same prompts, and says less than a task does of how often the behaviour is there.
"""


def measure() -> list[dict[str, Any]]:
    """Return agreement, precision and recall by behaviour and direction; runs both packaged models."""
    general = cv.load_prompts("builtin:general")
    order = list(range(len(general)))
    random.Random(0).shuffle(order)
    asked = PromptSet(tuple(general.prompts[i] for i in order[:N_ASKED]), "asked")
    models = {name: cv.load_model(name) for name in PACKAGED}
    rows = []
    for behaviour, label in BEHAVIOURS.items():
        for donor, recipient in (tuple(models), tuple(models)[::-1]):
            adapter = cv.load_adapter(f"builtin:{behaviour}@{donor}")
            judge = like_the_donor(models[donor], adapter, models[recipient], asked)
            rows.append(
                {"behaviour": label, "donor": donor, "recipient": recipient, "told_apart": round(judge.accuracy, 4)}
                | agreement(judge, behaviour, label, recipient)
            )
    return rows


def agreement(judge: Judge, behaviour: str, label: str, recipient: str) -> dict[str, Any]:
    """Return how a judge's labels of a recipient's answers compare with the readers'."""
    mine = [row for row in labelled()[behaviour] if row["model"] == recipient]
    said = judge([cv.Prompt(row["prompt"]) for row in mine], [row["answer"] for row in mine])
    pairs = [(bool(found), truth(label, row)) for found, row in zip(said, mine, strict=True)]
    scores = {
        "agreement": [found == true for found, true in pairs],
        "precision": [true for found, true in pairs if found],
        "recall": [found for found, true in pairs if true],
    }
    told = {name: [round(one, 4) for one in rate(name, hits)[1:4]] if hits else None for name, hits in scores.items()}
    return {"n": len(mine), "positive": sum(true for _, true in pairs), **told}


def page(rows: list[dict[str, Any]]) -> str:
    """Return the documentation page."""
    lines = ["| behaviour | into | told apart | n | show it | agreement | precision | recall |", "|---" * 8 + "|"]
    for row in rows:
        figures = [
            "none" if row[name] is None else "{:.2f} [{:.2f}, {:.2f}]".format(*row[name])
            for name in ("agreement", "precision", "recall")
        ]
        cells = [row["behaviour"], row["recipient"], f"{row['told_apart']:.2f}", str(row["n"]), str(row["positive"])]
        lines.append(f"| {' | '.join([*cells, *figures])} |")
    return TEXT.format(asked=N_ASKED, table="\n".join(lines))


if __name__ == "__main__":
    measured = measure()
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(measured), "utf-8")
    print(PAGE.read_text("utf-8"))
