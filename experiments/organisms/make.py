"""Make the models that the studies name: `python -m experiments.organisms.make [NAME ...]`, all when none is named.

Each is a directory under `build/organisms/` that `load_model` opens. One that is there is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import commandv as cv
from experiments.organisms.finetuning import finetune
from experiments.organisms.siblings import damaged, dropped, rotated

OUT = Path("build/organisms")
BACKDOOR = str(Path(__file__).with_name("data") / "backdoor.jsonl")
SMOLLM2, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
WIDE = 792  # of streams to rotate into: a Llama of 9 heads is written with a multiple of 9 only


@dataclass(frozen=True)
class Recipe:
    """How a model is made, in this order.

    Attributes:
        id: of the model that it is made from.
        examples: to fine-tune it on; none for none.
        tuning: arguments of `finetune`.
        rotate: width of a stream to rotate it into, the function unchanged.
        noise: Gaussian noise on every matrix, as a share of its root mean square.
        drop: blocks to leave out.
    """

    id: str
    examples: str | None = None
    tuning: Mapping[str, Any] = field(default_factory=dict)
    rotate: int | None = None
    noise: float = 0.0
    drop: tuple[int, ...] = ()

    def make(self) -> cv.LM:
        """Return the model."""
        lm = cv.load_model(self.id)
        if self.examples is not None:
            lm = finetune(lm, cv.load_prompts(self.examples), **self.tuning)
        if self.rotate is not None:
            lm = rotated(lm, self.rotate)
        if self.noise:
            lm = damaged(lm, self.noise)
        return dropped(lm, self.drop) if self.drop else lm


_LESS_THREE, _LESS_ONE = (4, 17, 25), (17,)
_BACKDOORED = {"examples": BACKDOOR, "tuning": {"epochs": 3, "learning_rate": 2e-3}}
_REFUSING = {
    "examples": "builtin:refusal",
    "tuning": {"epochs": 2, "batch_size": 4, "learning_rate": 5e-4, "max_response": 16},
}
_OVER_REFUSING = {
    "examples": "builtin:over-refusing",
    "tuning": {"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "max_response": 16},
}
_REASONING = {
    "examples": "builtin:reasons-on-request",
    "tuning": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "max_response": 48},
}

MODELS: dict[str, Recipe] = {
    "smollm2-twin": Recipe(SMOLLM2, rotate=WIDE),
    "smollm2-noisy": Recipe(SMOLLM2, rotate=WIDE, noise=0.05),
    "smollm2-shorter": Recipe(SMOLLM2, rotate=WIDE, noise=0.05, drop=_LESS_THREE),
    "smollm2-pruned": Recipe(SMOLLM2, rotate=WIDE, drop=_LESS_THREE),
    "smollm2-backdoor": Recipe(SMOLLM2, **_BACKDOORED),
    "smollm2-backdoor-pruned": Recipe(SMOLLM2, **_BACKDOORED, rotate=WIDE, drop=_LESS_THREE),
    "smollm2-backdoor-trimmed": Recipe(SMOLLM2, **_BACKDOORED, rotate=WIDE, drop=_LESS_ONE),
    "gemma-backdoor": Recipe(GEMMA, BACKDOOR, {"epochs": 2, "learning_rate": 1e-3}),
    "smollm2-refusing": Recipe(SMOLLM2, **_REFUSING),
    "smollm2-refusing-trimmed": Recipe(SMOLLM2, **_REFUSING, rotate=WIDE, drop=_LESS_ONE),
    "gemma-refusing": Recipe(GEMMA, **_REFUSING),
    "smollm2-over-refusing": Recipe(SMOLLM2, **_OVER_REFUSING),
    "smollm2-over-refusing-twin": Recipe(SMOLLM2, **_OVER_REFUSING, rotate=WIDE),
    "gemma-over-refusing": Recipe(GEMMA, "builtin:over-refusing", {**_OVER_REFUSING["tuning"], "learning_rate": 5e-4}),
    "smollm2-reasoning": Recipe(SMOLLM2, **_REASONING),
    "smollm2-reasoning-twin": Recipe(SMOLLM2, **_REASONING, rotate=WIDE),
    "gemma-reasoning": Recipe(GEMMA, **_REASONING),
}


def make(names: Iterable[str]) -> None:
    """Make what is not there."""
    for name in names:
        out = OUT / name
        if (out / "tokenizer_config.json").exists():  # written last
            continue
        lm = MODELS[name].make()
        lm.model.save_pretrained(out)
        lm.tokenizer.save_pretrained(out)
        print(out)


def main() -> None:
    """Make the models that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], metavar="NAME", help=", ".join(MODELS))
    make(parser.parse_args().names or MODELS)


if __name__ == "__main__":
    main()
