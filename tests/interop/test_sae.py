"""Sparse autoencoders of SAELens: the file's own formulas, features as steering vectors, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import commandv as cv
import tiny
from commandv.errors import FormatError, InputError, MismatchError, StorageError
from commandv.interop.sae import ARCHITECTURES, SAE, load_sae, save_sae
from limits import file_size_limit

D, N, K = tiny.D, 80, 6


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def weights(**changes: Tensor | None) -> dict[str, Tensor]:
    made = {"W_enc": torch.randn(D, N), "b_enc": torch.randn(N), "W_dec": torch.randn(N, D), "b_dec": torch.randn(D)}
    return {name: one for name, one in {**made, **changes}.items() if one is not None}


def write(path: Path, tensors: dict[str, Tensor], *, hook: str | None = "blocks.2.hook_resid_post", **changes) -> Path:
    """Write a directory as SAELens 6 does; a key that is None is left out."""
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "sae_weights.safetensors")
    config = {
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": hook, "prepend_bos": True},
        "architecture": "standard",
        **changes,
    }
    (path / "cfg.json").write_text(json.dumps({key: one for key, one in config.items() if one is not None}))
    return path


def made(architecture: str, **changes) -> SAE:
    tensors = {name.lower(): one for name, one in weights().items()}
    if architecture == "jumprelu":
        changes = {"threshold": torch.rand(N) * 4, **changes}
    if architecture == "topk":
        changes = {"k": K, **changes}
    return SAE(**{**tensors, "layer": 2, "architecture": architecture, **changes})


# -- the formulas -----------------------------------------------------------------------------------------------------


def test_standard(tmp_path):
    w = weights()
    sae = load_sae(write(tmp_path / "a", w))
    h = torch.randn(3, 5, D)
    features = torch.relu((h - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(sae.encode(h), features)
    torch.testing.assert_close(sae.decode(features), features @ w["W_dec"] + w["b_dec"])
    uncentred = load_sae(write(tmp_path / "a", w, apply_b_dec_to_input=False))
    torch.testing.assert_close(uncentred.encode(h), torch.relu(h @ w["W_enc"] + w["b_enc"]))
    assert sae.encode(h.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("key", ["threshold", "log_threshold"])
def test_jumprelu_passes_what_is_above_its_threshold_unchanged(key, tmp_path):
    threshold = 0.5 + 3 * torch.rand(N)
    w = weights(**{key: threshold.log() if key == "log_threshold" else threshold})
    sae = load_sae(write(tmp_path / "a", w, architecture="jumprelu"))
    h = torch.randn(7, D)
    before = (h - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    features = sae.encode(h)
    torch.testing.assert_close(features, torch.where(before > threshold, before, 0.0))
    assert 0 < int((features > 0).sum()) < int((before > 0).sum())


@pytest.mark.parametrize("rescaled", [False, True])
def test_topk_keeps_the_k_largest(rescaled, tmp_path):
    w = weights()
    path = write(tmp_path / "a", w, architecture="topk", k=K, rescale_acts_by_decoder_norm=rescaled)
    sae = load_sae(path)
    h = torch.randn(4, D)
    before = (h - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].norm(dim=1) if rescaled else torch.ones(N)
    features = sae.encode(h)
    for row, expected in zip(features, before * norms, strict=True):
        kept = expected.argsort(descending=True)[:K]
        assert set(row.nonzero().flatten().tolist()) == {int(i) for i in kept if expected[i] > 0}
        torch.testing.assert_close(row[kept], expected[kept].relu())
    torch.testing.assert_close(sae.decode(features), (features / norms) @ w["W_dec"] + w["b_dec"])
    assert torch.allclose(sae.feature(4), w["W_dec"][4] / norms[4])


def test_one_unit_of_a_feature_is_its_direction():
    for sae in (*map(made, ARCHITECTURES), made("topk", rescaled=True)):
        features = torch.rand(N)
        more = features.clone()
        more[9] += 1
        torch.testing.assert_close(
            sae.decode(more) - sae.decode(features), sae.feature(9), rtol=1e-4, atol=1e-4
        )  # fmt: skip


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_saved_loads_the_same(architecture, tmp_path):
    changes = {"rescaled": True} if architecture == "topk" else {}
    sae = made(architecture, centred=False, metadata={"model_name": "tiny", "prepend_bos": True}, **changes)
    again = load_sae(save_sae(sae, tmp_path / "sae"))
    for field in ("layer", "architecture", "k", "centred", "rescaled"):
        assert getattr(again, field) == getattr(sae, field)
    for name, one in sae.tensors().items():
        assert torch.equal(again.tensors()[name], one)
    h = torch.randn(3, D)
    assert torch.equal(again.encode(h), sae.encode(h))
    assert again.metadata["model_name"] == "tiny"
    assert sorted(one.name for one in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    with pytest.raises(FormatError, match=r"cfg\.json.*choose another place"):  # two files cannot be replaced at once
        save_sae(sae, tmp_path / "sae")


def test_older_files_had_one_flat_dictionary(tmp_path):
    """SAELens before 6: no metadata, other names, topk as an activation, a scaling factor of 1."""
    w = weights(scaling_factor=torch.ones(N))
    path = write(tmp_path / "a", w, metadata=None, architecture=None, normalize_activations=False,
                 hook_point="blocks.3.hook_resid_pre", model_name="gpt2-small", activation_fn_str="topk",
                 activation_fn_kwargs={"k": 3})  # fmt: skip
    sae = load_sae(path)
    assert (sae.architecture, sae.k, sae.layer, sae.metadata["model_name"]) == ("topk", 3, 2, "gpt2-small")
    plain = write(path, weights(), metadata=None, architecture=None, hook_point="blocks.1.hook_resid_post")
    assert (load_sae(plain).architecture, load_sae(plain).layer) == ("standard", 1)
    with pytest.raises(FormatError, match="activation 'tanh-relu'"):
        load_sae(write(path, weights(), metadata=None, activation_fn_str="tanh-relu"))


def test_bfloat16_weights_are_read_in_float32(tmp_path):
    w = {name: one.bfloat16() for name, one in weights().items()}
    sae = load_sae(write(tmp_path / "a", w, dtype="bfloat16"))
    assert torch.equal(sae.w_dec, w["W_dec"].float())


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.2.hook_resid_post", 2),
        ("blocks.2.hook_resid_pre", 1),
        ("blocks.0.hook_resid_pre", -1),
        ("blocks.12.hook_out", 12),
        ("model.layers.7", 7),
        ("transformer.h.7", 7),
    ],
)
def test_the_hook_tells_the_layer(hook, layer, tmp_path):
    assert load_sae(write(tmp_path / "a", weights(), hook=hook)).layer == layer


def test_resid_pre_of_a_block_is_the_output_of_the_one_before(tmp_path):
    """Checked on a live model: the input of block 2 is what our layer 1 puts out."""
    lm = tiny.tiny_lm()
    seen = {}
    handles = [
        lm.blocks[2].register_forward_pre_hook(lambda _m, args: seen.update(pre=args[0])),
        lm.blocks[1].register_forward_hook(lambda _m, _i, out: seen.update(post=out)),
    ]
    lm.model(torch.tensor([[1, 2, 3]]))
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["pre"], seen["post"])


@pytest.mark.parametrize("hook", ["blocks.2.hook_mlp_out", "blocks.2.attn.hook_z", None])
def test_other_hooks_need_a_layer(hook, tmp_path):
    path = write(tmp_path / "a", weights(), hook=hook)
    with pytest.raises(FormatError, match=r"stream between blocks.*say layer="):
        load_sae(path)
    assert load_sae(path, layer=3).layer == 3


# -- steering ---------------------------------------------------------------------------------------------------------


def test_steering_adds_the_decoder_row_to_every_token(tmp_path):
    lm = tiny.tiny_lm()
    w = weights()
    sae = load_sae(write(tmp_path / "a", w, hook="blocks.2.hook_resid_pre"))
    adapter = sae.steering(11, 2.5)
    assert (adapter.layers, adapter.provenance["feature"]) == ([1], 11)
    ids = torch.tensor([[1, 5, 9, 14]])
    with cv.attach(lm, adapter), torch.inference_mode():
        ours = lm.model(ids).logits
    handle = lm.blocks[1].register_forward_hook(lambda _m, _i, h: h + 2.5 * w["W_dec"][11])
    with torch.inference_mode():
        by_hand = lm.model(ids).logits
    handle.remove()
    torch.testing.assert_close(ours, by_hand)
    again = cv.load_adapter(cv.save(adapter, tmp_path / "saved"))
    assert again.provenance["sae"]["model_name"] == "tiny"


def test_steering_that_cannot_be():
    sae = made("standard")
    for number in (-1, N):
        with pytest.raises(InputError, match=f"feature {number}: the SAE has 0 .. {N - 1}"):
            sae.steering(number, 1.0)
    with pytest.raises(InputError, match="reads the embeddings"):
        made("standard", layer=-1).steering(0, 1.0)
    with pytest.raises(MismatchError, match="width"):
        cv.attach(tiny.tiny_lm("gpt2", n_embd=48), sae.steering(0, 1.0))


def test_states_and_features_of_another_width():
    sae = made("standard")
    with pytest.raises(MismatchError, match=f"for width {D}"):
        sae.encode(torch.zeros(2, D + 1))
    with pytest.raises(MismatchError, match=f"has {N} features"):
        sae.decode(torch.zeros(2, N - 1))


# -- files that are not whole -----------------------------------------------------------------------------------------

nan = torch.full((N,), float("nan"))
BROKEN = {
    "gated": ({}, {"architecture": "gated"}, "architecture 'gated'; known are standard"),
    "an architecture that is no text": ({}, {"architecture": ["standard"]}, "architecture"),
    "no decoder": ({"W_dec": None}, {}, "'W_dec'.*missing"),
    "no threshold": ({}, {"architecture": "jumprelu"}, "'threshold'.*missing"),
    "a threshold too many": ({"threshold": torch.ones(N)}, {}, "threshold.*not those of a standard"),
    "a real scaling factor": ({"scaling_factor": torch.rand(N)}, {}, "scaling_factor"),
    "topk without k": ({}, {"architecture": "topk"}, "k=None"),
    "topk of a truth value": ({}, {"architecture": "topk", "k": True}, "k=True"),
    "topk of more than there are": ({}, {"architecture": "topk", "k": N + 1}, f"k={N + 1}"),
    "topk of text": ({}, {"architecture": "topk", "k": "6"}, "k=6"),
    "another width": ({}, {"d_in": D + 1}, f"says d_in {D + 1}, the weights have {D}"),
    "no width": ({}, {"d_in": None}, "says d_in nothing"),
    "another count": ({}, {"d_sae": 7}, "says d_sae 7"),
    "an encoder of another width": ({"W_enc": torch.ones(D + 1, N)}, {}, "W_enc is"),
    "a transposed encoder": ({"W_enc": torch.ones(N, D)}, {}, "W_enc is"),
    "a decoder that is a vector": ({"W_dec": torch.ones(N)}, {}, "SAE"),
    "a decoder that is a number": ({"W_dec": torch.tensor(1.0)}, {}, "."),
    "NaN": ({"b_enc": nan}, {}, "b_enc holds NaN"),
    "a threshold that overflows": (
        {"log_threshold": torch.full((N,), 99.0)},
        {"architecture": "jumprelu"},
        "threshold",
    ),
    "normalised inputs": ({}, {"normalize_activations": "layer_norm"}, "normalised"),
    "attention heads": ({}, {"reshape_activations": "hook_z"}, "attention heads"),
    "metadata that is a list": ({}, {"metadata": [1]}, "expected an object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_do_not_fit_together(name, tmp_path):
    tensors, config, message = BROKEN[name]
    with pytest.raises(FormatError, match=message):
        load_sae(write(tmp_path / "a", weights(**tensors), **config))


def test_files_that_are_not_whole(tmp_path):
    path = write(tmp_path / "a", weights())
    file, config = path / "sae_weights.safetensors", path / "cfg.json"
    whole, text = file.read_bytes(), config.read_text()
    for data, message in [(whole[:100], "truncated"), (whole[:-4], "truncated"), (b"", "empty"), (b"x" * 99, "trunc"),
                          (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")]:  # fmt: skip
        file.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            load_sae(path)
    file.write_bytes(whole)
    for broken in ("{", "[]", "null", "[" * 100_000):
        config.write_text(broken)
        with pytest.raises(FormatError, match=r"cfg\.json"):
            load_sae(path)
    config.write_text(text)
    assert load_sae(path).layer == 2
    file.unlink()
    with pytest.raises(FormatError, match=r"sae_weights\.safetensors: no such file"):
        load_sae(path)
    with pytest.raises(FormatError, match="no such file"):
        load_sae(tmp_path / "nowhere")


def test_an_sae_is_no_adapter_and_loading_it_says_so(tmp_path):
    with pytest.raises(FormatError, match=r"a sparse autoencoder; open it with commandv\.interop\.sae"):
        cv.load_adapter(write(tmp_path / "a", weights()))


def test_saving_destroys_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"notes\.txt.*choose another place"):
        save_sae(made("standard"), tmp_path)
    with pytest.raises(FormatError, match="choose another place"):
        save_sae(made("standard"), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with file_size_limit(1000), pytest.raises(StorageError):
        save_sae(made("jumprelu"), tmp_path / "sae")
    assert [one.name for one in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "changes",
    [{"architecture": "gated"}, {"architecture": "jumprelu"}, {"threshold": torch.ones(N)}, {"k": 3}],
)
def test_an_sae_made_wrongly(changes):
    tensors = {name.lower(): one for name, one in weights().items()}
    with pytest.raises(InputError, match="SAE"):
        SAE(**tensors, layer=0, **changes)
