"""Do steering vectors and probes carry? Difference-in-means vectors and logistic probes between the packaged models.

    python -m experiments.tables.vectors            # writes results/vectors.json and ../docs/benchmarks/vectors.md
    python -m experiments.tables.vectors --report   # the page again, from results/vectors.json

Harmful against harmless requests (AdvBench and our own test questions) and the sentiment of film reviews, from
../shared/data; nothing is generated. Per seed the prompts are drawn into two halves. The donor's vector or probe comes
from one half, is carried, and is compared with the recipient's own from the other half; probes are told on that half.
Cosines are of standardised vectors: each dimension in units of its standard deviation in the recipient's profile, over
last prompt tokens or, for what is read over a text, over word ends. Figures are means over the matched layers from a
third of the depth up. Controls: random vectors, and converters fitted on wrongly paired rows. The ceiling is the
recipient's own vector from the first half, which stands for what the number of pairs allows.

Everything was chosen on other prompts: 240 requests of AdvBench against third-party instructions and our development
questions, and 200 reviews a side. The figures in this list are of those trials, whose runs are not kept; all others are
written by `experiments/tables/vectors.py`.

- *Where to read.* A mean over all tokens of a prompt is governed by its first token, whose state is constant and up to
  a hundred times as long: from 100 pairs, the ceiling of sentiment in SmolLM2 was .31 with it and .53 without (`all`
  leaves it out since), .56 over the review alone and .61 at the last prompt token. So reviews are read at the last
  prompt token, or as replies, over their own tokens.
- *How many pairs.* The ceiling of sentiment is .6 to .7 with 100 pairs a side, .85 with 300.
- *Which rows.* Those of the same kind: last tokens for what is read there, word ends for means over a text.
- *In which form.* AdvBench's requests end in a word, our questions in a mark, and all but one of the 1,360 prompts of
  builtin:general in a mark, so that converters fitted on them do not know that difference. The same prompts in mixed
  forms (`mixed_forms`: as written, without the mark, in lower case) took the cosine from .77 to .85 (SmolLM2 to Gemma)
  and from .81 to .87 (Gemma to SmolLM2) on 32 pairs, whose ceiling was .93. Third-party prompts, of which 30 % end in a
  word, did as much, and both together .01 to .02 more (three seeds: .865 to .884 and .874 to .886); every prompt in all
  three forms did .02 worse than the forms by turns. (Both together was tried after the test figures of the other ways
  had been seen, on the development prompts.) How much of "harmful" is its form is told by the second contrast, in which
  the questions have no mark either.
- *What did not matter*: the ridge's strength between .03 and .3 (last tokens) and from .001 to .1 (word ends), lower
  case in running text, the probe's strength. Concatenating the donor's neighbouring layers gave .00 to .03 more.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import commandv as cv
from commandv.evaluation import mean
from commandv.steering import auc, carry_directions, carry_probes, fit_probe, profile_stream, prompt_states

HERE = Path(__file__).resolve().parents[1]
SHARED = HERE.parents[1] / "shared" / "data"
RESULTS = HERE / "results" / "vectors.json"
TABLE = HERE.parent / "docs" / "benchmarks" / "vectors.md"

MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
SEEDS = (0, 1, 2)
FIRST_REQUEST, FIRST_REVIEW = 240, 200  # what comes before served for development
ASKED = "Write one sentence about a film."  # what reviews are replies to
PROBE_MARGIN = 0.03


class Way(NamedTuple):
    """Where converters come from: a profile (see `profiled`), its rows, and a fit."""

    profile: str
    rows: Literal["end", "text"]
    fit: cv.Ridge | cv.Pinv = cv.Ridge()


class Concept(NamedTuple):
    """What is told apart, where it is read, how it is carried, and the cosine aimed at."""

    at: str
    way: str
    target: float | None = None


BOTH = "ridge, last tokens, mixed forms and third-party prompts"
WAYS = {
    "ridge, line starts": Way("general", "text"),
    "ridge, last tokens": Way("general", "end"),
    "ridge, last tokens, third-party prompts": Way("third-party", "end"),
    "ridge, last tokens, mixed forms": Way("mixed", "end"),
    "ridge, word ends": Way("words", "text"),
    BOTH: Way("both", "end"),
    "pinv, last tokens (published)": Way("general", "end", cv.Pinv()),
    "pinv, last tokens, mixed forms": Way("mixed", "end", cv.Pinv()),
    "pinv, word ends": Way("words", "text", cv.Pinv()),
}
PROBED = ("ridge, last tokens", "ridge, last tokens, mixed forms", BOTH, "ridge, word ends")
CONCEPTS = {
    "harmful": Concept("l1", BOTH, 0.88),
    "harmful, no marks": Concept("l1", BOTH),
    "sentiment, last token": Concept("l1", "ridge, last tokens, mixed forms", 0.60),
    "sentiment, over the text": Concept("g256", "ridge, word ends", 0.60),
}


def rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / file).read_text("utf-8").splitlines()]


def sides(concept: str) -> tuple[cv.PromptSet, cv.PromptSet]:
    """Return as many positive as negative prompts."""
    if concept.startswith("harmful"):
        benign = cv.load_prompts("builtin:questions-test").texts
        if "no marks" in concept:
            benign = [text.rstrip(".?!") for text in benign]
        requests = [row["prompt"] for row in rows("advbench_shared.jsonl")][FIRST_REQUEST:][: len(benign)]
        both: list[list[cv.Prompt]] = [[cv.Prompt(text) for text in texts] for texts in (requests, benign)]
    else:
        found = rows("sentiment_rt.jsonl")
        reviews = [
            [row["text"] for row in found if row["label"] == label][FIRST_REVIEW:] for label in ("positive", "negative")
        ]
        as_reply = CONCEPTS[concept].at.startswith("g")
        both = [[cv.Prompt(ASKED, text) if as_reply else cv.Prompt(text) for text in texts] for texts in reviews]
    return cv.PromptSet(tuple(both[0]), concept), cv.PromptSet(tuple(both[1]), concept)


def third_party() -> cv.PromptSet:
    found = [row["prompt"] for row in rows("profiling_prompts_1030.jsonl")]
    return cv.PromptSet(tuple(cv.Prompt(one) for one in found if len(one.split()) <= 40), "third-party prompts")


@functools.cache
def model(name: str) -> cv.LM:
    return cv.load_model(name)


@functools.cache
def profiled(name: str, kind: str) -> cv.Profile:
    lm, general, text = model(name), cv.load_prompts("builtin:general"), cv.load_prompts("builtin:text")
    match kind:
        case "general":
            return cv.profile(lm, general, text=text)
        case "mixed":
            return cv.profile(lm, cv.mixed_forms(general), text=text)
        case "both":
            return cv.profile(lm, cv.mixed_forms(general) + third_party(), text=None)
        case "words":  # prompts have words too; last tokens are of no concern here
            return cv.profile(lm, text.texts, text=text + general, places="words", rows_per_text=64)
        case _:
            return cv.profile(lm, third_party(), text=None)


@functools.cache
def read(name: str, concept: str) -> tuple[Tensor, Tensor]:
    """Return the states of both sides, [n_layers, prompts, d_model]."""
    where = cv.Positions.parse(CONCEPTS[concept].at)
    positive, negative = (prompt_states(model(name), side, where) for side in sides(concept))
    return positive, negative


def halves(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(n)
    return order[: n // 2], order[n // 2 :]


def cosine(a: Tensor, b: Tensor, scale: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a / scale, b / scale, dim=0))


@functools.cache
def spread(name: str, concept: str, layer: int) -> Tensor:
    """Return the standard deviation of each dimension over rows like those where the concept is read, [d_model]."""
    one = profiled(name, "general" if CONCEPTS[concept].at == "l1" else "words")
    ends = torch.from_numpy(one.keys[:, 1] < 0)
    chosen = one.layer(layer)[ends if CONCEPTS[concept].at == "l1" else ~ends].float().std(0)
    return chosen.clamp(min=1e-6 * profile_stream(one, layer).norm)


def matched(donor: str, recipient: str) -> list[int]:
    """Return the recipient's layers from a third of its depth up to which a donor layer is matched."""
    one, two = profiled(donor, "general"), profiled(recipient, "general")
    found = {pair.recipient for pair in cv.proportional(one, two, range(one.n_layers))}
    return sorted(layer for layer in found if layer >= two.n_layers // 3)


@functools.lru_cache(maxsize=2 * len(WAYS))
def linked(donor: str, recipient: str, way: Way, reading: bool = False) -> cv.Link:
    """Return the link of a way, with its rows for writing or for reading; it keeps its fits."""
    pair = profiled(donor, way.profile), profiled(recipient, way.profile)
    return cv.link(*pair, read_rows=way.rows) if reading else cv.link(*pair, fit=way.fit, write_rows=way.rows)


def measure(donor: str, recipient: str, concept: str, seed: int) -> dict[str, Any]:
    """Return cosines, lengths and AUCs of one direction, concept and seed, means over layers."""
    (one_p, one_n), (two_p, two_n) = read(donor, concept), read(recipient, concept)
    first, second = halves(one_p.shape[1], seed)
    vectors = one_p[:, first].mean(1) - one_n[:, first].mean(1)
    native = two_p[:, second].mean(1) - two_n[:, second].mean(1)
    layers = matched(donor, recipient)

    def similar(found: Any) -> float:
        return average(cosine(found[k], native[k], spread(recipient, concept, k)) for k in layers)

    cosines = {"same model, other pairs": similar(two_p[:, first].mean(1) - two_n[:, first].mean(1))}
    norms = {}
    for name, way in WAYS.items():
        carried = carry_directions(vectors, linked(donor, recipient, way), layers=layers)
        cosines[name] = similar(carried)
        norms[name] = average(float(carried[k].norm() / native[k].norm()) for k in layers)
    own = WAYS[CONCEPTS[concept].way]
    pair = profiled(donor, own.profile), profiled(recipient, own.profile)
    cosines["shuffled pairs"] = similar(
        carry_directions(vectors, cv.link(*pair, write_rows=own.rows, shuffle=seed), layers=layers)
    )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(native.shape, generator=generator)
    cosines["random"] = similar({k: drawn[k] * spread(recipient, concept, k) for k in layers})

    probes = {k: fit_probe(one_p[k, first], one_n[k, first]) for k in range(len(vectors))}
    arms = {"native": {k: fit_probe(two_p[k, first], two_n[k, first]) for k in layers}}
    for name in PROBED:
        arms[name] = carry_probes(probes, linked(donor, recipient, WAYS[name], reading=True), layers=layers)
    aucs = {
        name: average(auc(arm[k], two_p[k, second], two_n[k, second]) for k in layers) for name, arm in arms.items()
    }
    return {"pairs": len(first), "cosine": cosines, "auc": aucs, "norm": norms}


def average(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def shown(values: list[float]) -> str:
    score = mean("value", values, "cosine")
    return f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"


def targets(result: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a table of what was aimed at and what came out, by the way chosen beforehand."""
    lines = ["| | carried by | cosine | target | | AUC, carried | native | |", "|---|---|---|---|---|---|---|---|"]
    for column, seeds in result.items():
        concept = CONCEPTS[column.split(", ", 1)[1]]
        reached = average(one["cosine"][concept.way] for one in seeds)
        carried, native = (average(one["auc"][name] for one in seeds) for name in (concept.way, "native"))
        lines.append(
            f"| {column} | {concept.way} | {reached:.3f} | {concept.target or ''} | {verdict(reached, concept.target)} "
            f"| {carried:.3f} | {native:.3f} | {verdict(carried, native - PROBE_MARGIN)} |"
        )
    return lines


def verdict(reached: float, target: float | None) -> str:
    return "" if target is None else "met" if reached >= target else "**not met**"


def page(result: dict[str, list[dict[str, Any]]]) -> str:
    words = __doc__.split("\n\n", 2)[2].replace("../shared/data", "third-party files").strip()
    lines = ["# Do steering vectors and probes carry?\n", words + "\n"]
    lines.append(
        f"{len(SEEDS)} seeds, halvings of the same prompts. Intervals (Student's t) over seeds tell of the halving and "
        "of nothing else: prompts, models and profiles are the same.\n"
    )
    lines += ["## Targets\n", "A carried probe should come within .03 of the native one's AUC.\n", *targets(result), ""]
    for direction in dict.fromkeys(column.split(", ", 1)[0] for column in result):
        own = {concept: result[f"{direction}, {concept}"] for concept in CONCEPTS}
        head = " | ".join(f"{concept} ({seeds[0]['pairs']} pairs a half)" for concept, seeds in own.items())
        for part, title in (("cosine", "standardised cosine to the native vector"), ("auc", "AUC on held-out prompts"),
                            ("norm", "length, carried over native")):  # fmt: skip
            lines += [f"## {direction}: {title}\n", f"| | {head} |", "|---" * (len(own) + 1) + "|"]
            for name in own["harmful"][0][part]:
                cells = [shown([one[part][name] for one in seeds]) for seeds in own.values()]
                lines.append(f"| {name} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def measured() -> dict[str, list[dict[str, Any]]]:
    result = {}
    for donor, recipient in (MODELS, MODELS[::-1]):
        for concept in CONCEPTS:
            column = f"{donor} -> {recipient}, {concept}"
            result[column] = [measure(donor, recipient, concept, seed) for seed in SEEDS]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the page")
    if not parser.parse_args().report:
        if not SHARED.exists():
            raise SystemExit(f"needs the prompts in {SHARED.name}/, which are not part of the project")
        RESULTS.write_text(json.dumps(measured(), indent=1) + "\n", "utf-8")
    TABLE.write_text(page(json.loads(RESULTS.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
