"""The pages on methods: their Python and their commands run, on tiny models, and their figures are the benchmarks'."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import commandv as cv
import tiny
from commandv.cli import app
from commandv.interop.sae import SAE, save_sae
from commandv.prompts import sets
from places import ROOT

DOCS = ROOT / "docs"
INDEX = DOCS / "steering.md"
PAGES = sorted((DOCS / "methods").glob("*.md"))
TINY = {  # as deep as the packaged models, so that the pages' layers exist
    "smollm2-135m-instruct": ("llama", {"num_hidden_layers": 30, "chat": True}),
    "gemma-3-270m": ("gemma3_text", {"num_hidden_layers": 18, "hidden_size": 48}),
}
ONE_PAIR = '{"positive": "I love this.", "negative": "I hate this."}\n'


def code(page: Path, language: str) -> str:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    return "\n".join(text for name, text in fences if name == language)


def run(commands: str) -> None:
    for line in commands.splitlines():
        ran = CliRunner().invoke(app, shlex.split(line)[1:])
        assert ran.exit_code == 0, f"{line}: {ran.exception!r}"


@functools.cache
def model(name: str) -> cv.LM:
    arch, settings = TINY[name]
    return tiny.tiny_lm(arch, id=name, **settings)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What the index's code leaves behind: its Python names, and its files in the working directory.

    Tiny models stand in for the packaged ones, and of each prompt set there are a few prompts.
    """
    load_prompts, load_contrast, load_adapter = cv.load_prompts, cv.load_contrast, cv.load_adapter
    load_prompt_sets = sets.load_prompt_sets

    def some_pairs(source: str, *_: Any, **__: Any) -> cv.Contrast:
        whole = load_contrast(source)
        return cv.Contrast(whole.positive[:12], whole.negative[:12], whole.paired)

    def adapter(source: str, **how: Any) -> cv.Adapter:
        if not source.startswith("builtin:"):
            return load_adapter(source, **how)
        return tiny.random_adapter(model(source.split("@")[1]), layers=(18, 24, 29))

    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMMANDV_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.setattr(cv, "load_model", lambda name, **_: model(name))
        patch.setattr(cv, "load_prompts", lambda source, **_: load_prompts(source, limit=16))
        patch.setattr(sets, "load_prompt_sets", lambda sources, **_: load_prompt_sets(sources, limit=16))
        patch.setattr(cv, "load_contrast", some_pairs)
        patch.setattr(cv, "load_adapter", adapter)
        Path("one-pair.jsonl").write_text(ONE_PAIR)
        width = model("smollm2-135m-instruct").d_model
        save_sae(SAE(torch.eye(width), torch.zeros(width), torch.eye(width), torch.zeros(width), 17), "sae")
        exec(code(INDEX, "python"), names)
        run(code(INDEX, ""))
        yield names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_runs(page, started):
    exec(code(page, "python"), dict(started))
    run(code(page, ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_formula_source_use_failures_and_figures(page):
    text = page.read_text("utf-8")
    assert re.search(r"^(    \S|\|)", text, re.M), "no formula, and no table of them"
    for part in ("source", "\n## Use\n", "\n## When it fails\n", "\n## Measured\n"):
        assert part in text or part.title() in text, part
    assert f"methods/{page.name}" in INDEX.read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_figures_are_those_of_the_benchmark(page):
    """Under "Measured", every decimal before a link to a benchmark is on the benchmark's page."""
    told = page.read_text("utf-8").split("## Measured\n")[1]
    for before, target in re.findall(r"(.*?)\]\((\.\.[^)]+)\)", told, re.S):
        if target.startswith("../benchmarks/"):
            unknown = decimals(before) - decimals((page.parent / target).read_text("utf-8"))
            assert not unknown, f"{target} does not have {unknown}"


def decimals(text: str) -> set[float]:
    return {float(one) for one in re.findall(r"(?<![\w.])-?\d*\.\d+", text)}
