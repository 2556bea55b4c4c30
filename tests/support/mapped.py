"""Two tiny models with their profiles, mappers that do something known, and what to try them on."""

from __future__ import annotations

import copy

import pytest
import torch

import commandv as cv
import tiny
from commandv.evaluation import Question
from commandv.mapping import Mapper
from commandv.prompts.sets import Prompt, PromptSet
from commandv.transfer.match import LayerPair
from contrasts import THINGS, VERBS

PROMPTS = PromptSet(tuple(Prompt(f"How do I {verb} {thing}?") for verb in VERBS for thing in THINGS))
PASSAGES = PromptSet(tuple(Prompt("Go on.", text) for text in tiny.SENTENCES * 4))
TEXTS = PromptSet(tuple(Prompt(text) for text in tiny.SENTENCES[:4]))
QUESTIONS = (Question("What is tea?", ("a drink", "the door"), 0), Question("Who sleeps?", ("the cat", "water"), 0))


def profiled(lm):
    return cv.profile(lm, PROMPTS, text=PASSAGES, places="words", cache=False)


@pytest.fixture(scope="module")
def donor():
    return tiny.tiny_lm("gpt2", seed=3, n_embd=40, n_layer=3, bos=False, vocab=300, id="donor")


@pytest.fixture(scope="module")
def recipient():
    return tiny.tiny_lm("llama", chat=True, id="recipient")


@pytest.fixture(scope="module")
def profiles(donor, recipient):
    return profiled(donor), profiled(recipient)


@pytest.fixture(scope="module")
def versions():
    """A model and a version of it in which all words, but neither <bos> nor <eos>, are embedded elsewhere.

    With nothing around the user's words but these two, every token whose states differ takes the version's.
    """
    tokenizer = tiny.tiny_tokenizer(chat=True)
    tokenizer.chat_template = "<bos>{% for message in messages %}{{ message.content }}{% endfor %}<eos>"
    model = tiny.tiny_model()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        embedding = tuned.get_input_embeddings().weight
        embedding[3:] += 0.3 * torch.randn(embedding[3:].shape, generator=torch.Generator().manual_seed(9))
    return cv.wrap_model(model, tokenizer, "base"), cv.wrap_model(tuned, tokenizer, "tuned")


def identity(one, two, layer: int = 1) -> Mapper:
    return Mapper(one.ref, two.ref, LayerPair(layer, layer), lambda states, _: states)


def constant(donor, recipient, layer: int, value: torch.Tensor) -> Mapper:
    return Mapper(donor.ref, recipient.ref, LayerPair(0, layer), lambda states, _: value.expand(len(states), -1))
