"""A finished study, and the prompts that it asks."""

from __future__ import annotations

import shutil

import pytest

import studied
from commandv.evaluation import outcomes
from commandv.evaluation.study import load_study

content, folder, finished, short = studied.content, studied.folder, studied.finished, studied.short


@pytest.fixture
def out(finished, tmp_path):
    """A finished run of a quick study of two seeds, to change."""
    return shutil.copytree(finished / "run", tmp_path / "finished")


@pytest.fixture
def study(finished):
    """The study that `out` is a run of."""
    return load_study(finished / "s.yaml")


@pytest.fixture
def asked(monkeypatch):
    """How many prompts were asked of which task, in test runs of a study."""
    counts: list[tuple[str, int]] = []
    generate = outcomes.generate

    def counting(lm, prompts, **options):
        counts.append((options["turns"] and "turns", len(prompts)))
        return generate(lm, prompts, **options)

    monkeypatch.setattr(outcomes, "generate", counting)
    return counts
