"""How often the intervals of every table hold the truth, where the truth is known: simulated prompts and seeds.

A label of an arm is 1 where level + prompt + seed + noise > 0, all normal, the noise of variance 1; so prompts and
seeds are both random effects and the true rate is Phi(level / sqrt(1 + prompt² + seed²)). Arms share prompts; adapters
share half of their seeds' variance; the unmodified model has one seed, as in a study. With one seed the truth is that
seed's.
Writes results/coverage.json and docs/benchmarks/coverage.md.

    python -m benchmarks.coverage [draws]
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from commandv.evaluation.scores import pooled
from commandv.evaluation.statistics import difference, recovered_fraction

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "benchmarks" / "coverage.md"
RATES, PROMPTS, SEEDS = (0.05, 0.2, 0.5, 0.8, 0.95), (48, 128), (1, 3)
PROMPT_SD = (0.5, 1.0, 2.0)
SEED_SD = (0.1, 0.3, 0.5)  # at a rate of one half, seeds between .46 and .54, .38 and .62, .31 and .69 (one sd)
DRAWS = 400
Spread = tuple[float, float]  # of prompts, of seeds
Found = list[tuple[str, int, float, int, Spread, float]]  # figure, seeds, rate, prompts, spreads: its coverage


def level(rate: float, *spreads: float) -> float:
    """Return the level at which the rate is as wanted."""
    return float(stats.norm.ppf(rate) * np.sqrt(1 + sum(one**2 for one in spreads)))


def arms(
    rng: np.random.Generator, rates: tuple[float, ...], prompts: int, seeds: int, spread: Spread
) -> tuple[list[np.ndarray], list[float]]:
    """Draw arms' labels [seeds, prompts] and their true rates; the first arm has one seed, as the unmodified model."""
    by_prompt = rng.normal(size=(1, prompts)) * spread[0]
    shared, half = rng.normal(size=(seeds, 1)), spread[1] * 0.5**0.5
    labels, truths = [], []
    for number, rate in enumerate(rates):
        seeded = number > 0
        by_seed = half * (shared + rng.normal(size=(seeds, 1))) if seeded else np.zeros((1, 1))
        base = level(rate, spread[0], *([spread[1]] if seeded else []))
        labels.append((base + by_prompt + by_seed + rng.normal(size=(len(by_seed), prompts)) > 0).astype(float))
        own = float(stats.norm.cdf((base + by_seed[0, 0]) / (1 + spread[0] ** 2) ** 0.5))
        truths.append(rate if seeds > 1 else own)
    return labels, truths


def covered(rng: np.random.Generator, rate: float, prompts: int, seeds: int, spread: Spread) -> dict[str, bool]:
    """Return for one draw whether each interval holds its truth, and whether nothing was found where nothing is."""
    rates = {0.05: (0.02, 0.05, 0.6), 0.95: (0.3, 0.95, 0.98)}.get(rate, (0.02, rate, 0.98))
    (base, pasted, best), (t0, t1, t2) = arms(rng, rates, prompts, seeds, spread)
    one, gap = pooled("", pasted, "rate"), difference("", pasted, base, "rate")
    found = {"rate": one.low <= t1 <= one.high, "difference": gap.low <= t1 - t0 <= gap.high}
    fraction = recovered_fraction(pasted, base, best, "rate", "more")
    if fraction is not None:
        found["recovered"] = fraction.low <= (t1 - t0) / (t2 - t0) <= fraction.high
    same = (spread[0], spread[1] if seeds > 1 else 0.0)
    (_, a, b), _ = arms(rng, (rate, rate, rate), prompts, seeds, same)
    same_rates = difference("", a, b, "rate")  # p is at most .05 where this leaves 0 out
    found["nothing found"] = same_rates.low <= 0 <= same_rates.high
    words = rng.normal(size=(1, prompts)) * spread[0] + rng.normal(size=(seeds, 1)) * same[1]
    mean = pooled("", words + rng.normal(size=(seeds, prompts)), "words")
    return found | {"mean": mean.low <= 0 <= mean.high}


def configurations() -> Iterator[tuple[float, int, int, Spread]]:
    """Yield (rate, prompts, seeds, spreads)."""
    yield from itertools.product(RATES, PROMPTS, SEEDS, itertools.product(PROMPT_SD, SEED_SD))


def simulated(draws: int) -> Found:
    """Return the coverage of every figure in every configuration."""
    out: Found = []
    for number, (rate, prompts, seeds, spread) in enumerate(configurations()):
        rng = np.random.default_rng([number, draws])
        many = [covered(rng, rate, prompts, seeds, spread) for _ in range(draws)]
        for name in many[0] | many[-1]:
            given = [one[name] for one in many if name in one]
            out.append((name, seeds, rate, prompts, spread, round(float(np.mean(given)), 4)))
    return out


def page(kept: dict[str, Any]) -> str:
    """Return the page, from the results."""
    draws, found = kept["draws"], kept["coverage"]
    n, exact = len(PROMPTS) * len(PROMPT_SD) * len(SEED_SD), 1.96 * (0.95 * 0.05 / draws) ** 0.5
    lines = [
        "# Coverage of the intervals",
        "",
        "How often the 95 % intervals of the tables hold the truth, in simulations where it is known: prompts and",
        "seeds are both random, as `benchmarks/coverage.py` says. Wanted: .95. Each cell is the mean over",
        f"{', '.join(map(str, PROMPTS))} prompts and three spreads each of prompts and seeds, with the lowest and the",
        f"highest of these {n} in brackets; {draws:,} draws each, so that one of .95 is known to within {exact:.3f}.",
        '"Nothing found" is the share of tests of two arms that do the same which do not reject at .05.',
        "",
    ]
    names = list(dict.fromkeys(one[0] for one in found))
    for seeds in SEEDS:
        title = "One seed: intervals are over prompts, for this seed" if seeds == 1 else f"{seeds} seeds"
        lines += [f"## {title}", "", "| true rate | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
        for rate in RATES:
            cells = []
            for name in names:
                values = [one[-1] for one in found if one[:3] == [name, seeds, rate]]
                cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            lines.append(f"| {rate} | " + " | ".join(cells) + " |")
        lines.append("")
    values = np.array([one[-1] for one in found])
    low, high = (values < 0.93).mean(), (values > 0.97).mean()
    lines += [
        f"Of all {len(values):,} combinations {1 - low - high:.0%} lie between .93 and .97, {high:.0%} above and "
        f"{low:.0%} below. Above:",
        "rates near 0 and 1 on few prompts, and seeds that hardly differ (three cannot show that they do not). Below:",
        "seeds that differ most, on the most prompts: three of them then decide the estimate.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    n_draws = int(sys.argv[1]) if len(sys.argv) > 1 else DRAWS
    rows = ",\n ".join(json.dumps(one) for one in simulated(n_draws))
    RESULTS.write_text(f'{{"draws": {n_draws}, "coverage": [\n {rows}]}}\n', "utf-8")
    text = page(json.loads(RESULTS.read_text("utf-8")))
    PAGE.write_text(text, "utf-8")
    print(text)
