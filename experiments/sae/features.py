"""Do the features of a sparse autoencoder carry? A TopK SAE of SmolLM2, and what its decoder rows do in other models.

    python -m experiments.sae.features            # trains what is not kept; writes the results and the page
    python -m experiments.sae.features --report   # the page again, from results/sae.json

Training needs SAELens (`pip install 'commandv[sae]'`).
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import commandv as cv
from experiments.sae.meter import N_MATCHED, TWIN, Meter, profiled, vocabulary
from experiments.sae.training import CATEGORIES, DONOR, LAYER, N_FEATURES, N_KINDS, N_TOP, SAMPLES, K, chosen, trained

HERE = Path(__file__).resolve().parents[1]
RESULTS = HERE / "results" / "sae.json"
TABLE = HERE.parent / "docs" / "benchmarks" / "sae.md"

RECIPIENTS = ("gemma-3-270m", TWIN)
SEEDS = (1, 2, 3)  # 0 served for development: settings were changed after its figures had been seen
SHARES = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)  # strengths, as shares of the stream's typical norm
BUDGET = 0.5  # nats per token of drift
N_CANDIDATES, N_WORDS = 4000, 10


# -- the experiment ---------------------------------------------------------------------------------------------------

NATIVE, CARRIED, NOISE, OTHER = "native", "carried", "mapped noise", "another feature, carried"


def arms(recipient: str, rows: Tensor, seed: int) -> dict[str, Tensor]:
    """Return what is added in the recipient by arm, for every decoder row; lengths do not matter."""
    donor, own = profiled(DONOR), profiled(recipient)
    generator = torch.Generator().manual_seed(seed)

    def carry(directions: Tensor, **how: Any) -> Tensor:
        (carried,) = cv.carry_directions(
            {LAYER: directions}, cv.link(donor, own, **{"write_rows": "text", **how})
        ).values()
        return carried

    return {
        CARRIED: carry(rows),
        "carried by pinv (published)": carry(rows, fit=cv.Pinv(), write_rows="end", holdout=0.0),
        NOISE: carry(torch.randn(rows.shape, generator=generator)),
        "shuffled pairs": carry(rows, shuffle=seed),
        "random": torch.randn(len(rows), own.d_model, generator=generator),
    }


Moved = dict[str, tuple[Tensor, Tensor]]  # arm -> (what each direction does to the words [n, n_words], its drift [n])


def moved(meter: Meter, arms: dict[str, Tensor], share: float) -> Moved:
    """Run every arm's directions at one strength, together."""
    shifts, drift = meter.shifts(torch.cat(list(arms.values())), share)
    parts = [len(directions) for directions in arms.values()]
    return dict(zip(arms, zip(shifts.split(parts), drift.split(parts), strict=True), strict=True))


def strength(sweep: dict[float, Moved], arm: str) -> float:
    """Return the greatest strength at which an arm drifts no more than the budget on average, else the smallest."""
    return max((share for share, one in sweep.items() if one[arm][1].mean() <= BUDGET), default=min(sweep))


def compared(dev: Meter, test: Meter, arms: dict[str, Tensor], top: list[list[int]]) -> dict[str, Any]:
    """Return the sweep on development passages, and effects on test passages at strengths chosen there.

    Every arm is tested at the strength of the first one, so at equal norm, and at its own, so at about equal drift.
    """
    sweep = {share: moved(dev, arms, share) for share in SHARES}
    shares = {arm: strength(sweep, arm) for arm in arms}
    share = shares[next(iter(arms))]
    equal = moved(test, arms, share)
    own = {arm: equal[arm] if shares[arm] == share else moved(test, {arm: arms[arm]}, shares[arm])[arm] for arm in arms}
    crossed = test.effects(equal[next(iter(arms))][0], top)  # [features that steer, features whose words are looked at]
    n = len(top)
    others = (crossed.sum(0) - crossed.diagonal()) / (n - 1)

    def summary(meter: Meter, one: tuple[Tensor, Tensor], share: float) -> dict[str, Any]:
        effects = meter.effects(one[0], top).diagonal()
        return {"share": share, "effect": rounded(effects), "drift": round(float(one[1].mean()), 4)}

    return {
        "equal norm": {
            **{arm: summary(test, equal[arm], share) for arm in arms},
            OTHER: {"share": share, "effect": rounded(others), "drift": None},
        },
        "equal drift": {arm: summary(test, own[arm], shares[arm]) for arm in arms},
        "found": int((crossed.argmax(0) == torch.arange(n)).sum()),
        "sweep": {arm: [summary(dev, one[arm], at) for at, one in sweep.items()] for arm in arms},
    }


