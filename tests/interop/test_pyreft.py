"""pyreft's directories: read as its own formulas say, and refused when they are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import commandv as cv
import foreign
from commandv.adapters.adapter import Adapter
from commandv.errors import FormatError
from commandv.positions import Positions
from foreign import LFS_POINTER, RANK, D, Reft, delta, key, weights, write_pyreft

seed, pyreft = foreign.seed, foreign.pyreft
KINDS = ("LoReFT", "NoReFT", "ConsReFT", "LobiReFT", "DiReFT", "NodiReFT")


def edit(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def assert_reads_as(adapter: Adapter, layer: int, module: Reft) -> None:
    h = 3 * torch.randn(5, D)
    with torch.no_grad():
        torch.testing.assert_close(h + delta(adapter, layer, h), module(h), rtol=1e-5, atol=1e-5)


# -- whole directories ------------------------------------------------------------------------------------------------


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


# -- directories that are not whole -----------------------------------------------------------------------------------

BROKEN = {
    "unknown class": (lambda p: edit(p, intervention_types=["<class 'x.VanillaIntervention'>"] * 2), "class.*Vanilla"),
    "a class too few": (lambda p: edit(p, intervention_types=["<class 'x.DireftIntervention'>"]), "not pyreft's"),
    "no keys": (lambda p: edit(p, sorted_keys=[], representations=[], intervention_types=[]), "not pyreft's"),
    "keys of other layers": (lambda p: edit(p, sorted_keys=[key(0), key(3)]), "not pyreft's.*layer_3"),
    "another width": (lambda p: edit(p, intervention_dimensions=[D + 1, D + 1]), r"width \[17, 17\]"),
    "config that is no JSON": (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
    "config without our keys": (lambda p: (p / "config.json").write_text("{}"), "sorted_keys"),
    "metadata that is no JSON": (lambda p: (p / "training_metadata.json").write_text("{"), "not valid JSON"),
    "missing weights": (lambda p: weights(p).unlink(), r"layer_2.*missing; copy the whole"),
    "git-LFS pointer": (lambda p: weights(p).write_bytes(LFS_POINTER), "git lfs pull"),
    "empty weights": (lambda p: weights(p).write_bytes(b""), "empty"),
    "truncated weights": (lambda p: weights(p).write_bytes(weights(p).read_bytes()[:900]), "truncated"),
    "a list for weights": (lambda p: torch.save([torch.ones(3)], weights(p)), "dictionary of tensors"),
    "tensors of another kind": (
        lambda p: torch.save({"weight": torch.ones(3, D)}, weights(p)),
        "needs rotate_layer, learned_source.weight",
    ),
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


def test_an_activation_in_the_metadata_is_applied(tmp_path):
    module = Reft("DiReFT")
    h = 3 * torch.randn(5, D)
    adapter = cv.load_adapter(write_pyreft(tmp_path / "a", {key(0): module}, act_fn="relu"))
    with torch.no_grad():
        expected = torch.relu(module.learned_source(h)) @ module.rotate_layer.weight.T
    torch.testing.assert_close(delta(adapter, 0, h), expected, rtol=1e-5, atol=1e-5)


def test_what_would_change_the_meaning_is_refused(tmp_path):
    def directory(name: str, **metadata) -> Path:
        return write_pyreft(tmp_path / name, {key(0): Reft("DiReFT")}, **metadata)

    def with_tensor(path: Path, **tensors) -> None:
        file = path / f"intkey_{key(0)}.bin"
        torch.save({**torch.load(file, weights_only=True), **tensors}, file)

    part = directory("part")
    edit(part, representations=[[0, "block_output", "pos", 1, RANK, [[0, 8]], *[None] * 8]])
    serial = directory("serial")
    edit(serial, mode="serial")
    extra = directory("extra")
    with_tensor(extra, gate=torch.ones(RANK))
    whole = directory("whole")
    with_tensor(whole, **{"learned_source.bias": torch.ones(RANK, dtype=torch.int64)})
    for path, message in [
        (part, "more than layer, component, unit and rank"),
        (serial, "mode 'serial'"),
        (extra, "gate: not a part of a direft"),
        (whole, r"learned_source\.bias holds torch\.int64"),
        (directory("act", act_fn="mish"), "act_fn 'mish'"),
    ]:
        with pytest.raises(FormatError, match=message):
            cv.load_adapter(path)
