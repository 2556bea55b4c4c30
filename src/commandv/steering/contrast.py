"""Contrasts: two sets of prompts that differ in what a direction shall tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from commandv.arguments import checked
from commandv.errors import InputError, require_seed
from commandv.prompts.sets import Prompt, PromptSet, file_rows, load_prompts
from commandv.storage.files import digest


@checked
@dataclass(frozen=True)
class Contrast:
    """Prompts, with or without replies, of two sides.

    Attributes:
        positive: where what shall be steered is present.
        negative: where it is absent, or its opposite is present.
        paired: True when prompt i of one side belongs to prompt i of the other.
    """

    positive: PromptSet
    negative: PromptSet
    paired: bool = False

    def __post_init__(self) -> None:
        if self.paired and len(self.positive) != len(self.negative):
            raise InputError(
                f"{self.name}: {len(self.positive)} positive and {len(self.negative)} negative prompts; pairs need as "
                "many of each. Make the sides equal, or leave them unpaired (for difference in means or a probe)"
            )

    @property
    def name(self) -> str:
        """Where it comes from, for messages and provenance."""
        names = dict.fromkeys((self.positive.name, self.negative.name))
        return " against ".join(names)

    @property
    def hash(self) -> str:
        """16 hexadecimal characters that depend on everything in it."""
        return digest([self.positive.hash, self.negative.hash, self.paired])

    def drawn(self, n: int, seed: int) -> Contrast:
        """Return n prompts of either side, drawn without replacement; of pairs both sides of the same ones.

        Raises:
            InputError: a side has fewer.
        """
        require_seed(seed)
        smaller = min(len(self.positive), len(self.negative))
        if not 1 <= n <= smaller:
            raise InputError(f"{self.name}: {n} prompts of either side are wanted, there are {smaller}")
        generator = np.random.default_rng(seed)
        picks = [generator.permutation(len(side))[:n] for side in (self.positive, self.negative)]
        if self.paired:
            picks[1] = picks[0]
        positive, negative = (
            PromptSet(tuple(side.prompts[i] for i in pick), side.name)
            for side, pick in zip((self.positive, self.negative), picks, strict=True)
        )
        return Contrast(positive, negative, self.paired)


@checked
def load_contrast(source: str | Path, negative: str | Path | None = None, *, paired: bool = False) -> Contrast:
    """Load a contrast from one file of pairs or from two prompt sets.

    Args:
        source: without `negative`, a .jsonl (or .csv) file of pairs, or built-in ones (`builtin:NAME`):
            `{"positive": text, "negative": text}`, or `{"prompt": text, "positive": reply, "negative": reply}` where
            the sides are replies to one prompt. With it, the positive prompts, as `load_prompts` takes them.
        negative: the negative prompts, as `load_prompts` takes them.
        paired: whether two prompt sets belong together line by line; a file of pairs always does.

    Raises:
        InputError: a malformed line (with its number), an empty side, or pairs from sides of different length.
    """
    if negative is not None:
        return Contrast(load_prompts(source), load_prompts(negative), paired)
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    with_prompt: bool | None = None
    for where, row in file_rows(source):
        prompt = _text(row, "prompt", where) if row.get("prompt") is not None else ""
        if with_prompt is None:
            with_prompt = bool(prompt)
        if with_prompt != bool(prompt):
            raise InputError(f"{where}: some lines have a prompt and others have none; expected all or none to have it")
        for side, name in zip(sides, ("positive", "negative"), strict=True):
            text = _text(row, name, where)
            side.append(Prompt(prompt, text) if prompt else Prompt(text))
    if not sides[0]:
        raise InputError(f"{source}: no pairs; expected lines of {{positive, negative}}")
    return Contrast(PromptSet(tuple(sides[0]), str(source)), PromptSet(tuple(sides[1]), str(source)), paired=True)


def _text(row: dict[str, Any], name: str, where: str) -> str:
    """Return one text of a row."""
    if name not in row:
        raise InputError(
            f"{where}: no {name!r}; expected {{positive, negative}} or {{prompt, positive, negative}}, the row has "
            f"{', '.join(map(str, row))}. Two prompt sets are given as two files"
        )
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {name} is empty or not a text")
    return value
