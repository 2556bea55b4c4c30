"""Nobody changes what a study finds without saying so: kept cells would pass for those of the new code."""

from __future__ import annotations

import json

import pytest

import code_versions
from commandv.evaluation.versions import CODE, VERSIONS


@pytest.mark.parametrize("part", CODE)
def test_the_code_of_a_part_is_that_of_its_version(part):
    kept, found = json.loads(code_versions.LOCK.read_text("utf-8"))[part], code_versions.locked()[part]
    assert found["version"] >= kept["version"], f"the version of {part} went down"
    assert found == kept, (
        f"the code of {part!r} has changed. If it may find something else, raise its number in "
        "commandv/evaluation/versions.py; then: python tests/support/code_versions.py"
    )


def test_every_version_has_code_that_is_there():
    assert set(CODE) == set(VERSIONS)
    for part in CODE:
        assert all(file.is_file() for file in code_versions.files(part)), part


def test_docstrings_and_comments_do_not_count(tmp_path):
    one, two, other = (tmp_path / name for name in ("a.py", "b.py", "c.py"))
    one.write_text('def f(x):\n    """Say."""\n    return x + 1  # why\n')
    two.write_text('def f(x):\n\n    """Tell."""\n    return (x+1)\n')
    other.write_text("def f(x):\n    return x + 2\n")
    assert code_versions.plain(one) == code_versions.plain(two) != code_versions.plain(other)
