"""The mapper ablation: every way to fit a converter on the same rows, and ways to choose rows, both ways.

    python -m experiments.tables.mappers            # everything; writes the results and the page
    python -m experiments.tables.mappers --quick    # one layer pair and 8 prompts each way; only printed
    python -m experiments.tables.mappers --report   # the table again, from results/mappers.json

Figures are on prompts that no fit has seen. The shipped numbered-list adapter of one model is pasted into the other at
scale 1 with nothing chosen, on the same layers for every method, and its rate is that of development questions; all of
its layers that are matched to the recipient's last third are used.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import commandv as cv
from commandv.evaluation import load_task

HERE = Path(__file__).resolve().parents[1]
RESULTS = HERE / "results" / "mappers.json"
TABLE = HERE.parent / "docs" / "benchmarks" / "mappers.md"
SMOL, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
BEHAVIOUR, N_DEV = "numbered-list", 48
LONGER = {"epochs": 60, "learning_rate": 1e-3}
GUARD = 0.99  # of the variance that a truncated fit keeps
ANCHORS = 256


def truncated(x: torch.Tensor, y: torch.Tensor) -> cv.Dense:
    """Fit by least squares on the leading principal components alone."""
    mean_x, mean_y = x.double().mean(0), y.double().mean(0)
    u, s, vh = torch.linalg.svd(x.double() - mean_x, full_matrices=False)
    kept = int((s.square().cumsum(0) < GUARD * s.square().sum()).sum()) + 1
    matrix = vh[:kept].T @ (u[:, :kept].T @ (y.double() - mean_y) / s[:kept, None])
    return cv.Dense(matrix, mean_y - mean_x @ matrix)


def anchored(x: torch.Tensor, y: torch.Tensor) -> cv.Dense:
    """Fit on anchors alone, each as far as can be from those before it, after the first."""
    rows = x.double() / x.double().std(0).clamp(min=1e-6)
    chosen, nearest = [0], (rows - rows[0]).norm(dim=1)
    while len(chosen) < min(ANCHORS, len(x)):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).norm(dim=1))
    return truncated(x[chosen], y[chosen])


METHODS: dict[str, dict[str, Any]] = {  # arguments of `link`
    "pinv (published)": {"fit": cv.Pinv()},
    "affine": {"fit": cv.Affine()},
    "ridge": {},
    "ridge, written by last-token rows": {"write_rows": "end"},
    "ridge, written by both": {"write_rows": "both"},
    "reduced rank": {"fit": cv.ReducedRank()},
    "truncated": {"fit": truncated},
    "anchors": {"fit": anchored},
    "Procrustes": {"fit": cv.Procrustes()},
    "Fourier ridge": {"fit": cv.FourierRidge()},
    "autoencoder": {"fit": cv.Autoencoder()},
    "its affine twin": {"fit": cv.Autoencoder(relu=False)},
    "autoencoder, longer": {"fit": cv.Autoencoder(**LONGER)},
    "its affine twin, longer": {"fit": cv.Autoencoder(relu=False, **LONGER)},
}


@functools.cache
def model(name: str) -> cv.LM:
    return cv.load_model(name)


@functools.cache
def profiled(name: str) -> cv.Profile:
    return cv.profile(model(name), cv.load_prompts("builtin:general"), text=cv.load_prompts("builtin:text"))


def layer_pairs(donor: str, recipient: str, n_pairs: int | None) -> tuple[cv.Adapter, list[cv.LayerPair]]:
    """Return the shipped adapter and the first of its layer pairs within the recipient's last third."""
    adapter = cv.load_adapter(f"builtin:{BEHAVIOUR}@{donor}")
    allowed = set(cv.last_third(profiled(recipient).n_layers))
    pairs = [p for p in cv.proportional(profiled(donor), profiled(recipient), adapter.layers) if p.recipient in allowed]
    return adapter, pairs[:n_pairs]


# -- one method -------------------------------------------------------------------------------------------------------


def per_prompt(predicted: torch.Tensor, true: torch.Tensor, prompts: np.ndarray) -> dict[str, dict[int, float]]:
    """Return each prompt's part of the standardised R², 1 - error, and its mean cosine."""
    variance = true.var(0, correction=0)
    keep = variance > 1e-12 * variance.max()
    error = ((predicted - true).square()[:, keep] / variance[keep]).mean(1).numpy()
    z, t = (((rows - true.mean(0)) / true.std(0))[:, keep] for rows in (predicted, true))
    cosine = torch.nn.functional.cosine_similarity(z, t).numpy()
    return {
        name: {int(p): float(values[prompts == p].mean()) for p in np.unique(prompts)}
        for name, values in (("r2", 1 - error), ("cosine", cosine))
    }


