"""Sparse autoencoders that SAELens trains and writes are read as it reads them, and it reads ours."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commandv.interop.sae import load_sae, save_sae
from places import DATA

D, N, K = 12, 40, 4
# Written by `save_inference_model` of SAELens 6.54.12 as `trained` trains; beside it states and what it made of them.
GOLDEN = DATA / "saelens"


@pytest.fixture
def sae_lens():
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield pytest.importorskip("sae_lens", reason="needs pip install 'commandv[sae]'")


def trained(sae_lens: Any, **changes: Any) -> tuple[Any, torch.Tensor]:
    """Train for a few steps on states of few sources; return the SAE and states."""
    from sae_lens.config import SAETrainerConfig

    sources = torch.randn(N, D)

    def batches():
        while True:
            yield (torch.rand(64, N) * (torch.rand(64, N) < 0.05)) @ sources + 1.0

    sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=N, k=K, **changes))
    settings = SAETrainerConfig(total_training_samples=640, train_batch_size_samples=64, lr=1e-2, lr_end=1e-3)
    sae = sae_lens.SAETrainer(cfg=settings, sae=sae, data_provider=batches()).fit()
    return sae, next(batches())


def test_a_file_of_saelens_gives_the_features_that_it_gives_there():
    ours, theirs = load_sae(GOLDEN / "sae", layer=2), load_file(GOLDEN / "expected.safetensors")
    features = ours.encode(theirs["states"])
    torch.testing.assert_close(features, theirs["features"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.decode(features), theirs["decoded"], rtol=1e-4, atol=1e-5)
    assert (ours.architecture, ours.k, ours.d_model, ours.n_features) == ("topk", K, D, N)
    assert 0 < int((features > 0).sum()) <= K * len(features)


@pytest.mark.parametrize("changes", [{}, {"rescale_acts_by_decoder_norm": False}, {"apply_b_dec_to_input": False}])
@pytest.mark.parametrize("saver", ["save_model", "save_inference_model"])
def test_what_was_just_trained_is_read_too(changes, saver, sae_lens, tmp_path):
    theirs, h = trained(sae_lens, **changes)
    getattr(theirs, saver)(tmp_path)
    ours = load_sae(tmp_path, layer=2)
    with torch.no_grad():
        features = theirs.encode(h)
        torch.testing.assert_close(ours.decode(ours.encode(h)), theirs.decode(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.encode(h), features, rtol=1e-4, atol=1e-5)


def test_saelens_reads_what_is_saved_here(sae_lens, tmp_path):
    theirs, h = trained(sae_lens)
    theirs.save_inference_model(tmp_path / "theirs")
    save_sae(load_sae(tmp_path / "theirs", layer=2), tmp_path / "ours")
    again = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(again.encode(h), theirs.encode(h), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again(h), theirs(h), rtol=1e-4, atol=1e-5)
    assert again.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
