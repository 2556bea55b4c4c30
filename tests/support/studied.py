"""A small study of two tiny models: its files, its content, and a finished run that tests copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import commandv as cv
import tiny
from commandv.evaluation import arms
from commandv.evaluation.arms import ARMS
from commandv.evaluation.study import Study, load_study, run_study, shared as shared_module

QUESTIONS = [{"prompt": f"What is {n} and 0?", "split": "dev"} for n in range(10)]  # enough for two contexts
QUESTIONS += [{"prompt": f"What is {n} and 1?", "split": "test"} for n in range(4)]
QUICK = [name for name in ARMS if name not in ("unmodified", "pasted", "random")]  # arms to leave out


def written(content: dict[str, Any], path: Path) -> Study:
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


def cell_file(run: Path, **which: Any) -> Path:
    """Return the only file of a cell with these fields."""
    files = [(file, json.loads(file.read_text())) for file in (run / "cells").glob("*.json")]
    (found,) = [file for file, cell in files if which.items() <= cell.items()]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, an adapter for each, prompts, examples and a task."""
    folder = tmp_path_factory.mktemp("study")
    for seed, name in enumerate(("one", "two")):
        lm = tiny.tiny_lm(seed=seed)
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
        cv.save(tiny.random_adapter(cv.load_model(str(folder / name)), layers=(1, 2, 3)), folder / f"{name}-adapter")
    rows = [{"prompt": f"Why is {n} a number?"} for n in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    examples = [{"prompt": f"Say {n}", "response": "1. tea"} for n in range(8)]
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return folder


def quick_content(folder: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "question": "Does it arrive?",
        "prompts": str(folder / "prompts.jsonl"),
        "text": None,
        "models": {name: {"id": str(folder / name)} for name in ("one", "two")},
        "pairs": [["one", "two"]],
        "behaviours": {
            "pirate": {
                "task": f"pirate:{folder / 'questions.jsonl'}",
                "adapters": {name: str(folder / f"{name}-adapter") for name in ("one", "two")},
            }
        },
        "methods": {"error-map": {"match": "lowest-error", "prompts": 16}},
        "layers": ["last_half"],
        "scales": [1.0],
        "n_dev": 2,
        "n_test": 4,
        "leave_out": QUICK,
    }


@pytest.fixture
def content(folder):
    """A study file's content that is valid and quick: most arms are left out."""
    return quick_content(folder)


@pytest.fixture(scope="module", autouse=True)
def short():
    """Two passages are enough to see that drift is measured."""
    passages = cv.load_prompts("builtin:drift")[:2]
    original = shared_module.load_prompts

    def load(source, **options):
        return passages if source == "builtin:drift" else original(source, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_module, "load_prompts", load)
        # Training on the donor's answers in one quick epoch; random models' answers may loop.
        patch.setattr(arms, "PRACTICE_SETTINGS", cv.TrainSettings(epochs=1, max_response=3, batch_size=4))
        patch.setattr("commandv.evaluation.material.ANSWER_TOKENS", 4)
        patch.setattr("commandv.transfer.distil.demonstrate.loops", lambda text: False)
        yield


@pytest.fixture(scope="module")
def finished(folder, short, tmp_path_factory):
    """A directory with a quick study of two seeds, `s.yaml`, and its finished run, `run`."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMMANDV_CACHE", str(place / "cache"))
        run_study(written({**quick_content(folder), "seeds": [0, 1]}, place / "s.yaml"), place / "run")
    return place
