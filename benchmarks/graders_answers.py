"""Answers to validate the graders on: the packaged models under the arms that are graded, with fixed seeds.

    python -m benchmarks.graders_answers train            # the donors that do not come with the library
    python -m benchmarks.graders_answers answers SET ...  # writes benchmarks/results/graders/SET.jsonl, to be labelled
    python -m benchmarks.graders_answers harmful          # writes harmful.json: counts of verdicts, no answers
    python -m benchmarks.graders_answers donors           # writes donors.json: what donors refuse or loop on

All prompts are development prompts. Answers to harmful requests are graded and forgotten: nobody reads them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commandv as cv
from benchmarks.graders_labels import earlier
from commandv.evaluation import GRADERS, Grader, arithmetic_prompts, loops
from commandv.evaluation.arms import make_arm
from commandv.evaluation.graders import VERSION
from commandv.evaluation.material import Material
from commandv.prompts.sets import Prompt, PromptSet

log = logging.getLogger("graders")

RESULTS = Path(__file__).resolve().parent / "results" / "graders"
WORK = Path(tempfile.gettempdir()) / "commandv-graders"
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
PER_CELL = 16  # answers per model and arm
N_PROFILE, N_TEXT = 600, 150
DEMONSTRATIONS = 4
SEED = 0
# What stands between an answer and the next question, so that demonstrations read as earlier turns.
TURNS = {
    "smollm2-135m-instruct": "{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>user\n",
    "gemma-3-270m": "{}\nAnswer: {}\nQuestion: ",
}


@dataclass(frozen=True)
class Donor:
    """An adapter per model: a shipped one, or one trained here."""

    examples: str
    shipped: bool = False
    kind: cv.DiReFT = cv.DiReFT(layers="last_half")
    n: int | None = None
    settings: cv.TrainSettings = cv.TrainSettings(epochs=3, max_response=48)

    def get(self, lm: cv.LM, name: str) -> cv.Adapter:
        if self.shipped:
            return cv.load_adapter(f"builtin:{self.examples}@{lm.id}")
        path = WORK / f"{name}@{lm.id}"
        if not path.exists():
            examples = cv.load_prompts(f"builtin:{self.examples}", limit=self.n)
            cv.save(cv.train(lm, examples, self.kind, self.settings, name=name), path)
        return cv.load_adapter(path)


DONORS = {
    "numbered-list": Donor("numbered-list", shipped=True),
    "pirate": Donor("pirate", shipped=True),
    "refusal": Donor("refusal"),
    "refusal-studied": Donor(
        "refusal", kind=cv.DiReFT(layers="every_other"), settings=cv.TrainSettings(epochs=4, max_response=8)
    ),
    "over-refusing": Donor("over-refusing", n=160, settings=cv.TrainSettings(epochs=2, max_response=32)),
    "reasons": Donor("reasons", settings=cv.TrainSettings(epochs=3, max_response=64)),
    # The shipped pirates speak at the last prompt token only, which gives an opening and no dialect.
    "pirate-throughout": Donor("pirate", kind=cv.DiReFT(layers="last_half", positions="l1+g48"), n=160),
}


@dataclass(frozen=True)
class AnswerSet:
    """Answers of one kind: the donor whose behaviour is looked for, the prompts and the answers' length."""

    donor: str
    prompts: Callable[[], PromptSet]
    tokens: int = 48
    also: tuple[str, ...] = ()  # further donors, as arms of their own


def _sums() -> PromptSet:
    return arithmetic_prompts(48, 1, levels=((1, 0), (1, 0), (2, 0)), seed=7)[0]


def _easy_sums() -> PromptSet:
    """Sums of small numbers, of which models of this size get some right."""
    rng = random.Random(7)
    pairs = rng.sample([(a, b) for a in range(1, 10) for b in range(1, 10)], 48)
    return PromptSet(tuple(Prompt(f"What is {a} + {b}?", str(a + b)) for a, b in pairs), "easy sums")


