"""llama.cpp's control vectors: what is written and read, at which layer it acts, and what is refused."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import commandv as cv
import tiny
from commandv.adapter import Adapter, Intervention
from commandv.errors import FormatError, InputError, MismatchError, StorageError
from commandv.inspection import describe
from commandv.interop.control_vectors import read_control_vector, write_control_vector
from commandv.load import detect
from commandv.models import ModelRef
from commandv.positions import EVERYWHERE, Positions
from limits import file_size_limit
from test_cli import fails, run  # noqa: F401  (a fixture)

ARTEFACTS = Path(__file__).parents[2] / "shared" / "artefacts" / "easysteer_vectors"
D = tiny.D


def steering(*layers: int, d: int = D, **fields) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    made = {layer: cv.steering_vector(torch.randn(d, generator=generator)) for layer in layers}
    return Adapter(made, ModelRef(d_model=d, **fields), "push").at(EVERYWHERE)


def constant(adapter: Adapter, layer: int) -> torch.Tensor:
    return sum(one.delta(torch.randn(adapter.d_model)) for one in adapter.interventions[layer])


def write(path: Path, tensors: dict[str, np.ndarray], *, arch: str = "controlvector", **changes) -> Path:
    """Write a GGUF file as llama.cpp's generator and repeng do; a key that is None is left out."""
    writer = gguf.GGUFWriter(path, arch)
    keys = {"model_hint": "llama", "layer_count": len(tensors), **changes}
    for name, value in keys.items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"controlvector.{name}", value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def directions(*numbers: int, d: int = D) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"direction.{number}": rng.standard_normal(d).astype(np.float32) for number in numbers}


# -- writing and reading back -----------------------------------------------------------------------------------------


def test_what_is_written_reads_back_the_same(tmp_path):
    adapter = steering(1, 3, id="some/model")
    again = cv.load_adapter(write_control_vector(adapter, tmp_path / "push.gguf"))
    assert (again.layers, again.d_model, again.name) == ([1, 3], D, "push")
    for layer in again.layers:
        assert torch.equal(constant(again, layer), constant(adapter, layer))
        assert [one.positions for one in again.interventions[layer]] == [EVERYWHERE]
    assert again.provenance["model_hint"] == "some/model"
    assert again.provenance["convention"] == "llama.cpp"
    assert again.provenance["metadata"] == {"general.name": "push", "layer_count": 2}
    assert again.model == ModelRef(d_model=D)


def test_the_file_is_what_llama_cpp_expects(tmp_path):
    adapter = steering(2, 5)
    reader = gguf.GGUFReader(write_control_vector(adapter, tmp_path / "v.gguf", model_hint="qwen3"))
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "qwen3"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert [(one.name, one.tensor_type.name, one.shape.tolist()) for one in reader.tensors] == [
        ("direction.2", "F32", [D]),
        ("direction.5", "F32", [D]),
    ]
    assert np.array_equal(reader.tensors[0].data, constant(adapter, 2).numpy())


def test_interventions_of_one_layer_add_up_whatever_their_rank(tmp_path):
    write_two, bias = torch.randn(2, D), torch.tensor([0.5, -2.0])
    bias_only = Intervention(torch.zeros(2, D), bias, write_two, positions=EVERYWHERE)
    vector = torch.randn(D)
    both = Adapter({1: (bias_only, *steering(1).at(EVERYWHERE).interventions[1])}, ModelRef(d_model=D))
    expected = bias @ write_two + constant(steering(1), 1)
    again = cv.load_adapter(write_control_vector(both, tmp_path / "v.gguf"))
    torch.testing.assert_close(constant(again, 1), expected)
    scaled = steering(1).map(lambda one: Intervention(one.read, one.bias, vector[None], positions=EVERYWHERE))
    written = write_control_vector(scaled.scaled(3.0), tmp_path / "w.gguf")
    torch.testing.assert_close(constant(cv.load_adapter(written), 1), 3 * vector)


