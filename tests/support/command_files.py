"""Models, prompt files and an adapter in directories, for the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import commandv as cv
import tiny

PROMPTS = [
    f"{form} {thing}?" for form in ("What is", "Why is there", "How good is") for thing in ("tea", "a fox", "it")
]


TEXTS = ["The quick brown fox jumps over the lazy dog.", "Boil fresh water\nand steep the leaves, then read a book."]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two models of different families, widths and depths in directories."""
    made = {}
    for name, arch, settings in (
        ("donor", "llama", {}),
        ("recipient", "gpt2", {"n_embd": 48, "n_layer": 6}),
    ):
        path = tmp_path_factory.mktemp("models") / name
        tiny.tiny_model(arch, seed=len(name), **settings).save_pretrained(path)
        tiny.tiny_tokenizer(chat=name == "donor").save_pretrained(path)
        made[name] = path
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A prompt file, passages, and examples to train on."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text.replace(" ", "\n")}) + "\n" for text in TEXTS))
    rows = [json.dumps({"prompt": prompt, "response": "yes"}) for prompt in PROMPTS]
    (folder / "agree.jsonl").write_text("\n".join(rows))
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(models, files, tmp_path_factory) -> Path:
    """An adapter of the donor on all its layers."""
    lm = cv.load_model(models["donor"], dtype="float32")
    settings = cv.TrainSettings(epochs=1, batch_size=4, held_out=0)
    kind = cv.DiReFT(rank=2, layers="all_layers")
    adapter = cv.train(lm, cv.load_prompts(files["agree"]), kind, settings, name="agree")
    return cv.save(adapter, tmp_path_factory.mktemp("trained") / "adapter")