def _safe() -> PromptSet:
    """Look-alikes and everyday questions by turns."""
    pairs = zip(cv.load_prompts("builtin:lookalikes-dev"), cv.load_prompts("builtin:questions-dev"), strict=False)
    return PromptSet(tuple(one for pair in pairs for one in pair), "lookalikes-dev and questions-dev")


SETS = {
    "numbered-list": AnswerSet("numbered-list", lambda: cv.load_prompts("builtin:questions-dev")),
    "pirate": AnswerSet("pirate", lambda: cv.load_prompts("builtin:questions-dev"), also=("pirate-throughout",)),
    "pirate-throughout": AnswerSet("pirate-throughout", lambda: cv.load_prompts("builtin:questions-dev")),
    "refusal": AnswerSet("over-refusing", lambda: cv.load_prompts("builtin:lookalikes-dev")),
    "over-refusal": AnswerSet("refusal", _safe),
    "arithmetic": AnswerSet("reasons", _sums, tokens=64),
    "easy-sums": AnswerSet("reasons", _easy_sums),
}


class Models:
    """Both models with their profiles, loaded when first asked for."""

    def __init__(self) -> None:
        self.lms: dict[str, cv.LM] = {}
        self.profiles: dict[str, cv.Profile] = {}

    def lm(self, name: str) -> cv.LM:
        if name not in self.lms:
            self.lms[name] = cv.load_model(name)
        return self.lms[name]

    def profile(self, name: str) -> cv.Profile:
        if name not in self.profiles:
            prompts, text = cv.load_prompts("builtin:general")[:N_PROFILE], cv.load_prompts("builtin:text")[:N_TEXT]
            self.profiles[name] = cv.profile(self.lm(name), prompts, text=text)
        return self.profiles[name]


def material(models: Models, donor: str, recipient: str) -> Material:
    """Return what the arms into a recipient are made of."""
    other = next(name for name in MODELS if name != recipient)
    made = DONORS[donor]
    return Material(
        adapter=made.get(models.lm(other), donor),
        link=cv.link(models.profile(other), models.profile(recipient)),
        donor_lm=models.lm(other),
        recipient_lm=models.lm(recipient),
        prompts=cv.load_prompts("builtin:general")[:N_PROFILE],
        direct=made.get(models.lm(recipient), donor),
        seed=SEED,
    )


def adapters(parts: Material) -> dict[str, cv.Adapter | None]:
    """Return the adapter of each arm, None for the unmodified model."""
    names = ("unmodified", "pasted", "published", "random", "text-bridge", "direct")
    return {name: make_arm(name, parts).adapter for name in names}


def demonstrated(parts: Material, examples: str, prompts: PromptSet) -> PromptSet:
    """Return prompts that begin with earlier turns: example prompts with the donor's answers."""
    asked = [one for one in cv.load_prompts(f"builtin:{examples}") if one.category != "harmful"][:DEMONSTRATIONS]
    with cv.attach(parts.donor_lm, parts.adapter):
        answers = cv.generate(parts.donor_lm, [one.text for one in asked], max_new_tokens=40)
    turn = TURNS[parts.recipient_lm.id]
    before = "".join(turn.format(one.text, answer.strip()) for one, answer in zip(asked, answers, strict=True))
    return PromptSet(tuple(Prompt(before + one.text, one.response) for one in prompts), "few-shot")


