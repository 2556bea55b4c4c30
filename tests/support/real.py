"""The packaged real models, where they are installed; a test that runs them carries the marker `real`."""

from __future__ import annotations

import pytest

import commandv as cv
from commandv.models.names import PACKAGED, packaged_files

GEMMA, SMOL = "gemma-3-270m", "smollm2-135m-instruct"


def require(*names: str) -> None:
    """Skip the test, saying what to install, where one of the models is not there."""
    for name in names:
        if not packaged_files(name):
            pytest.skip(f"{name} is not installed; {PACKAGED[name].install}")


def load(name: str) -> cv.LM:
    require(name)
    return cv.load_model(name, dtype="float32")