def test_a_pasted_steering_vector_is_exported(tmp_path):
    """Folding leaves R = 0, so what is pasted everywhere is a steering vector of the recipient."""
    donor, recipient = tiny.tiny_lm(seed=1), tiny.tiny_lm("gpt2", seed=2, n_embd=48)
    prompts = [f"What is {thing}?" for thing in ("tea", "a fox", "it", "the river", "a cat", "Monday")]
    pd, pr = (cv.profile(lm, prompts, cache=False) for lm in (donor, recipient))
    adapter = Adapter({2: steering(2).interventions[2]}, donor.ref, "push")
    pasted = cv.paste(adapter, pd, pr, layers=[2])
    again = cv.load_adapter(write_control_vector(pasted, tmp_path / "v.gguf"))
    assert again.d_model == 48
    torch.testing.assert_close(constant(again, pasted.layers[0]), constant(pasted, pasted.layers[0]))


# -- the layer convention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_direction_n_is_added_after_block_n_for_every_token(layer, tmp_path):
    """As llama.cpp's graph does it: cur = block(il); cur = cur + tensors[il], il counted from 0."""
    lm = tiny.tiny_lm()
    tensors = directions(layer)
    adapter = cv.load_adapter(write(tmp_path / "v.gguf", tensors))
    ids = torch.tensor([[1, 5, 9, 14, 30]])
    with cv.attach(lm, adapter), torch.inference_mode():
        ours = lm.model(ids).logits
    vector = torch.from_numpy(tensors[f"direction.{layer}"])
    handle = lm.blocks[layer].register_forward_hook(lambda _m, _i, h: h + vector)
    with torch.inference_mode():
        by_hand = lm.model(ids).logits
        handle.remove()
        plain = lm.model(ids).logits
    torch.testing.assert_close(ours, by_hand)
    assert (ours - plain).abs().amax(-1).min() > 0.01


def test_direction_zero_tells_the_convention(tmp_path):
    usual = write(tmp_path / "usual.gguf", directions(1, 2))
    from_zero = write(tmp_path / "zero.gguf", directions(0, 1, 2))
    assert cv.load_adapter(usual).provenance["convention"] == "llama.cpp"
    loaded = cv.load_adapter(from_zero)
    assert (loaded.layers, loaded.provenance["convention"]) == ([0, 1, 2], "from-zero")
    assert read_control_vector(usual, convention="from-zero").layers == [1, 2]
    with pytest.raises(FormatError, match=r"direction\.0, for which llama\.cpp discards.*from-zero"):
        read_control_vector(from_zero, convention="llama.cpp")
    with pytest.raises(InputError, match="convention='one'"):
        read_control_vector(usual, convention="one")


def test_one_layer_is_picked(tmp_path):
    tensors = directions(1, 2, 3)
    path = write(tmp_path / "v.gguf", tensors)
    one = cv.load_adapter(path, layer=2)
    assert one.layers == [2]
    assert np.array_equal(constant(one, 2).numpy(), tensors["direction.2"])
    with pytest.raises(InputError, match=r"no direction at layer 0; there are \[1, 2, 3\]"):
        cv.load_adapter(path, layer=0)


def test_a_model_of_another_width_or_depth_is_refused(tmp_path):
    lm = tiny.tiny_lm()
    for tensors, message in [(directions(1, d=D + 8), "width"), (directions(1, 9), "layers")]:
        adapter = cv.load_adapter(write(tmp_path / "v.gguf", tensors))
        with pytest.raises(MismatchError, match=message):
            cv.attach(lm, adapter)


# -- what the format cannot hold --------------------------------------------------------------------------------------


def intervention(**changes) -> Intervention:
    fields = {"read": torch.zeros(1, D), "bias": torch.ones(1), "write": torch.ones(1, D), "positions": EVERYWHERE}
    return Intervention(**{**fields, **changes})


