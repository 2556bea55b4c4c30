"""The documentation site: it builds strictly, has every page and every public name, and its how-to's code runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import yaml

import commandv as cv
from places import ROOT

DOCS = ROOT / "docs"


class _Plain(yaml.SafeLoader):
    """Reads what is of use here of the configuration."""


def pages(nav):
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages(value)


def test_every_page_is_in_the_navigation_once():
    nav = list(pages(yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), _Plain)["nav"]))
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text("utf-8")
    named = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", text, re.M)}
    named |= set(re.findall(r"`(\w+)`", text))
    assert not set(dir(cv)) - named


def test_it_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert "paths: [src]" in config
    (tmp_path / "mkdocs.yml").write_text(config.replace("paths: [src]", f"paths: [{ROOT / 'src'}]"))
    shutil.copytree(DOCS, tmp_path / "docs")
    ran = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text("utf-8")
    assert "transfer_adapter" in page
    assert not re.findall(r'(?:src|<link[^>]*href)="https?://', page)


def test_a_behaviour_of_ones_own_can_be_made_as_the_page_says():
    names = {}
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", (DOCS / "own-behaviour.md").read_text("utf-8"), re.M | re.S))
    exec(code, names)
    task = names["task"]
    assert task.judge(task.dev[:2], ["1. Boil water.", "Boil water."]) == [1.0, 0.0]
