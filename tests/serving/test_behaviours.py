from __future__ import annotations

import pytest

from commandv.errors import InputError
from commandv.serving.behaviours import Part, UnknownBehaviour, behaviour_name, parse_behaviour, require_names

KNOWN = ("pirate", "list", "not-sorry")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("base", ()),
        ("base+pirate", (Part("pirate"),)),
        ("base+pirate@0.6+list", (Part("pirate", 0.6), Part("list"))),
        ("base+list+pirate@-1", (Part("list"), Part("pirate", -1.0))),
        ("base+not-sorry@0", (Part("not-sorry", 0.0),)),
    ],
)
def test_a_model_name_says_adapters_in_order_with_their_scales(name, parts):
    assert parse_behaviour(name, KNOWN) == parts
    assert behaviour_name(parts) == name


@pytest.mark.parametrize("name", ["", "gpt-5", "pirate", "base+", "base+pirat", "base+pirate+", "base +list", "Base"])
def test_a_name_that_names_nothing_is_told_what_there_is(name):
    with pytest.raises(UnknownBehaviour, match=r"known: base, base\+list, base\+not-sorry, base\+pirate"):
        parse_behaviour(name, KNOWN)


def test_a_misspelt_name_is_told_the_near_one():
    with pytest.raises(UnknownBehaviour, match=r"did you mean base\+pirate\?"):
        parse_behaviour("base+pirat@2", KNOWN)


@pytest.mark.parametrize("name", ["base+list@", "base+list@much", "base+list@nan", "base+list@inf", "base+list@1e17"])
def test_scales_are_finite_numbers(name):
    with pytest.raises(InputError, match="expected a number"):
        parse_behaviour(name, KNOWN)


def test_a_behaviour_is_named_once():
    with pytest.raises(InputError, match="list twice"):
        parse_behaviour("base+list+pirate+list@2", KNOWN)


@pytest.mark.parametrize("name", ["", "base", "a+b", "a@b", "-a", "a b", "a/b", "x" * 65])
def test_adapters_have_names_that_fit_into_model_names(name):
    with pytest.raises(InputError, match="adapter name"):
        require_names([name])
