"""Do steering vectors and probes carry? Difference-in-means vectors and logistic probes between the packaged models.

    python benchmarks/vectors.py     # writes results/vectors.json and ../docs/benchmarks/vectors.md

Harmful against harmless requests (AdvBench and our own questions, at the last prompt token) and the sentiment of film
reviews (mean over the prompt's tokens), from ../shared/data; nothing is generated. Per seed the donor's vector or probe
comes from 96 pairs drawn from one half of the prompts, is carried, and is compared with the recipient's own from 96
pairs of the other half. Cosines are of standardised vectors (each dimension in units of its standard deviation in the
recipient's profile), means over the matched layers from a third of the depth up. Controls: random vectors, and
converters fitted on wrongly paired rows; the ceiling is the recipient's own vector from the first half.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import commandv as cv
from commandv.evaluate.scores import mean
from commandv.profiles import Places
from commandv.prompts import Prompt, PromptSet
from commandv.steering import carry_directions, carry_probes
from commandv.steering.methods import auc, fit_probe
from commandv.steering.reading import profile_stream, prompt_states

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent.parent / "shared" / "data"
RESULTS = ROOT / "results" / "vectors.json"
TABLE = ROOT.parent / "docs" / "benchmarks" / "vectors.md"

MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
SEEDS, PAIRS = (0, 1, 2), 96
CONCEPTS = {"harmful": "l1", "sentiment": "all"}
TARGETS = {"harmful": 0.88, "sentiment": 0.60}
Rows = Literal["end", "text", "both"]
# Where the converters come from: places of text rows in the profile, rows of the writing fit, the fit.
METHODS: dict[str, tuple[Places, Rows, cv.Ridge | cv.Pinv | cv.Affine]] = {
    "ridge, line starts": ("lines", "text", cv.Ridge()),
    "ridge, last tokens": ("lines", "end", cv.Ridge()),
    "ridge, word ends": ("words", "text", cv.Ridge()),
    "ridge, word ends and last tokens": ("words", "both", cv.Ridge()),
    "pinv, last tokens (published)": ("lines", "end", cv.Pinv()),
}


def rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / file).read_text("utf-8").splitlines()]


def sides(concept: str) -> tuple[list[str], list[str]]:
    """Return the positive and the negative prompts."""
    if concept == "harmful":
        benign = [*cv.load_prompts("builtin:questions-dev").texts, *cv.load_prompts("builtin:questions-test").texts]
        return [row["prompt"] for row in rows("advbench_shared.jsonl")][: len(benign)], benign
    found = rows("sentiment_rt.jsonl")
    both = [[row["text"] for row in found if row["label"] == label][:224] for label in ("positive", "negative")]
    return both[0], both[1]


@functools.cache
def model(name: str) -> cv.LM:
    return cv.load_model(name)


@functools.cache
def profiled(name: str, places: Places) -> cv.Profile:
    prompts, text = cv.load_prompts("builtin:general"), cv.load_prompts("builtin:text")
    return cv.profile(model(name), prompts, text=text, places=places)


@functools.cache
def read(name: str, concept: str) -> tuple[Tensor, Tensor]:
    """Return the states of both sides, [n_layers, prompts, d_model]."""
    where = cv.Positions.parse(CONCEPTS[concept])
    positive, negative = (
        prompt_states(model(name), PromptSet(tuple(map(Prompt, texts))), where) for texts in sides(concept)
    )
    return positive, negative


def halves(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(n)
    return order[:PAIRS], order[-PAIRS:]


def cosine(a: Tensor, b: Tensor, scale: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a / scale, b / scale, dim=0))


def measure(donor: str, recipient: str, concept: str, seed: int, store: cv.FactorStore) -> dict[str, Any]:
    """Return cosines and AUCs of one direction, concept and seed, means over layers."""
    (one_p, one_n), (two_p, two_n) = read(donor, concept), read(recipient, concept)
    n = min(one_p.shape[1], one_n.shape[1])
    first, second = halves(n, seed)
    vectors = one_p[:, first].mean(1) - one_n[:, first].mean(1)
    native = two_p[:, second].mean(1) - two_n[:, second].mean(1)
    ceiling = two_p[:, first].mean(1) - two_n[:, first].mean(1)
    end = profiled(recipient, "lines")
    depth = model(recipient).n_layers
    layers = [pair.recipient for pair in cv.proportional(profiled(donor, "lines"), end, range(model(donor).n_layers))]
    layers = sorted({layer for layer in layers if layer >= depth // 3})
    scale = {layer: profile_std(end, layer) for layer in layers}
    cosines: dict[str, float] = {
        "same model, other pairs": average(cosine(ceiling[k], native[k], scale[k]) for k in layers)
    }
    norms = {}
    for name, (places, use, fit) in METHODS.items():
        pair = profiled(donor, places), profiled(recipient, places)
        carried = carry_directions(vectors, *pair, fit=fit, layers=layers, write_rows=use, store=store)
        cosines[name] = average(cosine(carried[k], native[k], scale[k]) for k in layers)
        norms[name] = average(float(carried[k].norm() / native[k].norm()) for k in layers)
    pair = profiled(donor, "lines"), end
    wrong = carry_directions(vectors, *pair, layers=layers, shuffle=seed)
    cosines["shuffled pairs"] = average(cosine(wrong[k], native[k], scale[k]) for k in layers)
    generator = torch.Generator().manual_seed(seed)
    cosines["random"] = average(
        cosine(torch.randn(native.shape[1], generator=generator) * scale[k], native[k], scale[k]) for k in layers
    )
    probes = {k: fit_probe(one_p[k, first], one_n[k, first]) for k in range(model(donor).n_layers)}
    own = {k: fit_probe(two_p[k, first], two_n[k, first]) for k in layers}
    moved = carry_probes(probes, *pair, layers=layers, store=store)
    held = {k: (two_p[k, second], two_n[k, second]) for k in layers}
    aucs = {
        "native": average(auc(own[k], *held[k]) for k in layers),
        "carried": average(auc(moved[k], *held[k]) for k in layers),
        "native, best layer": max(auc(own[k], *held[k]) for k in layers),
        "carried, best layer": max(auc(moved[k], *held[k]) for k in layers),
    }
    return {"cosine": cosines, "norm": norms, "auc": aucs}


def profile_std(profile: cv.Profile, layer: int) -> Tensor:
    stream = profile.layer(layer).float().std(0)
    return stream.clamp(min=1e-6 * profile_stream(profile, layer).norm)


def average(values: Any) -> float:
    return float(np.mean(list(values)))


def shown(name: str, values: list[float]) -> str:
    score = mean(name, values, "cosine")
    return f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"


def main() -> None:
    if not SHARED.exists():
        raise SystemExit(f"needs the prompts in {SHARED.name}/, which are not part of the project")
    result: dict[str, Any] = {}
    for donor, recipient in (MODELS, MODELS[::-1]):
        for concept in CONCEPTS:
            store = cv.FactorStore()
            result[f"{donor} -> {recipient}, {concept}"] = [
                measure(donor, recipient, concept, seed, store) for seed in SEEDS
            ]
            print(donor, recipient, concept, result[f"{donor} -> {recipient}, {concept}"][0], flush=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# Do steering vectors and probes carry?\n",
        __doc__.split("\n\n", 2)[2].replace("../shared/data", "third-party files").strip() + "\n",
    ]
    lines.append(f"{len(SEEDS)} seeds, {PAIRS} pairs a side and seed; intervals (Student's t) over seeds.\n")
    for part, title in (("cosine", "Standardised cosine to the native vector"), ("auc", "AUC on held-out prompts"),
                        ("norm", "Length, carried over native")):  # fmt: skip
        columns = list(result)
        lines += [f"## {title}\n", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name in result[columns[0]][0][part]:
            cells = [shown(name, [one[part][name] for one in result[column]]) for column in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    TABLE.write_text("\n".join(lines), "utf-8")


if __name__ == "__main__":
    main()
