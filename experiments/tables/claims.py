"""The paper's claims, each with what the small studies say of it: confirmed, refuted, or not examinable here.

    make tables      # this page and every other, from what is committed
    make evidence    # measures anew what is stale of the studies first

A verdict follows from figures by the rule that stands beside it; nothing is worded by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from commandv.evaluation import Score, difference, pooled
from commandv.evaluation.report.findings import groups
from commandv.evaluation.report.tables import older_code
from commandv.evaluation.results import Cell, load_run

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "studies" / "results"
SPEED = ROOT / "benchmarks" / "results" / "speed.json"

Labels = list[list[float | None]]


def cells(study: str) -> list[Cell]:
    return [cell for cell in load_run(RUNS / study).cells if cell.state == "done"]


def labels(some: Iterable[Cell], method: str, task: int = 0) -> Labels:
    """Return one row per cell: by default of the behaviour's own task, which is first in every arm."""
    found = []
    for cell in some:
        arm = next(arm for arm in cell.arms if arm.method == method)
        found.append(list(arm.labels.values())[task])
    return found


def shown(score: Score) -> str:
    return f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"


def rate(some: list[Cell], method: str) -> Score:
    return pooled(method, labels(some, method), "rate")


def within_family() -> tuple[str, str, str]:
    """A sibling counts as family: the same function, with damage."""
    family, across = cells("siblings"), cells("across-families")
    lines, better = [], []
    for behaviour in sorted({cell.behaviour for cell in family}):
        near = [cell for cell in family if cell.behaviour == behaviour and cell.recipient == "noisy"]
        far = [cell for cell in across if cell.behaviour == behaviour and cell.donor == "smollm2"]
        one, other = rate(near, "pasted"), rate(far, "pasted")
        lines.append(f"{behaviour}: noisy sibling {shown(one)}, other family {shown(other)}")
        better.append(one.low > other.high)
        if one.high < other.low:
            return "refuted", "; ".join(lines), RULE_MORE
    return ("confirmed" if any(better) else "not told apart"), "; ".join(lines), RULE_MORE


RULE_MORE = "confirmed if for some behaviour the intervals lie apart in this order, and for none in the other"


def list_against(method: str, *, both: bool) -> tuple[str, str, str]:
    """Compare the pasted list with another arm of the same cells, direction by direction."""
    some = [cell for cell in cells("across-families") if cell.behaviour == "numbered-list"]
    lines, signs = [], []
    for recipient in sorted({cell.recipient for cell in some}):
        own = [cell for cell in some if cell.recipient == recipient]
        gap = difference("gap", labels(own, "pasted"), labels(own, method), "rate")
        lines.append(f"into {recipient}: {shown(rate(own, 'pasted'))} against {shown(rate(own, method))}")
        signs.append(1 if gap.low > 0 else -1 if gap.high < 0 else 0)
    if both:
        rule = "confirmed if the paired difference is above 0 in both directions"
        return ("confirmed" if min(signs) > 0 else "refuted"), "; ".join(lines), rule
    rule = "confirmed if the paired difference is above 0 for a direction and below 0 for none"
    verdict = "not told apart" if not any(signs) else "confirmed" if min(signs) >= 0 else "refuted"
    return verdict, "; ".join(lines), rule


def weak_donor() -> tuple[str, str, str]:
    some = cells("weak-donor")
    lines, moved = [], []
    for cell in some:
        gap = difference("gap", labels([cell], "pasted"), labels([cell], "unmodified"), "rate")
        donor = rate([cell], "donor")
        lines.append(f"{cell.donor} -> {cell.recipient}: donor {shown(donor)}, pasted minus unmodified {shown(gap)}")
        moved.append(gap.low > 0 or gap.high < 0)
    return ("refuted" if any(moved) else "confirmed"), "; ".join(lines), "refuted if a paired difference excludes 0"


RULE_CASE = (
    "the reports' verdicts (above unmodified and random, p adjusted; not examinable where the directly trained adapter "
    "does nothing), the twin apart: confirmed if all pairs of families that can be examined cross, refuted if none does"
)


