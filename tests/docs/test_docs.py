"""The README's code runs, the documented command line is the real one, and no link is dead."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

import commandv as cv
import real
from places import ROOT

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_documented_command_line_is_the_real_one():
    command = [sys.executable, "-m", "typer", "commandv.cli", "utils", "docs", "--name", "commandv"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stored = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert text.strip() == stored.strip(), "run `make docs`"


def test_the_readme_names_only_verbs_and_options_that_exist():
    block = re.search(r"## On the command line\n\n```\n(.*?)```", README, re.S)[1]
    reference = (ROOT / "docs" / "cli.md").read_text("utf-8")
    for line in block.splitlines():
        words = shlex.split(line)
        section = reference.split(f"## `commandv {words[1]}`")[1].split("\n## ")[0]
        for option in (word for word in words[2:] if word.startswith("-")):
            assert f"`{option}" in section or f", {option}" in section or f"{option}," in section, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.real
def test_the_readme_example_runs(monkeypatch, tmp_path, capsys):
    real.require(real.GEMMA, real.SMOL)
    monkeypatch.chdir(tmp_path)
    load, profile = cv.load_prompts, cv.profile
    monkeypatch.setattr(
        cv, "load_prompts", lambda source: load(source, limit=24)
    )  # the example, at a fraction of its size
    text = load("builtin:text", limit=24)
    monkeypatch.setattr(cv, "profile", lambda lm, prompts: profile(lm, prompts, text=text, cache=False))
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], {})
    assert "Fidelity(" in capsys.readouterr().out
    assert cv.load_adapter("numbered-list-on-smollm").d_model == 576
