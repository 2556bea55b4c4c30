"""Our file format: what is written comes back bit for bit; what is not ours or not whole is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import commandv as cv
import stored
from commandv.adapters import store
from commandv.adapters.adapter import ACTIVATIONS, Adapter, Intervention
from commandv.adapters.outline import outline_of
from commandv.errors import FormatError
from commandv.models.identity import ModelRef
from commandv.positions import Positions
from places import DATA
from stored import CONSTRUCTORS, RANK, REF, D, adapter_of, assert_same, constructed, data_file, edit, replace_part

GOLDEN = DATA / "v1" / "golden"
saved = stored.saved


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONSTRUCTORS)
@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_every_kind_comes_back_bit_for_bit(kind, activation, tmp_path):
    adapter = adapter_of(*constructed(kind, activation))
    back = cv.load_adapter(cv.save(adapter, tmp_path / "a"))
    assert_same(back, adapter)
    h = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    for a, b in zip(back.interventions[2], adapter.interventions[2], strict=True):
        assert torch.equal(a.delta(h), b.delta(h))


def test_positions_activations_and_layers_come_back(tmp_path):
    texts = ["l1", "f3+l5", "g5", "all", "f2+l1+g3", "f4"]
    every = [
        Intervention(torch.full((1, D), i + 0.1), torch.tensor([i - 0.7]), torch.full((1, D), 1 / (i + 3)), name, where)
        for i, (name, where) in enumerate(zip([*ACTIVATIONS, "linear"], map(Positions.parse, texts), strict=True))
    ]
    adapter = Adapter({4: tuple(every), 0: (every[2],), 1: tuple(every[::-1])}, REF)
    assert_same(cv.load_adapter(cv.save(adapter, tmp_path / "a")), adapter)


def test_unknown_model_fields_and_trained_dtypes_are_stored_as_float32(tmp_path):
    half = Intervention(torch.rand(1, D).bfloat16(), torch.rand(1).bfloat16(), torch.rand(1, D).bfloat16())
    back = cv.load_adapter(cv.save(Adapter({7: (half,)}, ModelRef(d_model=D)), tmp_path / "a"))
    (one,) = back.interventions[7]
    assert one.read.dtype == torch.float32
    assert torch.equal(one.read, half.read.float())
    assert back.model == ModelRef(d_model=D)


def test_saving_replaces_an_earlier_adapter_and_leaves_nothing_beside_it(saved):
    adapter = adapter_of(*constructed("ablation"))
    cv.save(adapter, saved)
    assert_same(cv.load_adapter(saved), adapter)
    assert [one.name for one in saved.parent.iterdir()] == ["adapter"]
    assert sorted(one.name for one in saved.iterdir()) == ["config.json", data_file(saved).name]


# -- the golden file of version 1 -------------------------------------------------------------------------------------


def test_golden_file_of_version_1_still_loads():
    adapter = cv.load_adapter(GOLDEN)
    assert adapter.model == ModelRef("some/model", "0123abc", 4, 6, "fedc4321")
    assert adapter.name == "golden"
    assert adapter.provenance == {
        "made_by": "hand",
        "seed": 7,
        "note": "ünïcode",
        "nested": {"list": [1, 2.5, None, True]},
    }
    assert adapter.layers == [0, 2]
    first, second = adapter.interventions[0]
    (third,) = adapter.interventions[2]
    assert first.read.tolist() == [[1, 0, 0.5, 0], [0, -1, 0, 0.25]]
    assert first.bias.tolist() == [0.5, -2]
    assert first.write.tolist() == [[0, 1, 0, 0], [0, 0, 0, 2]]
    assert (first.activation, first.positions) == ("relu", Positions(first=1, last=2))
    assert (second.activation, second.positions) == ("linear", Positions(generated=3))
    assert third.positions == Positions(everywhere=True)
    h = torch.tensor([1.0, -3.0, 2.0, 4.0])
    assert first.delta(h).tolist() == [0, 2.5, 0, 4]  # relu([2.5, 2]) W
    assert second.delta(h).tolist() == [0, 0, -2, 0]
    assert third.delta(h).tolist() == [1, 2, 3, 4]


def test_golden_file_holds_what_save_writes_today(tmp_path):
    """A change of the format needs a new version number and a new golden file."""
    again = cv.save(cv.load_adapter(GOLDEN), tmp_path / "again")
    old, new = (json.loads((path / "config.json").read_text("utf-8")) for path in (GOLDEN, again))
    assert new.pop("files")["tensors"]["size"] == data_file(again).stat().st_size
    assert (old.pop("format_version"), new.pop("format_version")) == (1, 2)
    assert {**old, "commandv": None} == {**new, "commandv": None}
    old_tensors, new_tensors = load_file(GOLDEN / "tensors.safetensors"), load_file(data_file(again))
    assert old_tensors.keys() == new_tensors.keys()
    assert all(torch.equal(old_tensors[key], new_tensors[key]) for key in old_tensors)


def test_saving_over_version_1_leaves_nothing_of_it(tmp_path):
    old = tmp_path / "old"
    shutil.copytree(GOLDEN, old)
    adapter = adapter_of(*constructed("direft"))
    assert_same(cv.load_adapter(cv.save(adapter, old)), adapter)
    assert sorted(one.name for one in old.iterdir()) == ["config.json", data_file(old).name]


# -- what is refused --------------------------------------------------------------------------------------------------

TAMPERED = {
    "newer version": (lambda c: c.update(format_version=3), "version 3.*newer commandv"),
    "no version": (lambda c: c.pop("format_version"), "version None"),
    "other format": (lambda c: c.update(format="peft"), "'peft'"),
    "unknown key": (lambda c: c.update(colour="red"), "colour"),
    "unknown key of the model": (lambda c: c["model"].update(colour="red"), r"model\.colour"),
    "unknown key of an intervention": (lambda c: c["interventions"][1].update(colour=1), r"interventions\.1\.colour"),
    "missing key": (lambda c: c["interventions"][0].pop("rank"), r"interventions\.0\.rank"),
    "key of a wrong type": (lambda c: c["model"].update(d_model="wide"), r"model\.d_model"),
    "unknown kind": (lambda c: c["interventions"][0].update(kind="mlp"), "unknown kind 'mlp'"),
    "unknown activation": (lambda c: c["interventions"][0].update(activation="swish"), "'swish'"),
    "unreadable positions": (lambda c: c["interventions"][0].update(positions="x9"), "'x9'"),
    "another rank": (lambda c: c["interventions"][0].update(rank=RANK + 1), "config says"),
    "another width": (lambda c: c["model"].update(d_model=D + 1), "config says"),
    "layer beyond the model": (lambda c: c["interventions"][0].update(layer=5), r"layer 5 is outside 0 \.\. 4"),
    "negative layer": (lambda c: c["interventions"][0].update(layer=-1), "layer -1"),
    "an intervention less": (lambda c: c["interventions"].pop(), r"3\.bias"),
    "an intervention more": (lambda c: c["interventions"].append(dict(c["interventions"][0])), r"4\.bias"),
    "no interventions": (lambda c: c["interventions"].clear(), "not in the config"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_configuration(name, saved):
    change, message = TAMPERED[name]
    edit(saved, change)
    with pytest.raises(FormatError, match=message) as caught:
        cv.load_adapter(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"text"', "\x00"])
def test_configuration_that_is_no_json_object(text, saved):
    (saved / "config.json").write_text(text)
    with pytest.raises(FormatError, match=r"config\.json"):
        cv.load_adapter(saved)


def test_configuration_in_another_encoding(saved):
    (saved / "config.json").write_bytes(b'{"format": "\xff\xfe"}')
    with pytest.raises(FormatError, match=r"cannot read config\.json"):
        cv.load_adapter(saved)


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_truncated_or_empty_tensors(keep, saved):
    file = data_file(saved)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"truncated or not safetensors"):
        cv.load_adapter(saved)


def test_missing_files(saved):
    data_file(saved).unlink()
    for opened in (cv.load_adapter, store.read):
        with pytest.raises(FormatError, match="copy the whole directory"):
            opened(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FormatError, match="the directory holds nothing"):
        cv.load_adapter(saved)
    with pytest.raises(FormatError, match="no such file"):
        cv.load_adapter(saved / "elsewhere")


def test_tensors_without_configuration(saved):
    (saved / "config.json").unlink()
    with pytest.raises(FormatError, match=r"cannot read config\.json"):
        cv.load_adapter(saved)


def change_tensors(saved: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(data_file(saved))
    for key, value in changes.items():
        tensors.pop(key.replace("_", "."), None)
        if value is not None:
            tensors[key.replace("_", ".")] = value
    replace_part(saved, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0_read": None}, r"'0\.read'"),
        ({"extra": torch.zeros(2)}, "'extra'"),
        ({"0_write": torch.zeros(RANK, D + 1)}, r"0\.write is torch.float32 \(3, 13\).*\(3, 12\)"),
        ({"0_read": torch.zeros(D, RANK)}, r"0\.read"),
        ({"1_bias": torch.zeros(RANK, 1)}, r"1\.bias"),
        ({"0_read": torch.zeros(RANK, D, dtype=torch.float64)}, r"float64"),
        ({"0_read": torch.full((RANK, D), float("nan"))}, r"intervention 0: .*read holds NaN"),
        ({"2_write": torch.full((RANK, D), float("inf"))}, r"intervention 2: .*write holds NaN or infinity"),
    ],
)
def test_tampered_tensors(changes, message, saved):
    change_tensors(saved, **changes)
    with pytest.raises(FormatError, match=message):
        cv.load_adapter(saved)


def test_unknown_builtin_adapter_names_those_there_are():
    with pytest.raises(FormatError, match=r"builtin:juggling@nobody: no such adapter; there are"):
        cv.load_adapter("builtin:juggling@nobody")


@pytest.mark.parametrize("number", ["1e999", "Infinity", "NaN", '"wide"', "null"])
@pytest.mark.parametrize("name", ["d_model", "layer"])
def test_an_outline_without_usable_numbers_is_left_to_the_reader(name, number, saved):
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(re.sub(rf'"{name}": \d+', f'"{name}": {number}', config))
    if number == "1e999":
        with pytest.raises(FormatError, match="beyond float64"):
            outline_of(str(saved))
    else:
        assert outline_of(str(saved)) is None
    with pytest.raises(FormatError, match=r"config\.json"):
        cv.load_adapter(saved)
