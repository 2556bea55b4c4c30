"""What cannot be pasted is refused, with what was got and expected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from commandv.adapters.adapter import Adapter
from commandv.errors import InputError, MismatchError
from commandv.models.identity import ModelRef
from commandv.transfer.convert.linear import Dense
from commandv.transfer.paste import paste
from made_up import (
    D_DONOR,
    DONOR,
    FIT,
    N,
    adapter_of,
    both,
    intervention,
)


def test_profiles_of_different_prompts_are_refused():
    donor, recipient = both()
    with pytest.raises(MismatchError, match=r"of different prompts \(p and q\); profile both models on the same"):
        paste(adapter_of(4), donor, replace(recipient, prompts="q"))


@pytest.mark.parametrize(
    "ref",
    [ModelRef("donor", "d2", D_DONOR, 6), ModelRef("donor", "d1", D_DONOR, 7), ModelRef("other", "", D_DONOR, 6)],
    ids=["revision", "depth", "name"],
)
def test_adapters_of_another_model_are_refused(ref):
    donor, recipient = both()
    with pytest.raises(MismatchError, match="adapter test: made for"):
        paste(replace(adapter_of(4), model=ref), donor, recipient)


def test_adapters_of_another_width_are_refused():
    donor, recipient = both()
    with pytest.raises(MismatchError, match="another width"):
        paste(adapter_of(4), recipient, donor)


def test_too_few_shared_rows_are_refused():
    donor, recipient = both()
    apart = replace(recipient, keys=recipient.keys + np.array([[N - 1, 0]]))  # one prompt in common
    with pytest.raises(InputError, match=r"1 shared end rows between the two profiles, expected at least 2"):
        paste(adapter_of(4), donor, apart)
    donor, recipient = both(3)
    with pytest.raises(InputError, match="2 rows or more"):
        paste(adapter_of(4), donor, recipient, holdout=0.99)


def test_a_choice_of_layers_that_no_donor_layer_goes_to_is_refused():
    donor, recipient = both()
    with pytest.raises(InputError, match=r"acts on donor layers \[0, 4\]; none is matched .* layers \[5, 7\]"):
        paste(adapter_of(0, 4), donor, recipient, layers=[7, 5])
    with pytest.raises(InputError, match=r"\[9\]: expected some among 0 .. 8"):
        paste(adapter_of(0, 4), donor, recipient, layers=[9])


@pytest.mark.parametrize("holdout", [-0.1, 1.0, 7, float("nan")])
def test_a_holdout_that_is_no_share_is_refused(holdout):
    donor, recipient = both()
    with pytest.raises(InputError, match="expected a share from 0"):
        paste(adapter_of(4), donor, recipient, holdout=holdout)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale):
    donor, recipient = both()
    with pytest.raises(InputError, match="expected a finite number"):
        paste(adapter_of(4), donor, recipient, scale=scale)


@pytest.mark.parametrize("fit", FIT)
def test_profiles_that_are_not_finite_are_refused(fit):
    donor, recipient = both()
    recipient.layer(6)[7, 2] = float("inf")
    with pytest.raises(InputError, match="NaN or infinity"):
        paste(adapter_of(4), donor, recipient, fit=fit)


def test_a_layer_that_the_profile_does_not_hold_is_refused():
    donor, recipient = both()
    partial = replace(recipient, activations={layer: recipient.layer(layer) for layer in (0, 8)})
    with pytest.raises(InputError, match=r"recipient holds layers \[0, 8\], not 6"):
        paste(adapter_of(4), donor, partial)


@pytest.mark.parametrize("fit", FIT)
def test_rows_that_are_all_the_same_are_refused(fit):
    donor, recipient = both()
    adapter = adapter_of(4)
    for broken, name in ((donor, "donor"), (recipient, "recipient")):
        same = replace(broken, activations={n: rows[:1].expand(N, -1) for n, rows in broken.activations.items()})
        pair = (same, recipient) if broken is donor else (donor, same)
        with pytest.raises(InputError, match=rf"profile of {name}: all \d+ rows .* are the same.*different prompts"):
            paste(adapter, *pair, fit=fit)


def test_a_fit_that_finds_nothing_is_refused_rather_than_pasted_as_nothing():
    def nothing(x, y):
        return Dense(torch.zeros(x.shape[1], y.shape[1]), y.double().mean(0), {})

    with pytest.raises(InputError, match="comes out as zero"):
        paste(adapter_of(4), *both(), fit=nothing)
    some = intervention(3)
    some.write[0, 0] = 0.0  # a zero among others is no adapter of zeros
    with pytest.raises(InputError, match="comes out as zero"):
        paste(
            Adapter({4: (some, replace(some, write=torch.zeros_like(some.write)))}, DONOR, "some"), *both(), fit=nothing
        )