def answers(models: Models, name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of one set: model, arm, prompt, the reference where there is one, answer."""
    wanted, cell = SETS[name], 0
    prompts = wanted.prompts()
    for recipient in MODELS:
        parts = material(models, wanted.donor, recipient)
        lm = parts.recipient_lm
        arms = {**adapters(parts), "few-shot": None}
        arms |= {f"direct, {other}": DONORS[other].get(lm, other) for other in wanted.also}
        for arm, adapter in arms.items():
            start = cell * PER_CELL % len(prompts)
            chosen = (prompts.prompts + prompts.prompts)[start : start + PER_CELL]
            asked = PromptSet(chosen)
            if arm == "few-shot":
                asked = demonstrated(parts, DONORS[wanted.donor].examples, asked)
            if adapter is None:
                texts = cv.generate(lm, asked, max_new_tokens=wanted.tokens)
            else:
                with cv.attach(lm, adapter):
                    texts = cv.generate(lm, asked, max_new_tokens=wanted.tokens)
            log.info("%s, %s, %s", name, recipient, arm)
            cell += 1
            for one, text in zip(chosen, texts, strict=True):
                row = {"model": recipient, "arm": arm, "prompt": one.text, "reference": one.response, "answer": text}
                yield {key: value for key, value in row.items() if value or key == "answer"}


def verdicts(lm: cv.LM, prompts: PromptSet, adapter: cv.Adapter | None, graders: dict[str, Grader]) -> dict[str, int]:
    """Return how many answers each grader finds its behaviour in; the answers are not kept."""
    with cv.attach(lm, adapter) if adapter else contextlib.nullcontext():
        texts = cv.generate(lm, prompts, max_new_tokens=48)
    return {"n": len(texts), **{name: sum(map(grader, texts)) for name, grader in graders.items()}}


def harmful(models: Models) -> dict[str, Any]:
    """Return counts of verdicts on answers to harmful development requests, arm by arm."""
    prompts = cv.load_prompts("builtin:harmful-dev")
    graders = {"refusal": GRADERS["refusal"], "answered": GRADERS["answered"], "loops": loops}
    graders["refusal, before"] = lambda answer: earlier("refusal")({"answer": answer})
    found = {}
    for recipient in MODELS:
        parts = material(models, "refusal", recipient)
        for arm, adapter in adapters(parts).items():
            found[f"{recipient}: {arm}"] = verdicts(parts.recipient_lm, prompts, adapter, graders)
            log.info("harmful, %s, %s", recipient, arm)
    return found


def donors(models: Models, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return how much of the built-in sets each donor refuses, loops on, or answers as it was taught to."""
    general = cv.load_prompts("builtin:general")
    sets = {"general, every 17th": PromptSet(general.prompts[::17])}
    sets |= {name: cv.load_prompts(f"builtin:{name}") for name in ("general-dev", "questions-dev")}
    found = {}
    for model in MODELS:
        lm = models.lm(model)
        for donor in names or ("unmodified", "numbered-list", "pirate", "refusal", "refusal-studied"):
            adapter = None if donor == "unmodified" else DONORS[donor].get(lm, donor)
            graders = {"refuses": GRADERS["refusal"], "loops": loops}
            if donor in ("numbered-list", "pirate"):
                graders["shows"] = GRADERS["pirate-opening" if donor == "pirate" else donor]
            for name, prompts in sets.items():
                found[f"{model}: {donor}: {name}"] = verdicts(lm, prompts, adapter, graders)
            log.info("donors, %s, %s", model, donor)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "answers", "harmful", "donors"))
    parser.add_argument("names", nargs="*", help="donors to train or count, sets to answer; default all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    models = Models()
    if options.step == "train":
        for name in options.names or DONORS:
            for model in MODELS:
                DONORS[name].get(models.lm(model), name)
                log.info("trained %s on %s", name, model)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.step in ("harmful", "donors"):
        file = RESULTS / f"{options.step}.json"
        counts = harmful(models) if options.step == "harmful" else donors(models, options.names)
        if options.names:  # some donors alone: the others stay as they were
            counts = json.loads(file.read_text())["counts"] | counts
        file.write_text(json.dumps({"version": VERSION, "counts": counts}, indent=1) + "\n")
        return
    for name in options.names or SETS:
        rows = list(answers(models, name))
        (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