@pytest.mark.parametrize(
    ("layer", "one", "message"),
    [
        (1, intervention(read=torch.eye(1, D)), r"on layer 1 it reads the state \(rank 1\)"),
        (1, intervention(positions=Positions(last=1)), r"positions l1 \(prompt tokens only\).*every token"),
        (1, intervention(positions=Positions(generated=4)), "positions g4; llama"),
        (1, intervention(activation="relu"), "activation relu"),
        (0, intervention(), "on layer 0 it acts, and llama.cpp never"),
        (1, intervention(bias=torch.full((1,), 1e30), write=torch.full((1, D), 1e30)), "more than float32"),
    ],
)
def test_adapters_that_the_format_cannot_hold(layer, one, message, tmp_path):
    adapter = Adapter({2: (intervention(),), layer: (intervention(), one)}, ModelRef(d_model=D), "pirate")
    with pytest.raises(InputError, match=f"pirate cannot be a control vector: .*{message}"):
        write_control_vector(adapter, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_ablation_and_reft_are_refused(tmp_path):
    lm = tiny.tiny_lm()
    ablation = Adapter({1: cv.ablation(torch.randn(D))}, lm.ref).at(EVERYWHERE)
    for adapter in (ablation, tiny.random_adapter(lm, positions="all")):
        with pytest.raises(InputError, match="reads the state"):
            write_control_vector(adapter, tmp_path / "v.gguf")


def test_only_a_control_vector_is_overwritten(tmp_path):
    path = tmp_path / "v.gguf"
    write_control_vector(steering(1), path)
    write_control_vector(steering(2), path)
    assert cv.load_adapter(path).layers == [2]
    model = write(tmp_path / "m.gguf", directions(1), arch="llama")
    (tmp_path / "notes.txt").write_text("mine")
    for taken in (model, tmp_path / "notes.txt", tmp_path):
        with pytest.raises(FormatError, match="not overwritten; choose another place"):
            write_control_vector(steering(1), taken)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.gguf", "notes.txt", "v.gguf"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = write_control_vector(steering(1), tmp_path / "v.gguf")
    before = path.read_bytes()
    with file_size_limit(300), pytest.raises(StorageError, match=r"v\.gguf"):
        write_control_vector(steering(2), path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["v.gguf"]


# -- hostile and damaged files ----------------------------------------------------------------------------------------


def header(n_tensors: int, n_keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + rest


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str, dims: list[int], offset: int = 0, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCH = key("general.architecture", 8, text("controlvector"))
KEYS = ARCH + key("controlvector.model_hint", 8, text("x")) + key("controlvector.layer_count", 4, b"\x01\0\0\0")
HOSTILE = {
    "not GGUF": (b"<html>404</html>" * 4, "magic"),
    "a git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n", "git lfs pull"),
    "empty": (b"", "empty"),
    "only the magic": (b"GGUF", "ends before"),
    "a version from the future": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
    "no architecture": (header(0, 1, key("x", 4, b"\0\0\0\0")), "says no general.architecture"),
    "an architecture that is a number": (header(0, 1, key("general.architecture", 4, b"\0\0\0\0")), "of a model"),
    "billions of keys": (header(0, 2**60, ARCH), "announces 1152921504606846976 keys"),
    "billions of tensors": (header(2**60, 1, ARCH), "1152921504606846976 tensors"),
    "a key of endless length": (header(0, 1, struct.pack("<Q", 2**63)), "ends before"),
    "a text of endless length": (header(0, 1, key("a", 8, struct.pack("<Q", 2**64 - 1))), "ends before"),
    "a list of endless length": (header(0, 1, key("a", 9, struct.pack("<IQ", 4, 2**62))), "items in a list"),
    "a list that the file has no room for": (header(0, 1, key("a", 9, struct.pack("<IQ", 4, 1000))), "ends before"),
    "lists in lists": (header(0, 1, key("a", 9, struct.pack("<IQ", 9, 1) * 9000)), "recursion"),
    "an unknown type": (header(0, 1, key("a", 77, b"\0" * 8)), "77"),
    "a key twice": (header(0, 2, ARCH + ARCH), "Duplicate"),
    "a name that is no text": (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 16), "decode|ends"),
    "a tensor twice": (header(2, 3, KEYS + info("direction.1", [4]) * 2 + b"\0" * 128), "duplicated"),
    "a tensor of 4 billion axes": (header(1, 3, KEYS + text("direction.1") + b"\xff" * 4), "ends before"),
    "a tensor beyond the file": (header(1, 3, KEYS + info("direction.1", [4], 2**40) + b"\0" * 64), "ends before"),
    "a tensor larger than the file": (header(1, 3, KEYS + info("direction.1", [2**40]) + b"\0" * 64), "ends before"),
    "axes that overflow": (header(1, 3, KEYS + info("direction.1", [2**33, 2**33]) + b"\0" * 64), "."),
    "a tensor type from nowhere": (header(1, 3, KEYS + info("direction.1", [4], kind=99) + b"\0" * 64), "99"),
    "an empty tensor": (header(1, 3, KEYS + info("direction.1", [0]) + b"\0" * 64), "no directions"),
}  # fmt: skip


def test_the_package_still_has_what_our_reader_overrides():
    """Were one of them renamed, the bounds would be gone and some of the files below would take for ever."""
    for name in ("_get", "_get_field_parts", "_push_field"):
        assert callable(getattr(gguf.GGUFReader, name, None)), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name, tmp_path):
    content, message = HOSTILE[name]
    path = tmp_path / "v.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(FormatError, match=message):
        cv.load_adapter(path)
    assert time.perf_counter() - start < 1
    with pytest.raises(FormatError, match=r"v\.gguf"):
        describe(str(path))


