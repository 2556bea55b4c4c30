"""llama.cpp's control vectors: what is written and read, at which layer it acts, and what the format cannot hold."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

import command_line
import commandv as cv
import tiny
from command_line import fails
from commandv.adapters.adapter import Adapter, Intervention
from commandv.cli.inspection import describe
from commandv.errors import FormatError, InputError, MismatchError, StorageError
from commandv.interop.control_vectors import read_control_vector, write_control_vector
from commandv.models.identity import ModelRef
from commandv.positions import EVERYWHERE, Positions
from control_vectors import D, directions, steering, write
from limits import file_size_limit
from places import SHARED

ARTEFACTS = SHARED / "artefacts" / "easysteer_vectors"

run = command_line.run


def constant(adapter: Adapter, layer: int) -> torch.Tensor:
    return sum(one.delta(torch.randn(adapter.d_model)) for one in adapter.interventions[layer])


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
    pd, pr = (cv.profile(lm, prompts, cache=False, text=None) for lm in (donor, recipient))
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
        (1, intervention(positions=Positions(generated=4)), "positions g4, not on every token"),
        (1, intervention(activation="relu"), "activation relu"),
        (0, intervention(), "on layer 0 it acts, and llama.cpp never"),
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


def test_export_on_the_command_line(run, tmp_path):
    source, out = cv.save(steering(1, 3), tmp_path / "push"), tmp_path / "push.gguf"
    ran = run("export", source, out, "--to", "gguf", "--model-hint", "llama", "--json")
    assert ran.code == 0, ran.err
    size = out.stat().st_size
    assert ran.json == {"written": str(out), "format": "gguf", "layers": [1, 3], "d_model": D, "bytes": size}
    shown = run("inspect", out, "--json").json
    assert (shown["what"], shown["model_hint"], shown["layers"]) == ("control-vector", "llama", [1, 3])
    torch.save(torch.ones(D), tmp_path / "v.pt")
    assert run("export", tmp_path / "v.pt", tmp_path / "one.gguf", "--layer", 2).code == 0
    assert cv.load_adapter(tmp_path / "one.gguf").layers == [2]
    (tmp_path / "notes.txt").write_text("mine")
    fails(run("export", source, tmp_path / "notes.txt"), "notes.txt", "not overwritten")
    fails(run("export", source, out, "--to", "onnx"), "'onnx'", "'gguf', 'pyreft', 'baked'")
    fails(run("export", "builtin:pirate@gemma-3-270m", tmp_path / "p.gguf"), "cannot be a control vector", "reads")
    assert not (tmp_path / "p.gguf").exists()
