"""Features of a sparse autoencoder in another model: carried where they fit, refused where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import commandv as cv
import tiny
from commandv.errors import InputError, MismatchError
from commandv.interop.sae import SAE, load_sae, save_sae
from commandv.prompts.sets import Prompt, PromptSet
from experiments.organisms.siblings import rotated

LAYER, N, FEATURE, STRENGTH = 2, 20, 7, 3.0
NOUNS = ("the tea", "a cat", "one door", "my garden", "yes", "nobody", "2. Read", "the lazy dog")
TEXTS = PromptSet(tuple(Prompt(f"{a} {b} {a}?") for a in "abcdefghijklmnopqrstuvwxyz" for b in NOUNS))


def sae_directory(path: Path, *, d_model: int = tiny.D, layer: int = LAYER) -> Path:
    generator = torch.Generator().manual_seed(0)
    w_dec = torch.nn.functional.normalize(torch.randn(N, d_model, generator=generator))
    made = SAE(w_dec.T.contiguous(), torch.zeros(N), w_dec, torch.zeros(d_model), layer, "topk", k=3)
    return save_sae(made, path)


@pytest.fixture(scope="module")
def siblings():
    donor = tiny.tiny_lm(seed=3)
    recipient = rotated(donor, 48)
    return donor, recipient, *(cv.profile(lm, TEXTS, cache=False, text=None) for lm in (donor, recipient))


def change(lm: cv.LM, adapter: cv.Adapter) -> Tensor:
    """Return what an adapter does to the logits after a few tokens."""
    ids = torch.tensor([[1, 5, 9, 14, 60]])
    with torch.inference_mode():
        plain = lm.model(ids).logits
        with cv.attach(lm, adapter):
            return (lm.model(ids).logits - plain).flatten()


def test_a_feature_does_in_a_rotated_sibling_what_it_does_at_home(siblings, tmp_path):
    lm, sibling, donor, recipient = siblings
    adapter = load_sae(sae_directory(tmp_path / "sae")).steering(FEATURE, STRENGTH)
    pasted = cv.paste(adapter, donor, recipient, layers=[LAYER])
    at_home, carried = change(lm, adapter), change(sibling, pasted)
    other = change(sibling, cv.random_like(pasted, 0))
    assert torch.cosine_similarity(at_home, carried, dim=0) > 0.99
    assert float(carried.norm()) == pytest.approx(float(at_home.norm()), rel=0.1)
    assert torch.cosine_similarity(at_home, other, dim=0) < 0.5


def test_pasting_a_feature_carries_its_decoder_row(siblings, tmp_path):
    _, sibling, donor, recipient = siblings
    sae = load_sae(sae_directory(tmp_path / "sae"))
    pasted = cv.paste(sae.steering(FEATURE, STRENGTH), donor, recipient, layers=[LAYER])
    (one,) = pasted.interventions[LAYER]
    assert str(one.positions) == "all"
    row = cv.carry_directions({LAYER: sae.feature(FEATURE)}, cv.link(donor, recipient))[LAYER]
    added = one.delta(torch.randn(5, sibling.d_model))
    torch.testing.assert_close(added, (STRENGTH * row).expand(5, -1), rtol=1e-4, atol=1e-5)


def test_an_sae_of_another_width_is_refused_by_model_and_profile(siblings, tmp_path):
    lm, sibling, donor, recipient = siblings
    adapter = load_sae(sae_directory(tmp_path / "sae", d_model=24)).steering(FEATURE, STRENGTH)
    for one in (lm, sibling):
        with pytest.raises(MismatchError, match=rf"d_model 24.*d_model {one.d_model}.*paste\(\) carries"):
            cv.attach(one, adapter)
    with pytest.raises(MismatchError, match=rf"d_model 24.*d_model {tiny.D}"):
        cv.paste(adapter, donor, recipient)


def test_an_sae_of_a_deeper_model_is_refused_by_model_and_profile(siblings, tmp_path):
    lm, _, donor, recipient = siblings
    adapter = load_sae(sae_directory(tmp_path / "sae", layer=tiny.LAYERS + 3)).steering(FEATURE, STRENGTH)
    with pytest.raises(MismatchError, match=rf"layers up to {tiny.LAYERS + 3}; .* layers 0 .. {tiny.LAYERS - 1}"):
        cv.attach(lm, adapter)
    with pytest.raises(InputError, match=rf"donor layers \[{tiny.LAYERS + 3}\]; none is matched"):
        cv.paste(adapter, donor, recipient)
