"""Carrying one layer's interventions through given converters, affine or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from commandv.adapters.adapter import Intervention
from commandv.adapters.carried import Carried
from commandv.adapters.kinds import steering_vector
from commandv.transfer.convert.linear import Dense
from commandv.transfer.fold import carried
from made_up import D_DONOR, D_RECIPIENT, intervention
from rows import normal, relative

HALVES = ["affine", "network"]


class NoNetwork(Dense):
    """An affine map that must not be made into anything else."""

    def network(self):
        raise AssertionError("folding needs no network")


def affine(d_x: int, d_y: int, seed: int, kind: type[Dense] = Dense) -> Dense:
    weight = normal(d_x, d_y, seed=seed)
    weight[:, 2] = 0.0  # nothing ever comes out there
    return kind(weight.float(), normal(d_y, seed=seed + 1), {"seed": seed})


INTO, BACK = affine(D_RECIPIENT, D_DONOR, 21), affine(D_DONOR, D_RECIPIENT, 31)


class Counted:
    """Gives a converter and counts how often it was asked to."""

    def __init__(self, converter):
        self.converter, self.times = converter, 0

    def __call__(self):
        self.times += 1
        return self.converter


def by_hand(one: Intervention, h: Tensor) -> Tensor:
    """act((h A + a) Rᵀ + b) W B."""
    seen = h @ INTO.weight.double() + INTO.bias
    inner = seen @ one.read.double().T + one.bias.double()
    return torch.relu(inner) @ one.write.double() @ BACK.weight.double()


@pytest.mark.parametrize("writing", HALVES)
@pytest.mark.parametrize("reading", HALVES)
def test_a_layer_acts_through_both_converters_whatever_either_is(reading, writing):
    """A network of the same map, too: only what is affine on both sides folds, and each side is fitted once for it."""
    into = Counted(INTO if reading == "affine" else INTO.network())
    back = Counted(BACK if writing == "affine" else BACK.network())
    many = (intervention(3, activation="relu"), intervention(7, activation="relu"))
    for one in many:
        one.read[0, 0] = one.write[0, 0] = 0.0  # a zero among others is no reading or writing of nothing
    passage = carried(many, into, back, D_RECIPIENT)
    folds = reading == writing == "affine"
    assert {type(one) for one in passage.edits} == {Intervention if folds else Carried}
    h = normal(9, D_RECIPIENT, seed=5)
    for one, edit in zip(many, passage.edits, strict=True):
        assert relative(edit.delta(h.float()), by_hand(one, h)) < 1e-5
    assert (passage.read, passage.write) == ({"seed": 21}, {"seed": 31})
    # An affine reading whose writing turns out not to be is asked for again: it was let go for the sake of memory.
    assert into.times == (2 if (reading, writing) == ("affine", "network") else 1)
    assert back.times == 1


def test_folding_makes_no_network():
    into = affine(D_RECIPIENT, D_DONOR, 21, NoNetwork)
    back = affine(D_DONOR, D_RECIPIENT, 31, NoNetwork)
    (one,) = carried((intervention(3),), lambda: into, lambda: back, D_RECIPIENT).edits
    torch.testing.assert_close(one.read, intervention(3).read @ INTO.weight.T, rtol=1e-5, atol=1e-5)
    assert not one.write[:, 2].any()


def test_what_reads_nothing_is_carried_without_a_fit_for_reading():
    def refuse():
        raise AssertionError("nothing is read")

    (vector,) = steering_vector(normal(D_DONOR, seed=2).float())
    passage = carried((vector,), refuse, lambda: BACK, D_RECIPIENT)
    (edit,) = passage.edits
    assert passage.read == {}
    assert (edit.read.shape, bool(edit.read.any())) == ((1, D_RECIPIENT), False)
    torch.testing.assert_close(edit.bias, vector.bias)
    torch.testing.assert_close(edit.write, vector.write @ BACK.weight, rtol=1e-5, atol=1e-5)


def test_one_that_reads_beside_one_that_does_not_is_fitted():
    (vector,) = steering_vector(normal(D_DONOR, seed=2).float())
    into = Counted(INTO)
    silent = replace(intervention(3), write=torch.zeros_like(intervention(3).write))
    passage = carried((vector, silent), into, lambda: BACK, D_RECIPIENT)
    assert into.times == 1
    assert [bool(one.read.any()) for one in passage.edits] == [False, True]