def rounded(values: Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]


@functools.cache
def shared_words() -> list[str]:
    """Return the words that donor and recipients have as one token and that the donor thinks likeliest, by text."""
    both = sorted(set.intersection(*(set(vocabulary(name)) for name in (DONOR, *RECIPIENTS))))
    plain = Meter(DONOR, "dev", both).plain
    return [both[number] for number in sorted(plain.topk(N_CANDIDATES).indices.tolist())]


@functools.cache
def meter(name: str, split: str) -> Meter:
    return Meter(name, split, shared_words())


def measured(seed: int) -> dict[str, Any]:
    """Return one SAE's quality, its chosen features, and what they do in the donor and in the recipients."""
    sae, quality = trained(seed)
    features = chosen(sae)
    rows = torch.stack([sae.feature(one["feature"]) for one in features])
    native = {NATIVE: rows}
    sweep = {share: moved(meter(DONOR, "dev"), native, share) for share in SHARES}
    raised = sweep[strength(sweep, NATIVE)][NATIVE][0].topk(N_WORDS).indices.tolist()
    for one, top in zip(features, raised, strict=True):
        one["words"] = [shared_words()[number].strip() for number in top]
    models = {DONOR: compared(meter(DONOR, "dev"), meter(DONOR, "test"), native, raised)}
    for name in RECIPIENTS:
        models[name] = compared(meter(name, "dev"), meter(name, "test"), arms(name, rows, seed), raised)
    return {"seed": seed, "quality": quality, "features": features, "models": models}


# -- report -----------------------------------------------------------------------------------------------------------

HEAD = f"""# Do the features of a sparse autoencoder carry?

Written by `python -m experiments.sae.features`. A TopK autoencoder of SmolLM2-135M-Instruct at the output of
layer {LAYER} of 30
({N_FEATURES} features, {K} active) is trained by SAELens on the built-in texts ({SAMPLES:,} draws of their tokens),
saved and loaded in SAELens' format; {len(SEEDS)} training seeds (a further one served for development). From each,
{len(CATEGORIES)} features are taken by what they fire on in these texts: for each category the one with most words of a
list (written before any steering was looked at) among its {N_TOP} strongest tokens, at least {N_KINDS} different ones.
Which words a feature raises is measured in the donor: its decoder row is added to all tokens of the development
passages, and the {N_WORDS} words whose log-probability rises most are the feature's words, out of {N_CANDIDATES:,}
likely ones that are a single token in both vocabularies. In every model the effect is measured on these words, found by
their text.

**Effect**: mean rise of the log-probability of a feature's words (nats) where a word is about to start, less that of
the {N_MATCHED} words that were most nearly as likely in the same model. Strengths are shares of the stream's typical
norm at last prompt tokens. *At equal norm* all arms have the greatest strength of the sweep at which the decoder rows
(in a recipient: carried) drift no more than {BUDGET} nats per token on the development passages; *at its own strength*
each arm has the greatest at which it does so itself. The test passages are others; neither the autoencoders nor the
converters have seen either. Intervals: 95 % bootstrap over the {len(CATEGORIES)} categories, with the seeds averaged in
each, because seeds often find the same feature.

*Carried*: through ridge converters fitted on word ends, `carry_directions`. *Mapped noise*: random directions of the
donor through the same converters, the floor. *Another feature, carried*: the mean of the other features' carried rows
on a feature's words. The twin is SmolLM2 in a rotated stream of width 768, the same function.
"""


def by_category(results: list[dict[str, Any]], name: str, arm: str, at: str = "equal norm") -> np.ndarray:
    return np.mean([one["models"][name][at][arm]["effect"] for one in results], axis=0)