def pooled(many: list[dict[int, float]]) -> dict[str, Any]:
    """Return the mean over prompts of the mean over layer pairs, with a 95 % bootstrap interval over prompts."""
    values = np.array([np.mean([one[p] for one in many]) for p in many[0]])
    drawn = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def measured(donor: str, recipient: str, how: dict[str, Any], n_pairs: int | None, n_dev: int) -> dict[str, Any]:
    """Fit, measure and paste one method one way."""
    adapter, pairs = layer_pairs(donor, recipient, n_pairs)
    link = cv.link(profiled(donor), profiled(recipient), **how)
    seconds, parts, facts = [], [], []
    made: dict[int, tuple[cv.Intervention, ...]] = {}
    for pair in pairs:
        start = time.perf_counter()
        carried, *chosen = link.carry(adapter.interventions, [pair])[pair]
        seconds.append(time.perf_counter() - start)
        made[pair.recipient] = (*made.get(pair.recipient, ()), *carried)
        facts.append(chosen)
        found = {}
        for side, converter in (("read", link.into(pair)), ("write", link.back(pair))):
            of_donor, of_recipient, prompts = link.rows(side, pair, held_out=True)
            x, y = (of_recipient, of_donor) if side == "read" else (of_donor, of_recipient)
            for name, values in per_prompt(converter(x.double()), y.double(), prompts).items():
                found[f"{side}_{name}"] = values
        parts.append(found)
    pasted = cv.Adapter(made, profiled(recipient).model, adapter.name)
    return {
        **{name: pooled([part[name] for part in parts]) for name in parts[0]},
        **behaviour(recipient, pasted, n_dev),
        "seconds": {"median": float(np.median(seconds)), "min": min(seconds), "max": max(seconds)},
        "parameters": pasted.n_parameters,
        "chosen": facts,
    }


def behaviour(name: str, adapter: cv.Adapter | None, n_dev: int) -> dict[str, Any]:
    """Return how many development questions are answered with a list, and how many answers loop."""
    found = cv.measure(model(name), load_task(BEHAVIOUR), adapter, split="dev", limit=n_dev)
    return {"behaviour": found.score()._asdict(), "loops": found.loop_rate()._asdict()}


def memory(method: str, donor: str, recipient: str) -> None:
    """Print by how many bytes one layer pair's fits raise the peak of this process; run in a process of its own."""
    one, two = (cv.load_profile(path) for path in (donor, recipient))
    adapter = cv.load_adapter(f"builtin:{BEHAVIOUR}@{GEMMA}")
    pair = cv.LayerPair(adapter.layers[-1], cv.last_third(two.n_layers)[0])
    link = cv.link(one, two, **METHODS[method])
    for side in ("read", "write"):
        link.rows(side, pair)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = peak()
    link.carry(adapter.interventions, [pair])
    print(peak() - before)


def peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_way(
    donor: str, recipient: str, methods: dict[str, Any], n_pairs: int | None, n_dev: int
) -> dict[str, Any]:
    """Measure every method from one donor to one recipient."""
    adapter, pairs = layer_pairs(donor, recipient, n_pairs)
    rows = {}
    link = cv.link(profiled(donor), profiled(recipient))
    for side, name in (("read", "end"), ("write", "text")):
        fitted, unseen = (len(link.rows(side, pairs[0], held_out=held)[2]) for held in (False, True))
        rows[name] = {"fitted": fitted, "held_out": unseen}
    way: dict[str, Any] = {"donor": donor, "recipient": recipient, "pairs": [list(pair) for pair in pairs]}
    way |= {"rows": rows, "unmodified": behaviour(recipient, None, n_dev)}
    way |= {"donor with its adapter": behaviour(donor, adapter, n_dev), "methods": {}}
    for name, how in methods.items():
        way["methods"][name] = measured(donor, recipient, how, n_pairs, n_dev)
        print(donor, name, json.dumps({k: v for k, v in way["methods"][name].items() if k != "chosen"}), flush=True)
    return way


