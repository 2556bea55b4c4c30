"""Our file format: what is written comes back bit for bit; what is not ours or not whole is refused."""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import commandv as cv
from commandv.adapters import store
from commandv.adapters.adapter import ACTIVATIONS, Adapter, Intervention
from commandv.adapters.kinds import KINDS, ablation, steering_vector
from commandv.adapters.outline import outline_of
from commandv.errors import FormatError, StorageError
from commandv.models.identity import ModelRef
from commandv.positions import Positions
from limits import file_size_limit
from places import DATA
from stored import data_file, replace_part

GOLDEN = DATA / "v1" / "golden"
D, RANK = 12, 3
REF = ModelRef("some/model", "abc", D, 5, "cafe")
CONSTRUCTORS = {
    **{name: kind.build for name, kind in KINDS.items()},
    "steering_vector": steering_vector,
    "ablation": ablation,
}


def constructed(kind: str, activation: str = "linear") -> tuple[Intervention, ...]:
    """Call a kind's constructor with random arguments of the shapes that its parameters' names stand for."""
    g = torch.Generator().manual_seed(len(kind))
    shapes = {
        "weight": (RANK, D),
        "bias": (RANK,),
        "source_weight": (RANK, D),
        "source_bias": (RANK,),
        "proj_weight": (RANK, D),
        "proj_bias": (RANK,),
        "vector": (D,),
        "directions": (2, D),
    }
    build = CONSTRUCTORS[kind]
    given = {}
    for name in inspect.signature(build).parameters:
        if name == "rotation":
            given[name] = torch.linalg.qr(torch.randn(D, RANK, generator=g)).Q
        elif name == "activation":
            given[name] = activation
        elif name == "strength":
            given[name] = -1.5
        else:
            given[name] = torch.randn(shapes[name], generator=g)
    return build(**given)


def adapter_of(*interventions: Intervention, ref: ModelRef = REF) -> Adapter:
    return Adapter({2: interventions}, ref, "name of it", {"made_by": "hand", "seed": 3, "share": 0.1})


def assert_same(one: Adapter, two: Adapter) -> None:
    assert (one.model, one.name, dict(one.provenance)) == (two.model, two.name, dict(two.provenance))
    assert one.layers == two.layers
    for layer in one.layers:
        for a, b in zip(one.interventions[layer], two.interventions[layer], strict=True):
            assert (a.activation, a.positions) == (b.activation, b.positions)
            for part in ("read", "bias", "write"):
                assert torch.equal(getattr(a, part), getattr(b, part)), part


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved adapter of two layers for the tests to damage."""
    two = {0: constructed("direft"), 4: (*constructed("loreft", "relu"), *constructed("steering_vector"))}
    return cv.save(Adapter(two, REF), tmp_path / "adapter")


def edit(path: Path, change) -> None:
    """Apply `change` to the parsed configuration and write it back."""
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


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


# -- nothing is lost --------------------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"},
        {"config.json": '{"format": "commandv-profile", "format_version": 1}', "keys.safetensors": "rows"},
        {"config.json": "not json"},
        {"config.json": "[]"},
    ],
    ids=["notes", "a model", "a profile", "damaged", "a list"],
)
def test_saving_over_something_else_is_refused_and_keeps_it(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(FormatError, match="choose another place"):
        cv.save(adapter_of(*constructed("direft")), tmp_path)
    assert contents(tmp_path) == before


def test_saving_over_an_adapter_with_other_files_beside_it_keeps_them(saved):
    (saved / "README.md").write_text("my notes")
    before = contents(saved)
    with pytest.raises(FormatError, match=r"README\.md"):
        cv.save(adapter_of(*constructed("direft")), saved)
    assert contents(saved) == before


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FormatError, match="choose another place"):
        cv.save(adapter_of(*constructed("direft")), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_into_an_empty_directory_works(tmp_path):
    adapter = adapter_of(*constructed("direft"))
    assert_same(cv.load_adapter(cv.save(adapter, tmp_path)), adapter)


def test_full_disk_leaves_the_earlier_adapter(saved, monkeypatch):
    before = contents(saved)

    def full(path, data):
        with path.open("wb") as file:
            file.write(data[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"No space left.*Free some space"):
        cv.save(adapter_of(*constructed("ablation")), saved)
    assert contents(saved.parent) == {f"adapter/{name}": data for name, data in before.items()}
    with pytest.raises(StorageError, match=r"No space left"):
        cv.save(adapter_of(*constructed("ablation")), saved.parent / "another")
    assert [one.name for one in saved.parent.iterdir()] == ["adapter"]


def test_a_changed_byte_is_noticed(saved):
    file = data_file(saved)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"tensors-\w+\.safetensors: damaged: its content has changed.*copy it again"):
        cv.load_adapter(saved)


@pytest.mark.parametrize("name", ["../adapter/tensors-{0}.safetensors", "other-{0}.safetensors", "tensors.safetensors"])
def test_a_data_file_of_another_name_is_not_opened(name, saved):
    edit(saved, lambda c: c["files"]["tensors"].update(file=name.format(c["files"]["tensors"]["sha256"][:12])))
    with pytest.raises(FormatError, match="is not the name of its data file"):
        cv.load_adapter(saved)


def test_write_error_of_the_operating_system_leaves_the_earlier_adapter(saved):
    """A real failing write, in the middle of the weights."""
    before = contents(saved)
    big = ModelRef(d_model=4096)
    with file_size_limit(8192), pytest.raises(StorageError, match="Free some space"):
        cv.save(Adapter({0: steering_vector(torch.ones(4096))}, big), saved)
    assert contents(saved.parent) == {f"adapter/{name}": data for name, data in before.items()}


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        cv.save(adapter_of(*constructed("direft")), tmp_path / "file" / "adapter")


def test_a_copied_adapter_is_the_same(saved, tmp_path):
    assert_same(cv.load_adapter(shutil.copytree(saved, tmp_path / "copy")), cv.load_adapter(saved))


def test_provenance_that_json_cannot_hold(tmp_path):
    with pytest.raises(FormatError, match="provenance of n is not plain JSON"):
        cv.save(Adapter({0: constructed("direft")}, REF, "n", {"made_by": object()}), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    for unnamed in ({1: 2}, None):
        with pytest.raises(FormatError, match="provenance of n is not plain JSON"):
            cv.save(Adapter({0: constructed("direft")}, REF, "n", unnamed), tmp_path / "a")
    adapter = Adapter({0: constructed("direft")}, REF, "n", {"loss": [1.5, float("nan")]})
    assert cv.load_adapter(cv.save(adapter, tmp_path / "a")).provenance == {"loss": [1.5, None]}


@pytest.mark.parametrize("facts", [{"seed": 10**30}, {"deep": functools.reduce(lambda a, _: [a], range(99), 1)}])
def test_what_could_not_be_read_again_is_not_written_and_replaces_nothing(facts, saved):
    earlier = cv.load_adapter(saved)
    with pytest.raises(FormatError, match="nothing is written"):
        cv.save(dataclasses.replace(earlier, provenance=facts), saved)
    assert_same(cv.load_adapter(saved), earlier)


def test_a_configuration_larger_than_is_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("commandv.storage.directories.MOST_CONFIG", 1000)
    with pytest.raises(FormatError, match="at most 1000 are read again"):
        cv.save(Adapter({0: constructed("direft")}, REF, "n", {"log": "x" * 1000}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


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
