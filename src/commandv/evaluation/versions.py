"""Versions of the code that decides what a cell of a study finds; they are part of its key.

Raise a component's number with any change after which it may find something else; kept cells are then made anew. A
test knows when the code of one has changed without (tests/evaluation/test_versions.py).
"""

from __future__ import annotations

from commandv.evaluation import graders

VERSIONS: dict[str, int] = {
    "graders": graders.VERSION,  # what labels an answer gets
    "arms": 4,  # what answers
    "price": 1,
    "tuning": 1,
    "carrying": 1,  # from a donor's adapter to a recipient's
    "answering": 1,  # from a prompt to an answer
}

_GRADING = "graders formats tone reasoning arithmetic catalogue questions outcomes instructions judges tasks likeness"
# What each component is made of, below src/commandv; a folder stands for all files in it.
CODE: dict[str, tuple[str, ...]] = {
    "graders": (
        "prompts/loops.py",
        *(f"evaluation/{name}.py" for name in _GRADING.split()),
    ),
    "arms": (
        "evaluation/arms.py",
        "evaluation/material.py",
        "evaluation/meter.py",
        "evaluation/transferring/running.py",
    ),
    "price": ("evaluation/price.py",),
    "tuning": ("evaluation/tuning.py",),
    "carrying": ("transfer", "steering", "adapters/adapter.py", "adapters/carried.py", "adapters/network.py"),
    "answering": ("models/encoding.py", "models/generation.py", "models/prefix.py", "adapters/attach.py"),
}
