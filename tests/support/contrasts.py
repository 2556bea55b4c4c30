"""Contrasts of a few words, and the directions that tell their sides apart."""

from __future__ import annotations

import itertools
import json

import torch

import commandv as cv
from commandv.prompts.sets import Prompt, PromptSet
from commandv.steering import METHODS

THINGS = ("tea", "a fox", "the river", "the book", "a cat", "water", "the garden", "a letter", "the door", "the moon")
VERBS = ("drink", "see", "find", "paint", "want", "lose")


def prompts(pattern: str, n: int = 20, response: str = "") -> PromptSet:
    pairs = itertools.islice(itertools.product(VERBS, THINGS), n)
    return PromptSet(tuple(Prompt(pattern.format(f"{verb} {thing}"), response) for verb, thing in pairs), pattern)


CONTRAST = cv.Contrast(prompts("How do I {}?"), prompts("Never, ever {}!"), paired=True)
ONE = cv.Contrast(prompts("How do I {}?", 1), prompts("Never, ever {}!", 1), paired=True)


def contrast_for(method: str) -> cv.Contrast:
    return ONE if METHODS[method].needs == "one pair" else CONTRAST


def written(path, *lines: object):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
