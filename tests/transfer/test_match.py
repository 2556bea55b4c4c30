"""Which layer goes where."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from commandv.errors import InputError
from commandv.models.identity import ModelRef
from commandv.profiles.profile import Profile
from commandv.transfer.match import covering, explicit, lowest_error, nearest, proportional


def deep(n_layers: int) -> Profile:
    return Profile({}, np.zeros((0, 2), np.int64), ModelRef("m", "r", 4, n_layers), "prompts")


# 28 -> 32 layers at the even donor layers where the paper's floor and the released code's map part.
DONOR = [4, 6, 10, 12, 16, 18, 20, 26]
RELEASED = [5, 7, 11, 14, 18, 21, 23, 30]
FLOOR = [4, 6, 11, 13, 18, 20, 22, 29]


@pytest.mark.parametrize(("matcher", "expected"), [(proportional, FLOOR), (nearest, RELEASED)])
def test_known_map_from_28_to_32_layers(matcher, expected):
    pairs = matcher(deep(28), deep(32), DONOR)
    assert [pair.donor for pair in pairs] == DONOR
    assert [pair.recipient for pair in pairs] == expected


def test_known_map_from_32_to_28_layers():
    assert [pair.recipient for pair in proportional(deep(32), deep(28), [0, 5, 16, 30, 31])] == [0, 4, 14, 26, 27]
    assert [pair.recipient for pair in nearest(deep(32), deep(28), [0, 5, 16, 30, 31])] == [0, 4, 14, 26, 27]


def test_half_way_between_two_layers_the_lower_wins():
    assert [pair.recipient for pair in nearest(deep(2), deep(3), [0, 1])] == [0, 1]


@pytest.mark.parametrize("matcher", [proportional, nearest])
@given(donor=st.integers(1, 90), recipient=st.integers(1, 90))
def test_matchers_by_depth_stay_in_range_and_in_order(matcher, donor, recipient):
    pairs = matcher(deep(donor), deep(recipient), range(donor))
    found = [pair.recipient for pair in pairs]
    assert [pair.donor for pair in pairs] == list(range(donor))
    assert found == sorted(found)
    assert found[0] == 0
    assert 0 <= found[-1] < recipient
    # Off by less than a layer from alpha * l.
    assert all(abs(own - layer * recipient / donor) < 1 for layer, own in pairs)


@pytest.mark.parametrize("matcher", [proportional, nearest])
def test_models_of_equal_depth_match_one_to_one(matcher):
    assert all(pair.donor == pair.recipient for pair in matcher(deep(24), deep(24), range(24)))


def test_lowest_error_finds_each_layer_again_in_a_rotated_copy_of_the_model():
    rng = np.random.default_rng(0)
    keys = np.stack([np.arange(200), np.full(200, -1)], 1)
    states = [torch.tensor(rng.standard_normal((200, 12))) for _ in range(4)]
    turn = torch.linalg.qr(torch.tensor(rng.standard_normal((12, 12)))).Q
    one = Profile(dict(enumerate(states)), keys, ModelRef("a", "r", 12, 4), "prompts")
    order = [2, 0, 3, 1]
    two = Profile({i: states[k] @ turn for i, k in enumerate(order)}, keys, ModelRef("b", "r", 12, 4), "prompts")
    assert lowest_error(one, two, range(4)) == [(layer, order.index(layer)) for layer in range(4)]


def test_explicit_map_is_followed_in_the_order_of_the_adapter():
    assert explicit({3: 1, 1: 5})(deep(6), deep(6), [1, 3]) == [(1, 5), (3, 1)]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [({1: 2}, r"nothing of donor layer 3; it has \[1\]"), ({3: 6}, r"3 to 6, outside 0 .. 5"), ({3: -1}, "3 to -1")],
)
def test_explicit_map_refuses_what_it_cannot_follow(pairs, message):
    with pytest.raises(InputError, match=message):
        explicit(pairs)(deep(6), deep(6), [3])


@pytest.mark.parametrize(("donor", "recipient"), [(30, 18), (18, 30), (12, 12)])
def test_covering_gives_every_recipient_layer_one_donor_layer_at_its_depth(donor, recipient):
    pairs = covering(deep(donor), deep(recipient), range(donor))
    assert [pair.recipient for pair in pairs] == list(range(recipient))
    assert all(abs(pair.donor / donor - pair.recipient / recipient) < 1 / donor for pair in pairs)
    some = covering(deep(donor), deep(recipient), [0, 1])
    assert {pair.donor for pair in some} <= {0, 1}


@pytest.mark.parametrize("pairs", [{1: 1.5}, {"1": 2}, {1: None}])
def test_a_layer_map_of_other_than_whole_numbers(pairs):
    with pytest.raises(InputError, match="pairs is a dict, expected Mapping of int, int"):
        explicit(pairs)
