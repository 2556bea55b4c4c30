"""Prompts and texts to profile, and whether two profiles are the same."""

from __future__ import annotations

import numpy as np
from torch.testing import assert_close

from commandv.prompts.sets import Prompt, PromptSet

PROMPTS = [
    "Why does Venus spin backwards?",
    "Hi",
    "How do I make a good cup of tea, and how long do the leaves steep before the water gets cold?",
    "Tell me about the river.",
    "Read the book and write a letter to the other side of the city.",
    "a",
]
TEXT = PromptSet(
    (
        Prompt(
            "Tell me a story.", "She said that nobody had seen the cat since Monday.\nIt was strange, it never left."
        ),
        Prompt("Count.", "1. First, open the window.\n2. Then close the door.\n\n3. Read."),
        Prompt("The quick brown fox jumps over the lazy dog, and then it sleeps."),
        Prompt("Greet me in Chinese.", "你好 means “hello” – naïve café"),
    )
)
# Activations are kept in bfloat16 (8 bits); batches and padding change float32 sums in their last bits, which can move
# a value over one rounding step. So: equal within one bfloat16 step.
ONE_STEP = {"rtol": 2**-7, "atol": 1e-3}


def same(first, second):
    assert np.array_equal(first.keys, second.keys)
    assert first.activations.keys() == second.activations.keys()
    for layer in first.activations:
        assert_close(first.layer(layer), second.layer(layer), **ONE_STEP)
