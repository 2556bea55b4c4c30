"""Experiments use the public names only, and the package knows nothing of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from places import ROOT

PUBLIC = {"commandv", "commandv.errors", "commandv.evaluation", "commandv.interop.sae", "commandv.mapping",
          "commandv.steering"}  # fmt: skip
# What is told again from the files of runs reads them, and shares the reports' own tables and verdicts.
MORE = {
    name: {f"commandv.evaluation.{one}" for one in more}
    for name, more in {
        "claims.py": ("report.findings", "report.tables", "results"),
        "pages.py": ("report", "results"),
        "sentences.py": ("report.findings", "results"),
        "forecast.py": ("forecast",),
        "evidence.py": ("study",),
    }.items()
}
FILES = [file for file in (ROOT / "experiments").rglob("*.py") if "tests" not in file.parts]


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_an_experiment_uses_public_names(file):
    used = {name for name in imported(file) if name.split(".")[0] == "commandv"}
    assert used <= PUBLIC | MORE.get(file.name, set())


def test_the_package_imports_no_experiment():
    for file in (ROOT / "src").rglob("*.py"):
        assert not [name for name in imported(file) if name.split(".")[0] == "experiments"], file
