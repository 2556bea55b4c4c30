"""The table of the ReFT family: every row has a constructor, public names, and pyreft's names for its tensors."""

from __future__ import annotations

import inspect

import pytest
import torch

import commandv as cv
from commandv.adapters.kinds import KINDS
from commandv.training.train import TRAINABLE

D, RANK = 10, 2
SHAPES = {"rows": (RANK, D), "vector": (RANK,), "rotation": (D, RANK)}


@pytest.mark.parametrize("name", KINDS)
def test_every_row_names_its_constructors_arguments_and_their_shapes(name):
    kind = KINDS[name]
    assert [n for n in inspect.signature(kind.build).parameters if n != "activation"] == sorted(
        kind.parts, key=list(inspect.signature(kind.build).parameters).index
    )
    made = kind.construct({part: torch.randn(SHAPES[row.shape]) for part, row in kind.parts.items()}, "linear")
    assert {(one.rank, one.d_model) for one in made} == {(RANK, D)}


@pytest.mark.parametrize("name", KINDS)
def test_every_row_has_its_public_names(name):
    kind = KINDS[name]
    assert getattr(cv, name) is kind.build
    spec = getattr(cv, kind.title)
    assert spec is TRAINABLE[name]
    assert kind.formula in spec.__doc__
    assert repr(spec(rank=3, layers=[1])).startswith(f"{kind.title}(rank=3, layers=[1]")


@pytest.mark.parametrize("name", KINDS)
def test_parts_that_start_as_another_follow_it(name):
    """Training draws first values in the table's order."""
    seen = set()
    for part, row in KINDS[name].parts.items():
        assert row.start in {"random", "zeros", *seen}
        seen.add(part)
