"""Which layers a choice names."""

from __future__ import annotations

import pytest

from commandv.errors import InputError
from commandv.models.layers import LAYER_CHOICES, choose_layers, last_third


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all_layers", list(range(12))),
        ("last_third", [8, 9, 10, 11]),
        ("last_half", [6, 7, 8, 9, 10, 11]),
        ("middle_third", [4, 5, 6, 7]),
        ("every_other", [0, 2, 4, 6, 8, 10]),
        ("7,3, 3", [3, 7]),
        ([11, 0, 11], [0, 11]),
        (last_third, [8, 9, 10, 11]),
    ],
)
def test_layer_choices(choice, expected):
    assert choose_layers(choice, 12) == expected


@pytest.mark.parametrize("name", LAYER_CHOICES)
@pytest.mark.parametrize("n_layers", [1, 2, 3, 5, 28])
def test_every_choice_finds_layers_in_a_model_of_any_depth(name, n_layers):
    assert set(choose_layers(name, n_layers)) <= set(range(n_layers))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("last_quarter", "or one of all_layers"),
        ("3,,4", "layer numbers"),
        ([12], r"\[12\]: expected some among 0 .. 11"),
        ("-1", r"\[-1\]"),
        ([], r"\[\]: expected some"),
        (lambda n: [n], r"\[12\]"),
        ("9" * 5000 + "%", "a depth like '60%'"),
        ("200%", "a depth like '60%'"),
        ("1_0", "layer numbers"),
        ([1.7], r"\[1.7\]: expected whole numbers"),
        ([True], "whole numbers"),
        (["a"], "whole numbers"),
        (3, "layers 3: expected whole numbers"),
        (lambda n: [n / 2], "whole numbers"),
    ],
)
def test_choices_of_layers_that_do_not_exist_are_refused(choice, message):
    with pytest.raises(InputError, match=message):
        choose_layers(choice, 12)


def test_a_layer_by_its_depth():
    assert choose_layers("50%", 30) == [15]
    assert choose_layers("0%", 30) == [0]
    assert choose_layers("100%", 30) == [29]
    with pytest.raises(InputError, match="a depth like '60%'"):
        choose_layers("half%", 30)
