"""Files of other projects: read as their own formulas say, and nothing in them is ever run."""

from __future__ import annotations

import io
import json
import pickle
import random
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import commandv as cv
from commandv.adapter import Adapter
from commandv.errors import FormatError, InputError
from commandv.inspection import describe
from commandv.interop.pickles import load_tensors
from commandv.load import detect
from commandv.positions import Positions

ARTEFACTS = Path(__file__).parents[2] / "shared" / "artefacts"
D, RANK = 16, 3
KINDS = ("LoReFT", "NoReFT", "ConsReFT", "LobiReFT", "DiReFT", "NodiReFT")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 12345\n"


# -- pyreft's own modules and files, written independently of ours ----------------------------------------------------


class Rotation(nn.Module):
    """pyreft's LowRankRotateLayer: a weight [d, r] made orthonormal by torch's parametrisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(D, RANK)))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight


def trained_rotation() -> nn.Module:
    """A parametrised rotation after some optimiser steps, so that it is not its initial value any more."""
    module = nn.utils.parametrizations.orthogonal(Rotation())
    initial = module.weight.detach().clone()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (module.weight * torch.randn(D, RANK)).sum().backward()
        optimizer.step()
    assert (module.weight - initial).abs().max() > 0.1
    return module


class Reft(nn.Module):
    """One ReFT intervention with the forward and the state dict that pyreft gives it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("NoReFT", "NodiReFT"):
            self.proj_layer = nn.Linear(D, RANK)
        else:
            self.rotate_layer = trained_rotation()
        if kind in ("ConsReFT", "LobiReFT"):
            self.learned_source = nn.Parameter(torch.rand(RANK))
        else:
            self.learned_source = nn.Linear(D, RANK)

    def forward(self, h: Tensor) -> Tensor:
        rotation = None if self.kind in ("NoReFT", "NodiReFT") else self.rotate_layer.weight
        if self.kind == "LoReFT":
            return h + (self.learned_source(h) - h @ rotation) @ rotation.T
        if self.kind == "NoReFT":
            return h + (self.learned_source(h) - self.proj_layer(h)) @ self.proj_layer.weight
        if self.kind == "ConsReFT":
            return h + (self.learned_source - h @ rotation) @ rotation.T
        if self.kind == "LobiReFT":
            return h + self.learned_source @ rotation.T
        if self.kind == "DiReFT":
            return h + self.learned_source(h) @ rotation.T
        return h + self.learned_source(h) @ self.proj_layer.weight

    def saved(self) -> OrderedDict[str, Tensor]:
        if self.kind == "LoReFT":
            return OrderedDict(
                weight=self.learned_source.weight.data,
                bias=self.learned_source.bias.data,
                rotate_layer=self.rotate_layer.weight.data,
            )
        dims = {"embed_dim": torch.tensor(D), "interchange_dim": torch.tensor(D)}
        return OrderedDict({**dims, **self.state_dict()})


def key(layer: int, number: int = 0) -> str:
    return f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{number}"


def write_pyreft(path: Path, modules: dict[str, Reft], *, order: list[str] | None = None, **metadata) -> Path:
    """Write a directory as pyreft does; `order` is that of `sorted_keys`, the modules' that of the representations."""
    path.mkdir()
    for name, module in modules.items():
        torch.save(module.saved(), path / f"intkey_{name}.bin")
    layers = [int(name.split("_")[1]) for name in modules]
    classes = [f"<class 'pyreft.interventions.{m.kind.title()}Intervention'>" for m in modules.values()]
    config = {
        "intervention_constant_sources": [True] * len(modules),
        "intervention_dimensions": [None if m.kind == "LoReFT" else D for m in modules.values()],
        "intervention_types": classes,
        "mode": "parallel",
        "representations": [[layer, "block_output", "pos", 1, RANK, *[None] * 9] for layer in layers],
        "sorted_keys": order or list(modules),
        "transformers_version": "4.45.1",
    }
    (path / "config.json").write_text(json.dumps(config))
    if metadata:
        (path / "training_metadata.json").write_text(json.dumps(metadata))
    return path