def shown(values: np.ndarray, *, over: np.ndarray | None = None) -> str:
    """Return the mean with its interval, or with `over` the ratio of the means."""

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.mean(axis) / b.mean(axis)

    data = (values, np.ones_like(values) if over is None else over)
    found = stats.bootstrap(data, ratio, paired=True, method="percentile", rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return f"{ratio(*data):.2f} [{low:.2f}, {high:.2f}]"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def effect_table(results: list[dict[str, Any]], name: str) -> list[str]:
    """Return the effects of every arm in one recipient on the test passages."""
    native, n = by_category(results, DONOR, NATIVE), len(CATEGORIES)
    rows = [["**native, in the donor**", *cells(results, DONOR, NATIVE, "equal norm"), "", "", ""]]
    for arm in results[0]["models"][name]["equal norm"]:
        drifting = cells(results, name, arm, "equal drift") if arm != OTHER else [""] * 3
        rows.append([arm, *cells(results, name, arm, "equal norm"), *drifting])
    carried = by_category(results, name, CARRIED)
    found = sum(one["models"][name]["found"] for one in results)
    head = ["", "effect, at equal norm", "strength", "drift", "effect, at its own strength", "strength", "drift"]
    return [
        f"## {DONOR} -> {name}\n",
        *table(head, rows),
        f"Carried over native: {shown(carried, over=native)}; less mapped noise: "
        f"{shown(carried - by_category(results, name, NOISE))} nats. A feature's words are raised more by its own row "
        f"than by any of the other {n - 1} features' in {found} of {n * len(results)} cases "
        f"(chance: {len(results)}).\n",
    ]


def cells(results: list[dict[str, Any]], name: str, arm: str, at: str) -> list[str]:
    """Return effect, strength and drift of an arm."""
    many = [one["models"][name][at][arm] for one in results]
    shares = " / ".join(f"{share:g}" for share in sorted({one["share"] for one in many}))
    drift = f"{np.mean([one['drift'] for one in many]):.2f}" if many[0]["drift"] is not None else ""
    return [shown(by_category(results, name, arm, at)), shares, drift]


def feature_table(one: dict[str, Any]) -> list[str]:
    """Return the features of one seed."""
    effects = [m["equal norm"][NATIVE if name == DONOR else CARRIED]["effect"] for name, m in one["models"].items()]
    rows = [
        [category["category"], str(category["feature"]), ", ".join(category["tokens"][:4]),
         f"{category['precision']:.2f}", ", ".join(category["words"][:6]), *(f"{value:.2f}" for value in own)]
        for category, *own in zip(one["features"], *effects, strict=True)
    ]  # fmt: skip
    return table(["category", "feature", "strongest tokens", "share", "words it raises", *one["models"]], rows)


def sweep_table(results: list[dict[str, Any]], name: str) -> list[str]:
    """Return effect and drift by strength on the development passages, means over features and seeds."""
    rows = []
    for arm in results[0]["models"][name]["sweep"]:
        points = zip(*(one["models"][name]["sweep"][arm] for one in results), strict=True)
        rows.append([arm, *(
            f"{np.mean([p['effect'] for p in many]):.2f} ({np.mean([p['drift'] for p in many]):.2f})" for many in points
        )])  # fmt: skip
    return table([name, *(f"{share:g}" for share in SHARES)], rows)


def quality_table(results: list[dict[str, Any]]) -> list[str]:
    rows = []
    for one in results:
        q = one["quality"]
        counts = [f"{q['l0']:.1f}", str(q["tokens_trained"]), str(q["tokens_held_out"])]
        rows.append([str(one["seed"]), f"{q['fvu']:.3f}", str(q["dead"]), *counts])
    return table(["seed", "FVU, held out", "never fire", "active per token", "tokens trained on", "held out"], rows)


def report(results: list[dict[str, Any]]) -> str:
    lines = [HEAD]
    for name in RECIPIENTS:
        lines += effect_table(results, name)
    lines += ["## The autoencoders\n", *quality_table(results)]
    lines += [
        "## The features of the first seed, with their effects on the test passages\n",
        *feature_table(results[0]),
    ]
    lines += ["## The whole sweep: effect (drift) on the development passages\n"]
    for name in (DONOR, *RECIPIENTS):
        lines += sweep_table(results, name)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the tables")
    if not parser.parse_args().report:
        RESULTS.write_text(json.dumps([measured(seed) for seed in SEEDS], indent=1) + "\n", "utf-8")
    TABLE.write_text(report(json.loads(RESULTS.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
