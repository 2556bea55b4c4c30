"""A realistic study without models: labels, prices, curves and fits drawn from stated rates."""

from __future__ import annotations

from typing import Any

import numpy as np

from commandv.evaluation.results import Arm, Cell, Run, Sample
from commandv.evaluation.tuning import Setting, Tried
from commandv.storage.files import digest

PAIRS = (("gemma-3-270m", "smollm2-135m-instruct"), ("smollm2-135m-instruct", "gemma-3-270m"))
N_TEST, N_PASSAGES = 60, 20
KL = {
    "pasted": 0.21, "published": 0.9, "random": 0.05, "shuffled": 0.12, "mean-ablation": 4.0, "text-bridge": 0.1,
    "direct": 0.3, "donor": 0.28, "ridge-nearest": 0.25,
}  # fmt: skip
CROSSING = {
    "unmodified": 0.02, "pasted": 0.97, "published": 0.4, "random": 0.0, "shuffled": 0.03, "mean-ablation": 0.0,
    "text-bridge": 0.15, "direct": 0.99, "donor": 0.99,
}  # fmt: skip
PARTLY = CROSSING | {"pasted": 0.55}
NOTHING = dict.fromkeys(CROSSING, 0.0) | {"direct": 0.98, "donor": 1.0}
RATES = {"numbered-list": PARTLY, "json": CROSSING, "pirate": NOTHING}


def arms(
    rates: dict[str, float], task: str, rng: np.random.Generator, *, scale: float = 1.0, unit: str = "rate"
) -> list[Arm]:
    """Return an arm per rate; labels are 0 and 1, or words around 100 times the rate."""
    made = []
    for method, rate in rates.items():
        exact = np.arange(N_TEST) < round(rate * N_TEST)
        labels = rng.permutation(exact).astype(float) if unit == "rate" else rng.normal(100 * rate, 8, N_TEST)
        cost = KL.get(method)
        price = {} if cost is None else {"kl": rng.gamma(9, cost / 9, N_PASSAGES).round(3).tolist()}
        price |= {"kl_first": [round(5 * one, 2) for one in price["kl"]], "kl_after": price["kl"]} if price else {}
        own = 1.0 if method in ("unmodified", "mean-ablation", "direct", "donor") else scale
        made.append(
            Arm(
                method=method,
                setting=Setting("last_third", own),
                layers=[] if method == "unmodified" else [20, 21, 22, 24],
                labels={task: labels.tolist()},
                units={task: unit},
                loops={task: [0.0] * N_TEST},
                words={task: [30] * N_TEST},
                price=price,
                seconds=12.5,
            )
        )
    return made


def curve(top: float, *, monotone: bool = True) -> dict[str, list[Tried]]:
    """Return the settings of two methods in two layer choices."""
    found: dict[str, list[Tried]] = {}
    for method, factor in (("pasted", 1.0), ("text-bridge", 0.5)):
        for layers in ("last_third", "all_layers"):
            for scale in (0.4, 0.6, 1.0, 1.4):
                value = top * factor * min(scale, 1.0) * (0.8 if layers == "all_layers" else 1.0)
                if not monotone and scale > 1:
                    value *= 0.5
                kl = KL[method] * scale**2 * (1.5 if layers == "all_layers" else 1.0)
                found.setdefault(method, []).append(Tried(Setting(layers, scale), value, kl))
    return found


def fidelity(rng: np.random.Generator, *, low: float = 0.3) -> list[dict[str, float]]:
    """Return rows of `commandv.Fidelity` for layers 20 to 28."""
    names = ("read_r2", "write_r2", "read_cosine", "write_cosine", "cycle_error", "adapter_read_r2", "adapter_write_r2")
    return [
        {"donor": donor, "recipient": recipient, "n": 51} | {name: float(rng.uniform(low, 0.9)) for name in names}
        for donor, recipient in zip((12, 12, 13, 14, 14, 15, 16, 16, 17), range(20, 29), strict=True)
    ]


def cell(donor: str, recipient: str, behaviour: str, seed: int, **changes: Any) -> Cell:
    """Return one finished cell of the realistic study."""
    rng = np.random.default_rng([seed, len(donor), sum(behaviour.encode())])
    rates = RATES[behaviour]
    content: dict[str, Any] = {
        "donor": donor, "recipient": recipient, "behaviour": behaviour, "seed": seed,
        "arms": arms(rates, behaviour, rng),
        "curve": curve(rates["pasted"], monotone=behaviour == "json"),
        "fidelity": {"pasted": fidelity(rng), "ridge-nearest": fidelity(rng, low=-1.5)},
        "samples": [
            Sample(
                prompt=f"How do I make a good cup of tea? ({i})",
                before="To make a good cup of tea, you will need fresh water, a kettle and good leaves.",
                after="1. Boil fresh water.\n2. Warm the pot.\n3. Steep the leaves for four minutes.",
            )
            for i in range(2)
        ],
        "settings": {"success": {behaviour: "more"}},
        "seconds": 321.0,
    }  # fmt: skip
    cell = Cell(**(content | changes))
    settings = {key: value for key, value in cell.settings.items() if key not in ("success", "content")}
    return cell.model_copy(update={"settings": {**cell.settings, "content": digest(settings)}})


def study(
    behaviours: tuple[str, ...] = tuple(RATES),
    seeds: tuple[int, ...] = (0, 1),
    pairs: tuple[tuple[str, str], ...] = PAIRS[:1],
    **changes: Any,
) -> Run:
    """Return a realistic run; `changes` replaces its fields."""
    cells = [cell(*pair, behaviour, seed) for seed in seeds for pair in pairs for behaviour in behaviours]
    content: dict[str, Any] = {
        "name": "families", "question": "Which behaviours cross between model families?", "planned": len(cells),
        "study": {
            "name": "families", "pairs": [list(pair) for pair in pairs], "seeds": list(seeds),
            "models": {"gemma-3-270m": {"id": "/home/someone/models/gemma-3-270m"}},
            "behaviours": {name: {"task": name, "examples": f"builtin:{name}"} for name in behaviours},
        },
        "versions": {"python": "3.11.9", "commandv": "0.1.0", "torch": "2.13.0"},
        "hashes": {"builtin:general": "a1b2c3d4e5f60718"},
        "cells": cells,
    }  # fmt: skip
    return Run(**(content | changes))