def edit(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def delta(adapter: Adapter, layer: int, h: Tensor) -> Tensor:
    return sum(one.delta(h) for one in adapter.interventions[layer])


def assert_reads_as(adapter: Adapter, layer: int, module: Reft) -> None:
    h = 3 * torch.randn(5, D)
    with torch.no_grad():
        torch.testing.assert_close(h + delta(adapter, layer, h), module(h), rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_pyreft_gives_its_formula(kind, tmp_path):
    module = Reft(kind)
    adapter = cv.load_adapter(write_pyreft(tmp_path / "a", {key(6): module}, model_name="some/model", positions="l1"))
    assert adapter.layers == [6]
    assert adapter.d_model == D
    assert adapter.model.id == "some/model"
    assert adapter.provenance["kinds"] == [kind.lower()]
    assert {str(one.positions) for one in adapter.interventions[6]} == {"l1"}
    assert_reads_as(adapter, 6, module)


@pytest.mark.parametrize("kind", ["ConsReFT", "LobiReFT", "DiReFT"])
def test_rotation_kinds_save_the_keys_of_torchs_parametrisation(kind):
    """Guards the test itself: these are the tensors that REFERENCE.md lists for pyreft's files."""
    saved = Reft(kind).saved()
    assert saved["rotate_layer.parametrizations.weight.original"].shape == (D, RANK)
    assert saved["rotate_layer.parametrizations.weight.0.base"].shape == (D, D)


def test_bfloat16_files_are_read(tmp_path):
    module = Reft("NodiReFT").bfloat16()
    adapter = cv.load_adapter(write_pyreft(tmp_path / "a", {key(0): module}))
    assert_reads_as(adapter, 0, module.float())


def test_noreft_without_projection_bias(tmp_path):
    module = Reft("NoReFT")
    path = write_pyreft(tmp_path / "a", {key(0): module})
    saved = module.saved()
    del saved["proj_layer.bias"]
    torch.save(saved, path / f"intkey_{key(0)}.bin")
    module.proj_layer.bias.data.zero_()
    assert_reads_as(cv.load_adapter(path), 0, module)


def test_layer_comes_from_the_key_not_from_the_order(tmp_path):
    modules = {key(layer): Reft("DiReFT") for layer in (10, 2, 0)}
    path = write_pyreft(tmp_path / "a", modules, order=[key(0), key(10), key(2)])
    adapter = cv.load_adapter(path)
    assert adapter.layers == [0, 2, 10]
    for layer in adapter.layers:
        assert_reads_as(adapter, layer, modules[key(layer)])


def test_mixed_kinds_follow_the_representations_whatever_the_sorted_keys(tmp_path):
    """Saved tensors alone cannot tell these two kinds apart."""
    modules = {key(8): Reft("LobiReFT"), key(1): Reft("ConsReFT")}
    adapter = cv.load_adapter(write_pyreft(tmp_path / "a", modules, order=[key(1), key(8)]))
    for layer in (1, 8):
        assert_reads_as(adapter, layer, modules[key(layer)])


def test_first_and_last_positions_with_an_intervention_for_each(tmp_path):
    modules = {key(4, 0): Reft("DiReFT"), key(4, 1): Reft("NodiReFT")}
    adapter = cv.load_adapter(write_pyreft(tmp_path / "a", modules, positions="f3+l2"))
    first, last = adapter.interventions[4]
    assert (first.positions, last.positions) == (Positions(first=3), Positions(last=2))
    h = torch.randn(2, D)
    with torch.no_grad():
        torch.testing.assert_close(h + first.delta(h), modules[key(4, 0)](h))
        torch.testing.assert_close(h + last.delta(h), modules[key(4, 1)](h))


def test_first_and_last_positions_with_one_shared_intervention(tmp_path):
    adapter = cv.load_adapter(write_pyreft(tmp_path / "a", {key(4): Reft("DiReFT")}, positions="f3+l2"))
    assert [str(one.positions) for one in adapter.interventions[4]] == ["f3+l2"]


def test_imported_adapter_saves_as_ours(tmp_path):
    imported = cv.load_adapter(write_pyreft(tmp_path / "a", {key(3): Reft("LoReFT")}, positions="f1+l1"))
    again = cv.load_adapter(cv.save(imported, tmp_path / "ours"))
    h = torch.randn(4, D)
    assert torch.equal(delta(again, 3, h), delta(imported, 3, h))
    assert again.provenance == imported.provenance


# -- pyreft directories that are not whole ----------------------------------------------------------------------------


@pytest.fixture
def pyreft(tmp_path) -> Path:
    return write_pyreft(tmp_path / "a", {key(0): Reft("DiReFT"), key(2): Reft("DiReFT")}, positions="l1")


def weights(path: Path) -> Path:
    return path / f"intkey_{key(2)}.bin"


BROKEN = {
    "unknown class": (lambda p: edit(p, intervention_types=["<class 'x.VanillaIntervention'>"] * 2), "class.*Vanilla"),
    "a class too few": (lambda p: edit(p, intervention_types=["<class 'x.DireftIntervention'>"]), "not pyreft's"),
    "no keys": (lambda p: edit(p, sorted_keys=[], representations=[], intervention_types=[]), "not pyreft's"),
    "keys of other layers": (lambda p: edit(p, sorted_keys=[key(0), key(3)]), "not pyreft's.*layer_3"),
    "another width": (lambda p: edit(p, intervention_dimensions=[D + 1, D + 1]), r"width \[17\]"),
    "config that is no JSON": (lambda p: (p / "config.json").write_text("{"), "not pyreft's"),
    "config without our keys": (lambda p: (p / "config.json").write_text("{}"), "sorted_keys"),
    "metadata that is no JSON": (lambda p: (p / "training_metadata.json").write_text("{"), "not valid JSON"),
    "missing weights": (lambda p: weights(p).unlink(), r"layer_2.*missing; copy the whole"),
    "git-LFS pointer": (lambda p: weights(p).write_bytes(LFS_POINTER), "git lfs pull"),
    "empty weights": (lambda p: weights(p).write_bytes(b""), "empty"),
    "truncated weights": (lambda p: weights(p).write_bytes(weights(p).read_bytes()[:900]), "truncated"),
    "a list for weights": (lambda p: torch.save([torch.ones(3)], weights(p)), "dictionary of tensors"),
    "tensors of another kind": (lambda p: torch.save({"weight": torch.ones(3, D)}, weights(p)), "needs learned_source"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pyreft_directory(name, pyreft):
    change, message = BROKEN[name]
    change(pyreft)
    with pytest.raises(FormatError, match=message):
        cv.load_adapter(pyreft)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("learned_source.weight", torch.ones(RANK, D - 1)),
        ("learned_source.bias", torch.ones(RANK + 1)),
        ("learned_source.weight", torch.full((RANK, D), float("nan"))),
        ("rotate_layer.parametrizations.weight.original", torch.ones(D, RANK + 1)),
        ("rotate_layer.parametrizations.weight.0.base", torch.ones(D + 1, D + 1)),
    ],
)
def test_weights_that_do_not_fit_together(part, value, pyreft):
    tensors = torch.load(weights(pyreft), weights_only=True)
    torch.save({**tensors, part: value}, weights(pyreft))
    with pytest.raises(FormatError, match=r"layer_2.*do not fit together"):
        cv.load_adapter(pyreft)


def test_only_a_configuration(pyreft):
    for file in pyreft.glob("*.bin"):
        file.unlink()
    with pytest.raises(FormatError, match=r"has a config\.json but no weights"):
        cv.load_adapter(pyreft)


def test_other_components_are_refused(tmp_path):
    path = write_pyreft(tmp_path / "a", {key(0): Reft("DiReFT")})
    name = "layer_0_comp_mlp_activation_unit_pos_nunit_1#0"
    edit(path, sorted_keys=[name], representations=[[0, "mlp_activation", "pos", 1]])
    with pytest.raises(FormatError, match="only block outputs"):
        cv.load_adapter(path)


# -- files that would run code ----------------------------------------------------------------------------------------


class Touch:
    """Unpickling an instance creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("as_zip", [True, False])
def test_pickle_with_code_is_refused_and_not_run(as_zip, pyreft, tmp_path):
    evidence = tmp_path / "touched"
    vector = tmp_path / "vector.pt"
    for file in (weights(pyreft), vector):
        torch.save({"bias": torch.ones(D), "x": Touch(evidence)}, file, _use_new_zipfile_serialization=as_zip)
    for source in (pyreft, vector):
        with pytest.raises(FormatError, match="could run code, so it is refused"):
            cv.load_adapter(source, layer=0)
    assert not evidence.exists()
    torch.load(vector, weights_only=False)["x"].close()  # the file would have done it
    assert evidence.exists()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".npy"])
def test_bare_pickle_with_code_is_refused_and_not_run(suffix, tmp_path):
    evidence, file = tmp_path / "touched", (tmp_path / "vector").with_suffix(suffix)
    file.write_bytes(pickle.dumps(Touch(evidence)))
    with pytest.raises(FormatError, match="refused"):
        cv.load_adapter(file, layer=0)
    assert not evidence.exists()


def test_pickled_numpy_array_is_refused_and_not_run(tmp_path):
    evidence, file = tmp_path / "touched", tmp_path / "vector.npy"
    np.save(file, np.array([Touch(evidence)], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match="pickled arrays are refused"):
        cv.load_adapter(file, layer=0)
    assert not evidence.exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_damaged_torch_files_never_raise_anything_else(as_zip, tmp_path):
    """Cut at many places, and with bytes changed at random."""
    buffer = io.BytesIO()
    torch.save({"v": torch.arange(9.0), "layer": 3}, buffer, _use_new_zipfile_serialization=as_zip)
    whole, rng = buffer.getvalue(), random.Random(0)
    cases = [whole[:n] for n in range(1, len(whole), 7)]
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(3):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        cases.append(bytes(changed))
    file = tmp_path / "v.pt"
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases:
            file.write_bytes(case)
            try:
                load_tensors(file)
            except FormatError:
                refused += 1
    assert refused > len(whole) // 7


# -- bare vectors -----------------------------------------------------------------------------------------------------


def write_vector(path: Path, value: Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, value.numpy())
    elif path.suffix == ".safetensors":
        save_file({"v": value}, path)
    else:
        torch.save(value, path)
    return path


SUFFIXES = [".pt", ".bin", ".npy", ".safetensors"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_vector_needs_a_layer(suffix, tmp_path):
    value = torch.randn(D)
    path = write_vector(tmp_path / f"happy{suffix}", value)
    adapter = cv.load_adapter(path, layer=7)
    assert (adapter.layers, adapter.name, adapter.d_model) == ([7], "happy", D)
    assert [one.positions.everywhere for one in adapter.interventions[7]] == [True]
    assert torch.equal(delta(adapter, 7, torch.randn(3, D)), value.expand(3, D))
    with pytest.raises(InputError, match="layer="):
        cv.load_adapter(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_stack_acts_on_its_own_layers(suffix, tmp_path):
    stack = torch.randn(5, D)
    stack[2] = 0
    path = write_vector(tmp_path / f"stack{suffix}", stack)
    adapter = cv.load_adapter(path)
    assert adapter.layers == [0, 1, 3, 4]
    assert adapter.model.n_layers == 5
    for layer in adapter.layers:
        assert torch.equal(delta(adapter, layer, torch.zeros(D)), stack[layer])
    one = cv.load_adapter(path, layer=3)
    assert one.layers == [3]
    assert torch.equal(delta(one, 3, torch.zeros(D)), stack[3])
    with pytest.raises(InputError, match=r"layer 5 is outside the stack's 0 \.\. 4"):
        cv.load_adapter(path, layer=5)


def test_dictionary_tells_layer_and_model(tmp_path):
    path = tmp_path / "d.pt"
    torch.save({"vector": torch.ones(D), "layer": 4, "base_model": "some/model", "note": "n"}, path)
    adapter = cv.load_adapter(path)
    assert (adapter.layers, adapter.model.id) == ([4], "some/model")
    assert adapter.provenance["metadata"] == {"layer": 4, "base_model": "some/model", "note": "n"}
    assert cv.load_adapter(path, layer=1).layers == [1]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 3, 4), r"\(2, 3, 4\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.zeros(0), r"\(0,\)"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinity"),
        (torch.tensor([1.0, float("inf")]), "NaN or infinity"),
    ],
)
def test_not_a_vector(suffix, value, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        cv.load_adapter(write_vector(tmp_path / f"v{suffix}", value), layer=0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_vector_files_that_are_not_whole(suffix, tmp_path):
    path = write_vector(tmp_path / f"v{suffix}", torch.randn(D))
    whole = path.read_bytes()
    for data, message in [
        (LFS_POINTER, "git lfs pull"),
        (b"", "empty"),
        (whole[:40], "truncated|not a plain|refused"),
        (whole[:-5], "truncated|not a plain"),
        (b"<html>404</html>", "truncated|not a plain|refused"),
    ]:
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            cv.load_adapter(path, layer=0)
    path.unlink()
    with pytest.raises(FormatError, match="no such file"):
        cv.load_adapter(path, layer=0)


def test_more_than_one_tensor(tmp_path):
    torch.save({"a": torch.ones(D), "b": torch.ones(D)}, tmp_path / "v.pt")
    save_file({"a": torch.ones(D), "b": torch.ones(D)}, tmp_path / "v.safetensors")
    with (tmp_path / "v.npy").open("wb") as file:
        np.savez(file, a=np.ones(D), b=np.ones(D))
    for suffix, message in [(".pt", "2 tensors"), (".safetensors", "2 tensors"), (".npy", "several arrays")]:
        with pytest.raises(FormatError, match=message):
            cv.load_adapter(tmp_path / f"v{suffix}", layer=0)


def test_arrays_that_are_not_floating_point(tmp_path):
    np.save(tmp_path / "v.npy", np.arange(4))
    torch.save({"note": "nothing"}, tmp_path / "none.pt")
    torch.save("text", tmp_path / "text.pt")
    for name, message in [("v.npy", "int64"), ("none.pt", "0 tensors"), ("text.pt", "holds str")]:
        with pytest.raises(FormatError, match=message):
            cv.load_adapter(tmp_path / name, layer=0)


def test_unknown_kinds_of_file_are_named(tmp_path):
    (tmp_path / "v.txt").write_text("1 2 3")
    with pytest.raises(FormatError, match=r"'\.txt'.*\.safetensors"):
        detect(tmp_path / "v.txt")
    with pytest.raises(FormatError, match=r"directory holds v\.txt"):
        detect(tmp_path)


# -- artefacts found in the wild --------------------------------------------------------------------------------------


def artefact(name: str) -> Path:
    if not (ARTEFACTS / name).exists():
        pytest.skip(f"{ARTEFACTS / name} is not on this machine")
    return ARTEFACTS / name


@pytest.mark.parametrize(
    ("layer", "norm", "total"),
    [(0, 15.174999, 0.949243), (12, 7.422094, -8.163046), (26, 18.959070, 22.714918)],
)
def test_published_adapter_gives_its_golden_figures(layer, norm, total):
    adapter = cv.load_adapter(artefact("commandv_anti_jailbreak_Llama-3.2-3B-Instruct"))
    got = delta(adapter, layer, torch.ones(3072))
    assert float(got.norm()) == pytest.approx(norm, abs=2e-5)
    assert float(got.sum()) == pytest.approx(total, abs=2e-4)


@pytest.mark.parametrize(
    ("name", "model", "d_model", "n_layers"),
    [
        ("commandv_anti_jailbreak_Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", 3072, 28),
        ("commandv_cot_reasoning_Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct", 2048, 36),
    ],
)
def test_published_adapters_act_on_every_other_layer(name, model, d_model, n_layers):
    path = artefact(name)
    adapter = cv.load_adapter(path)
    assert adapter.layers == list(range(0, n_layers, 2))
    assert (adapter.model.id, adapter.d_model) == (model, d_model)
    h = torch.randn(2, d_model)
    for layer in adapter.layers:
        tensors = torch.load(path / f"intkey_{key(layer)}.bin", weights_only=True)
        w1, b, w2 = (tensors[k].float() for k in ("learned_source.weight", "learned_source.bias", "proj_layer.weight"))
        torch.testing.assert_close(delta(adapter, layer, h), (h @ w1.T + b) @ w2)
        assert [str(one.positions) for one in adapter.interventions[layer]] == ["l1"]


def test_easysteer_loreft():
    path = artefact("easysteer_loreft")
    adapter = cv.load_adapter(path)
    assert (adapter.layers, adapter.d_model) == ([8], 1536)
    tensors = torch.load(path / f"intkey_{key(8)}.bin", weights_only=True)
    weight, bias, rotation = (tensors[k].float() for k in ("weight", "bias", "rotate_layer"))
    h = torch.randn(3, 1536)
    expected = (h @ weight.T + bias - h @ rotation) @ rotation.T
    torch.testing.assert_close(delta(adapter, 8, h), expected, rtol=1e-4, atol=1e-4)


def test_easysteer_bias_only():
    path = artefact("easysteer_ssv")
    adapter = cv.load_adapter(path)
    bias = torch.load(path / f"intkey_{key(8)}.bin", weights_only=True)["bias"]
    assert torch.equal(delta(adapter, 8, torch.randn(2, 1536)), bias.expand(2, -1))


@pytest.mark.parametrize(
    ("name", "layer", "layers", "d_model"),
    [
        ("easysteer_vectors/vec_ep20_layer15.pt", 15, [15], 4096),
        ("easysteer_vectors/task_vector_layer-10.npy", 10, [10], 4096),
        ("easysteer_vectors/task_vector_layer-10.pt", 10, [10], 4096),
        ("hidden_directions/qwen3-4b_v_refusal.pt", None, list(range(36)), 2560),
        ("hidden_directions/advocate_bias.pt", None, [17], 3584),
    ],
)
def test_vectors_from_the_wild(name, layer, layers, d_model):
    path = artefact(name)
    adapter = cv.load_adapter(path, layer=layer)
    assert (adapter.layers, adapter.d_model) == (layers, d_model)
    loaded = np.load(path) if path.suffix == ".npy" else torch.load(path, weights_only=True)
    stack = torch.as_tensor(loaded["bias"] if isinstance(loaded, dict) else loaded).float().reshape(-1, d_model)
    for at, expected in zip(layers, stack, strict=True):
        assert torch.equal(delta(adapter, at, torch.zeros(d_model)), expected)


def test_twins_in_two_formats_are_the_same_vector():
    one, two = (
        delta(cv.load_adapter(artefact(f"easysteer_vectors/task_vector_layer-10{s}"), layer=10), 10, torch.zeros(4096))
        for s in (".npy", ".pt")
    )
    assert torch.equal(one, two)


def test_metadata_of_the_dictionary_artefact_names_its_model():
    adapter = cv.load_adapter(artefact("hidden_directions/advocate_bias.pt"))
    assert adapter.model.id == "Qwen/Qwen2.5-7B-Instruct"
    assert adapter.provenance["metadata"]["components"] == ["pref", "refusal"]


def test_everything_readable_in_the_wild_is_described_and_saves_as_ours(tmp_path):
    names = [one.name for one in artefact("").iterdir() if one.is_dir() and detect_or_none(one) == "pyreft"]
    assert len(names) == 4
    for name in names:
        facts = describe(str(ARTEFACTS / name))
        assert facts["what"] == "pyreft"
        assert len(facts["interventions"]) == len(facts["layers"])
        json.dumps(facts)
        again = cv.load_adapter(cv.save(cv.load_adapter(ARTEFACTS / name), tmp_path / name))
        assert again.layers == facts["layers"]


def detect_or_none(path: Path) -> str | None:
    try:
        return detect(path)
    except FormatError:
        return None
