"""A toy training: prompts that are all answered alike, quick settings, and whether two adapters are identical."""

from __future__ import annotations

import itertools

import torch

from commandv.adapters.adapter import Adapter
from commandv.prompts.sets import Prompt, PromptSet
from commandv.training.train import TrainSettings

SUBJECTS = ("tea", "the fox", "a river in the city", "Venus", "the garden and the tree", "a book", "the cat", "letters")
FORMS = (
    "What is {}?",
    "How do I make {}, and why?",
    "Tell me about {}.",
    "Why does nobody like {} any more these days?",
)
ANSWER = "1. First, open the window."
QUICK = TrainSettings(epochs=2, batch_size=8, held_out=0.25, learning_rate=2e-2)


def examples(n: int = 24, answer: str = ANSWER) -> PromptSet:
    """Prompts of many lengths that are all answered alike."""
    texts = [form.format(subject) for subject, form in itertools.product(SUBJECTS, FORMS)]
    return PromptSet(tuple(Prompt(text, answer) for text in texts[:n]), "toy")


def tensors(adapter: Adapter) -> list[torch.Tensor]:
    return [
        part
        for layer in adapter.layers
        for one in adapter.interventions[layer]
        for part in (one.read, one.bias, one.write)
    ]


def assert_identical(one: Adapter, two: Adapter) -> None:
    assert one.provenance == two.provenance
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))
