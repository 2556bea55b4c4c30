"""Directories written for pyreft: read back the same, and run by pyreft itself where it is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import command_line
import commandv as cv
import tiny
from command_line import fails
from commandv.errors import FormatError, InputError
from commandv.interop.pyreft import write_pyreft
from foreign import delta

run = command_line.run


@pytest.mark.parametrize("positions", ["l1", "f2+l3"])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_what_is_written_reads_back_as_the_same(rank, positions, lm, tmp_path):
    adapter = tiny.random_adapter(lm, layers=(0, 2), positions=positions, rank=rank)
    again = cv.load_adapter(write_pyreft(adapter, tmp_path / "a"))
    assert (again.layers, again.positions) == (adapter.layers, adapter.positions)
    assert again.model.id == lm.id
    h = 3 * torch.randn(7, lm.d_model)
    for layer in adapter.layers:
        torch.testing.assert_close(delta(again, layer, h), delta(adapter, layer, h), rtol=1e-4, atol=1e-3)


def test_several_interventions_and_constants_become_one(lm, tmp_path):
    one, other = tiny.random_adapter(lm, seed=1), tiny.random_adapter(lm, seed=2)
    both = cv.Adapter({1: (*one.interventions[1], *other.interventions[1])}, lm.ref)
    vector = cv.Adapter({1: cv.steering_vector(torch.randn(lm.d_model))}, lm.ref)
    h = torch.randn(7, lm.d_model)
    for number, adapter in enumerate((both, vector)):
        again = cv.load_adapter(write_pyreft(adapter, tmp_path / str(number)))
        torch.testing.assert_close(delta(again, 1, h), delta(adapter, 1, h), rtol=1e-4, atol=1e-4)


def test_its_files_are_those_of_torchs_orthogonal_parametrisation(lm, tmp_path):
    adapter = tiny.random_adapter(lm, rank=3)
    (file,) = write_pyreft(adapter, tmp_path / "a").glob("*.bin")
    state = torch.load(file, weights_only=True)

    class Rotation(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(lm.d_model, 3)))

    module = torch.nn.utils.parametrizations.orthogonal(Rotation())
    head = "rotate_layer."
    module.load_state_dict({name.removeprefix(head): value for name, value in state.items() if name.startswith(head)})
    h = torch.randn(5, lm.d_model)
    with torch.no_grad():
        source = torch.nn.functional.linear(h, state["learned_source.weight"], state["learned_source.bias"])
        expected = source @ module.weight.T
    torch.testing.assert_close(delta(adapter, 1, h), expected, rtol=1e-4, atol=1e-4)


def test_what_pyreft_cannot_do_is_refused(lm, tmp_path):
    relu = tiny.random_adapter(lm).map(lambda one: cv.Intervention(one.read, one.bias, one.write, "relu"))
    mixed = cv.Adapter(
        {**tiny.random_adapter(lm).interventions, **tiny.random_adapter(lm, layers=(2,), positions="f1").interventions},
        lm.ref,
    )
    for adapter, message in [
        (relu, "has the activation relu"),
        (tiny.random_adapter(lm, positions="all"), "acts on prompt tokens only"),
        (tiny.random_adapter(lm, positions="l1+g3"), "acts on prompt tokens only"),
        (mixed, r"several positions \(f1, l1\)"),
    ]:
        with pytest.raises(InputError, match=message):
            write_pyreft(adapter, tmp_path / "a")
        assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match=r"notes\.txt"):
        write_pyreft(tiny.random_adapter(lm), tmp_path / "b")


def test_the_verb(run, lm, tmp_path):
    cv.save(tiny.random_adapter(lm), tmp_path / "a")
    assert run("export", tmp_path / "a", tmp_path / "p", "--to", "pyreft").code == 0
    assert cv.load_adapter(tmp_path / "p").layers == [1]
    cv.save(tiny.random_adapter(lm, positions="all"), tmp_path / "b")
    fails(run("export", tmp_path / "b", tmp_path / "q", "--to", "pyreft"), "prompt tokens only")


@pytest.mark.skipif(
    not importlib.util.find_spec("pyreft"),
    reason="pyreft is not installed; its pinned transformers 4 keeps it out of this environment, see docs/formats.md",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pyreft_loads_and_runs_it(dtype, tmp_path):
    import pyreft

    lm = tiny.tiny_lm("llama", dtype=dtype)
    adapter = tiny.random_adapter(lm, layers=(1, 3), positions="f1+l2")
    write_pyreft(adapter, tmp_path / "a")
    theirs = pyreft.ReftModel.load(str(tmp_path / "a"), lm.model)
    ids = torch.tensor([cv.encode(lm, "Name a river, and where it rises.").ids])
    places = [[[0, ids.shape[1] - 2, ids.shape[1] - 1]]] * 2
    with torch.inference_mode():
        plain = lm.model(ids).logits
        _, changed = theirs({"input_ids": ids}, unit_locations={"sources->base": (None, places)})
    with torch.inference_mode(), cv.attach(lm, adapter):
        ours = lm.model(ids).logits
    effect = (ours - plain).abs().max()
    assert (changed.logits - ours).abs().max() < 0.05 * effect
    assert effect > 0.1
