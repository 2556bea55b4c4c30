"""Hashes of the code that decides what a study finds, beside its versions.

    python tests/support/code_versions.py    # writes tests/data/code-versions.json anew

Do so after a change of that code: with a higher version in `commandv.evaluation.versions` where it may find something
else, as it is where it cannot (a docstring, a comment and the like do not count as changes).
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

from commandv.evaluation.versions import CODE, VERSIONS

SOURCE = Path(__file__).parents[2] / "src" / "commandv"
LOCK = Path(__file__).parents[1] / "data" / "code-versions.json"


def plain(file: Path) -> str:
    """Return a file's code without comments, docstrings and layout."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return ast.unparse(tree)


def files(part: str) -> list[Path]:
    """Return the files that a component is made of."""
    found = []
    for name in CODE[part]:
        place = SOURCE / name
        found += sorted(place.rglob("*.py")) if place.is_dir() else [place]
    return found


def locked() -> dict[str, dict[str, str | int]]:
    """Return version and hash of every component."""
    return {
        part: {
            "version": VERSIONS[part],
            "hash": hashlib.sha256("".join(map(plain, files(part))).encode()).hexdigest()[:16],
        }
        for part in CODE
    }


if __name__ == "__main__":
    LOCK.write_text(json.dumps(locked(), indent=1) + "\n", encoding="utf-8")
