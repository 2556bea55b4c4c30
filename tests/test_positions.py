from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from commandv.errors import InputError
from commandv.positions import EVERYWHERE, LAST, Positions, as_positions


def chosen(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


def prompt(*rows):
    return torch.tensor(rows, dtype=torch.bool)


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("l1", LAST),
        ("f3", Positions(first=3)),
        ("f3+l5", Positions(3, 5)),
        ("l5 + f3", Positions(3, 5)),
        ("l1+g5", Positions(0, 1, 5)),
        ("g2", Positions(generated=2)),
        ("all", EVERYWHERE),
    ],
)
def test_notation(text, positions):
    assert Positions.parse(text) == as_positions(text) == positions
    assert Positions.parse(str(positions)) == positions
    assert as_positions(positions) is positions


@pytest.mark.parametrize("text", ["", "l", "x3", "l-1", "l1+l2", "f0", "g0+l0", "all+l1", "l1,f2", "1", "l1.5", "l1+"])
def test_bad_notation(text):
    with pytest.raises(InputError, match="expected"):
        Positions.parse(text)


@pytest.mark.parametrize("counts", [(0, 0, 0), (-1, 2, 0), (0, 1, -1)])
def test_bad_counts(counts):
    with pytest.raises(InputError, match="at least one position"):
        Positions(*counts)


@pytest.mark.parametrize(
    ("text", "left", "right"),
    [
        ("l1", [[4], [4], [4]], [[4], [2], [0]]),
        ("l2", [[3, 4], [3, 4], [4]], [[3, 4], [1, 2], [0]]),
        ("l9", [[0, 1, 2, 3, 4], [2, 3, 4], [4]], [[0, 1, 2, 3, 4], [0, 1, 2], [0]]),
        ("f1", [[0], [2], [4]], [[0], [0], [0]]),
        ("f2+l2", [[0, 1, 3, 4], [2, 4], []], [[0, 1, 3, 4], [0, 2], []]),  # each at most half, as in pyreft
        ("f1+l3", [[0, 3, 4], [2, 4], []], [[0, 3, 4], [0, 2], []]),
        ("all", [[0, 1, 2, 3, 4], [2, 3, 4], [4]], [[0, 1, 2, 3, 4], [0, 1, 2], [0]]),
        ("g3", [[], [], []], [[], [], []]),
    ],
)
def test_prompts_of_mixed_length(text, left, right):
    positions = Positions.parse(text)
    padded_left = prompt([1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1])
    padded_right = prompt([1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0])
    assert chosen(positions.select(padded_left, 0, 5)) == left
    assert chosen(positions.select(padded_right, 0, 5)) == right


@pytest.mark.parametrize(
    ("text", "columns"), [("l1+g2", [3, 4, 5]), ("g1", [4]), ("f1", [0]), ("all", [0, 1, 2, 3, 4, 5, 6])]
)
def test_generated_tokens(text, columns):
    positions = Positions.parse(text)
    assert chosen(positions.select(prompt([1, 1, 1, 1]), 0, 7)) == [columns]


@pytest.mark.parametrize(
    ("text", "only"), [("l1", True), ("f2+l2", True), ("l1+g1", False), ("g3", False), ("all", False)]
)
def test_prefill_only(text, only):
    assert Positions.parse(text).prefill_only == only


@settings(max_examples=150, deadline=None)
@given(
    counts=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.booleans()).filter(any),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 9), max_size=4),
)
def test_passes_of_any_length_select_what_one_pass_does(counts, lengths, cuts):
    positions = Positions(*counts)
    width, total = max(lengths), max(lengths) + 3
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = True
    whole = positions.select(mask, 0, total)
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    pieces = [positions.select(mask, start, stop) for start, stop in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces, 1), whole)
    for start, piece in zip(edges, pieces, strict=False):
        assert positions.touches(width, start) or not piece.any()
    assert not (whole[:, :width] & ~mask).any()
    if positions.prefill_only:
        assert not whole[:, width:].any()
        assert not positions.touches(width, width)
