"""The program run as a shell would run it, and errors as its user should see them."""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import pytest
import transformers

from commandv import cli


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The standard output, which must be one JSON object and nothing else, without NaN."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program as a shell would, in this process."""
    # What main sets for the libraries, put back after the test; they read some of it only when first imported.
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "error" if name.endswith("VERBOSITY") else "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers.utils.logging.disable_progress_bar()

    def ran(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["commandv", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return Ran(int(code), *capsys.readouterr())

    return ran


def fails(ran: Ran, *words: str, code: int | None = None) -> None:
    """Expect an error as the user should see it: one line that says what is wrong, and nothing else.

    Args:
        ran: what the program did.
        words: parts of the line.
        code: the exit status; by default any of those that stand for an error that was raised on purpose.
    """
    assert ran.code in ([code] if code else cli.EXIT_CODES.values())
    assert ran.out == "" or set(ran.json) == {"error"}
    assert ran.err.startswith("commandv: ")
    assert ran.err.count("\n") == 1, ran.err
    for word in words:
        assert word in ran.err