BAD = {
    "no directions": ({}, {}, "holds no directions"),
    "another tensor": ({"token_embd.weight": np.ones(4, np.float32)}, {}, "token_embd.*direction.N only"),
    "a number that is none": ({"direction.one": np.ones(4, np.float32)}, {}, "direction.one"),
    "a number written twice over": ({"direction.01": np.ones(4, np.float32)}, {}, "direction.01"),
    "an endless number": ({"direction.99999999": np.ones(4, np.float32)}, {}, "direction.99999999"),
    "half precision": ({"direction.1": np.ones(4, np.float16)}, {}, r"is F16 \[4\], expected F32"),
    "a matrix": ({"direction.1": np.ones((2, 4), np.float32)}, {}, r"is F32 \[4, 2\]"),
    "two widths": ({**directions(1, d=4), **directions(2, d=8)}, {}, r"widths \[4, 8\]"),
    "NaN": ({"direction.2": np.array([1, np.nan], np.float32)}, {}, "direction.2 holds NaN"),
    "no hint": (directions(1), {"model_hint": None}, "model_hint is missing"),
    "no count": (directions(1), {"layer_count": None}, "layer_count is missing, expected int"),
    "a count that is text": (directions(1), {"layer_count": "1"}, "layer_count is '1', expected int"),
    "a count below the directions": (directions(1, 2, 3), {"layer_count": 2}, "says 2 layers but holds 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_sound_files_that_are_no_control_vector(name, tmp_path):
    tensors, keys, message = BAD[name]
    path = write(tmp_path / "v.gguf", tensors, **keys)
    with pytest.raises(FormatError, match=message):
        cv.load_adapter(path)


def test_a_model_in_gguf_is_told_apart(tmp_path):
    path = write(tmp_path / "m.gguf", directions(1), arch="llama")
    with pytest.raises(FormatError, match="of a model, not of a control vector; open it with load_model"):
        detect(path)
    with pytest.raises(FormatError, match="architecture 'llama', expected controlvector"):
        read_control_vector(path)


def test_damaged_files_never_raise_anything_else(tmp_path):
    """Cut everywhere in the header, and with bytes changed at random."""
    path = write_control_vector(steering(1, 2), tmp_path / "v.gguf")
    whole, rng = path.read_bytes(), random.Random(0)
    cases = [whole[:n] for n in range(0, len(whole), 3)]
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(2):
            changed[rng.randrange(len(changed) if rng.random() < 0.2 else 300)] = rng.randrange(256)
        cases.append(bytes(changed))
    refused = 0
    with np.errstate(all="ignore"):
        for case in cases:
            path.write_bytes(case)
            try:
                cv.load_adapter(path)
            except FormatError:
                refused += 1
    assert refused > len(whole) // 3


# -- files of others, the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norm", "hint", "method"),
    [
        ("happy_diffmean", 1.0, "qwen2.5", "diffmean"),
        ("refuse-pca", 1.0, "unknown", "center"),
        ("execution_avg_vector", 26.156, "unknown", "Average"),
    ],
)
def test_easysteer_files_start_at_the_first_block(name, norm, hint, method):
    path = ARTEFACTS / f"{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    adapter = cv.load_adapter(path)
    assert (adapter.layers, adapter.d_model) == (list(range(28)), 1536)
    assert float(constant(adapter, 0).norm()) == pytest.approx(norm, abs=1e-3)
    assert adapter.provenance["metadata"]["method"] == method
    facts = describe(str(path))
    assert (facts["what"], facts["convention"], facts["model_hint"]) == ("control-vector", "from-zero", hint)
    json.dumps(facts)
    data = {one.name: one.data for one in gguf.GGUFReader(path).tensors}
    for layer in adapter.layers:
        assert np.array_equal(constant(adapter, layer).numpy(), data[f"direction.{layer}"])
    with pytest.raises(FormatError, match=r"llama\.cpp discards"):
        read_control_vector(path, convention="llama.cpp")


def test_a_file_of_others_saves_as_ours_and_exports_from_layer_1(tmp_path):
    path = write(tmp_path / "zero.gguf", directions(0, 1, 2))
    ours = cv.load_adapter(cv.save(cv.load_adapter(path), tmp_path / "ours"))
    with pytest.raises(InputError, match="layer 0"):
        write_control_vector(ours, tmp_path / "v.gguf")
    again = cv.load_adapter(write_control_vector(ours.on_layers(range(1, 3)), tmp_path / "v.gguf"))
    assert torch.equal(constant(again, 2), constant(ours, 2))


def test_export_on_the_command_line(run, tmp_path):  # noqa: F811
    source, out = cv.save(steering(1, 3), tmp_path / "push"), tmp_path / "push.gguf"
    ran = run("export", source, out, "--format", "control-vector", "--model-hint", "llama", "--json")
    assert ran.code == 0, ran.err
    assert ran.json == {"file": str(out), "format": "control-vector", "layers": [1, 3], "d_model": D}
    shown = run("inspect", out, "--json").json
    assert (shown["what"], shown["model_hint"], shown["layers"]) == ("control-vector", "llama", [1, 3])
    torch.save(torch.ones(D), tmp_path / "v.pt")
    assert run("export", tmp_path / "v.pt", tmp_path / "one.gguf", "--layer", 2).code == 0
    assert cv.load_adapter(tmp_path / "one.gguf").layers == [2]
    (tmp_path / "notes.txt").write_text("mine")
    fails(run("export", source, tmp_path / "notes.txt"), "notes.txt", "not overwritten")
    fails(run("export", source, out, "--format", "onnx"), "'onnx'", "control-vector")
    fails(run("export", "builtin:pirate@gemma-3-270m", tmp_path / "p.gguf"), "cannot be a control vector", "reads")
    assert not (tmp_path / "p.gguf").exists()