def case_study(study: str) -> tuple[str, str, str]:
    """Tell whether a behaviour crosses between families, and beside it what it did in the twin."""
    lines, outcomes = [], []
    for group in groups(load_run(RUNS / study)):
        figures = {row.arm: row.found.score for row in group.tables[0].rows if row.found}
        names = ("unmodified", "pasted", "random", "text-bridge", "direct")
        told = ", ".join(f"{name} {shown(figures[name])}" for name in names if name in figures)
        lines.append(f"{group.pair}: {group.verdict.word} ({told})")
        if "twin" not in group.pair and group.verdict.word != "not examinable":
            outcomes.append(group.verdict.word in ("crosses", "partly"))
    if not outcomes:
        return "not examinable", "; ".join(lines), RULE_CASE
    verdict = "confirmed" if all(outcomes) else "in one direction" if any(outcomes) else "refuted"
    return verdict, "; ".join(lines), RULE_CASE


def reasoning_kept() -> tuple[str, str, str]:
    rule = "refuted if a paired difference lies below 0; a model that is right less than once in ten is not examined"
    lines, lost = [], []
    for cell in cells("auto-cot"):
        before = pooled("right", labels([cell], "unmodified", 1), "rate")
        gap = difference("gap", labels([cell], "pasted", 1), labels([cell], "unmodified", 1), "rate")
        lines.append(f"{cell.donor} -> {cell.recipient}: right {shown(before)}, pasted minus unmodified {shown(gap)}")
        if before.value >= 0.1:
            lost.append(gap.high < 0)
    verdict = "not examinable" if not lost else "refuted" if any(lost) else "not refuted"
    return verdict, "; ".join(lines), rule


def converter_seconds() -> tuple[str, str, str]:
    rule = "confirmed if 16 layer pairs of 3072 <-> 4096 from 1,030 prompts take under 6.35 s on this machine"
    if not SPEED.exists():
        return "not measured", "run benchmarks/speed.py", rule
    cell = json.loads(SPEED.read_text())["cells"]["N 1030, 3072 <-> 4096"]["seconds"]
    published = min(cell["published"]["median"], cell["published, one core per pair"]["median"])
    text = (
        f"as published {published:.1f} s on 2 cores, ours {cell['ridge']['median']:.1f} s (ridge), "
        f"{cell['exact']['median']:.1f} s (the same solution, exact)"
    )
    return ("confirmed" if cell["ridge"]["median"] < 6.35 else "refuted"), text, rule


CLAIMS = [
    ("Within a family behaviours transfer better than across", within_family),
    (
        "A layer map that minimises the error is worse than a map by depth",
        lambda: list_against("lowest-error", both=False),
    ),
    ("An adapter that does little to its donor does nothing in the recipient", weak_donor),
    ("Task-agnostic profile prompts suffice: the list beats random", lambda: list_against("random", both=True)),
    ("Refusal enhancement crosses (here by a recipe of ours)", lambda: case_study("refusal")),
    (
        "Refusal suppression crosses (here over-refusal, in models made to over-refuse, such prompts in the profiles)",
        lambda: case_study("over-refusal"),
    ),
    (
        "Automatic chain of thought crosses (here: reasons before the answer, such prompts in the profiles)",
        lambda: case_study("auto-cot"),
    ),
    ("Reasoning accuracy is kept (here: arithmetic)", reasoning_kept),
    ("Converters take seconds (6.35 s on a laptop)", converter_seconds),
    (
        "Carrying activations beats what the donor's texts alone can carry, for the list (our claim, not the paper's)",
        lambda: list_against("text-bridge", both=True),
    ),
]


def page() -> str:
    """Return the page."""
    lines = [
        "# The paper's claims at this size\n",
        "Written by `make tables` from the small studies (`studies/small/`, reports in "
        "[studies](../studies/README.md)). Two models of 135M and 270M parameters and siblings of the first; 95 % "
        "intervals; a verdict holds for these and follows the rule beside it. `studies/paper/` asks the same of the "
        "paper's own models, of 3B to 8B, which are out of reach here.\n",
        "| claim | here | figures | rule |",
        "|---|---|---|---|",
    ]
    for claim, examine in CLAIMS:
        verdict, figures, rule = examine()
        lines.append(f"| {claim} | **{verdict}** | {figures} | {rule} |")
    small = [file.stem for file in sorted((ROOT / "studies" / "small").glob("*.yaml")) if (RUNS / file.stem).exists()]
    older = [name for name in small if older_code(load_run(RUNS / name))]
    if older:
        lines.append(f"\nThe code has changed since these were measured, as their reports say: {', '.join(older)}.")
    took = sum(cell.seconds for name in small for cell in cells(name))
    lines.append(f"\nThe cells of the {len(small)} small studies took {took / 60:.0f} minutes in all.")
    return "\n".join(lines) + "\n"