def run(quick: bool) -> dict[str, Any]:
    n_pairs, n_dev = (1, 8) if quick else (None, N_DEV)
    methods = {name: METHODS[name] for name in ("ridge", "Fourier ridge", "autoencoder")} if quick else METHODS
    paths = [str(profiled(name).path) for name in (GEMMA, SMOL)]
    command = [sys.executable, "-m", "experiments.tables.mappers", "--memory"]
    bytes_of = {
        name: int(subprocess.run([*command, name, *paths], check=True, capture_output=True, text=True).stdout)
        for name in methods
    }
    ways = [measured_way(*names, methods, n_pairs, n_dev) for names in ((GEMMA, SMOL), (SMOL, GEMMA))]
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "peak_bytes": bytes_of, "ways": ways}


# -- report -----------------------------------------------------------------------------------------------------------

HEAD = f"""# Mappers

Written by `python -m experiments.tables.mappers`. Every method is fitted on the same rows of the cached profiles
(`builtin:general`, `builtin:text`): last-token rows for reading (recipient -> donor), text rows for writing, but where
the row says otherwise. Read and write: standardised R² and cosine of centred, standardised rows on held-out prompts,
mean over the layer pairs, with 95 % intervals from a bootstrap over prompts. Behaviour: the share of development
questions answered with a numbered list of two different items once the donor's shipped adapter is pasted on these
layer pairs only, at scale 1, nothing chosen, and of answers that loop; 95 % Wilson intervals. Seconds: both fits of
one layer pair, one thread, on a machine shared with other jobs. Memory: by how much both fits raise the peak of a
fresh process.

*Fourier ridge* is kernel ridge with a Gaussian kernel, by random features. *autoencoder* and *its affine twin* have the
settings of arXiv 2503.04429 (3 epochs at 1e-4, batches of 16 rows, 4 accumulated), which was given far more rows;
*longer* is at most 60 epochs at 1e-3, stopped on a tenth of the prompts. *truncated* is least squares on the principal
components that hold {GUARD:.0%} of the variance, a guard against small singular values; *anchors* is the same on the
{ANCHORS} rows that lie farthest apart.
"""


COLUMNS = {"read_r2": "read R²", "read_cosine": "read cosine", "write_r2": "write R²", "write_cosine": "write cosine",
           "behaviour": "behaviour", "loops": "loops"}  # fmt: skip


def shown(score: dict[str, Any]) -> str:
    return f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def report(result: dict[str, Any]) -> str:
    out = [HEAD]
    for way in result["ways"]:
        pairs = ", ".join(f"{a} -> {b}" for a, b in way["pairs"])
        rows = way["rows"]
        some = next(iter(way["methods"].values()))
        out += [
            f"## {way['donor']} -> {way['recipient']}\n",
            f"Layer pairs {pairs}. Rows fitted: {rows['end']['fitted']} for reading, {rows['text']['fitted']} for "
            f"writing; held out: {rows['end']['held_out']} rows of {some['read_r2']['n']} prompts, and "
            f"{rows['text']['held_out']} of {some['write_r2']['n']}. Behaviour on n = {some['behaviour']['n']}: "
            f"unmodified {shown(way['unmodified']['behaviour'])} (loops {shown(way['unmodified']['loops'])}), donor "
            f"with its adapter {shown(way['donor with its adapter']['behaviour'])}.\n",
            f"| method | {' | '.join(COLUMNS.values())} | s per pair | memory | held |",
            "|---" * 10 + "|",
        ]
        for name, one in way["methods"].items():
            figures = (one[key] for key in COLUMNS)
            out.append(
                f"| {name} | {' | '.join(map(shown, figures))} | {one['seconds']['median']:.2f} | "
                f"{result['peak_bytes'][name] / 1e6:.0f} MB | {one['parameters'] * 4 / 1e6:.1f} MB |"
            )
        out.append("")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer pair, three methods; prints the table only")
    parser.add_argument("--report", action="store_true", help="the table again, from the results")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    if options.memory:
        memory(*options.memory)
        return
    result = json.loads(RESULTS.read_text()) if options.report else run(options.quick)
    text = report(result)
    print(text)
    if options.quick:
        return
    for path, content in ((RESULTS, json.dumps(result, indent=1) + "\n"), (TABLE, text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")


if __name__ == "__main__":
    main()
