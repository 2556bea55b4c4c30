"""Steering tiny models: every way to apply a direction, choosing a layer, and the verb."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import commandv as cv
import tiny
from commandv import cli
from commandv.errors import InputError
from commandv.evaluation import ByText, Task, choose_layer
from commandv.prompts.sets import Prompt, PromptSet
from commandv.steering import APPLICATIONS, METHODS, prompt_states, read_contrast
from contrasts import CONTRAST, contrast_for, prompts, written

PASSAGES = PromptSet((Prompt("Say it", "The river runs\nand the fox sleeps."),), "passages")


# -- applying ---------------------------------------------------------------------------------------------------------


def changed(lm, adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """Last-token states [prompts, d_model] of the adapter's one layer, without and with it."""
    (layer,) = adapter.layers
    plain = prompt_states(lm, CONTRAST.negative, cv.positions.LAST)[layer].double()
    with cv.attach(lm, adapter):
        return plain, prompt_states(lm, CONTRAST.negative, cv.positions.LAST)[layer].double()


def test_adding_moves_one_mean_to_the_other(lm):
    adapter = cv.steer(lm, CONTRAST, layers=[2])
    plain, steered = changed(lm, adapter)
    target = prompt_states(lm, CONTRAST.positive, cv.positions.LAST)[2].double().mean(0)
    torch.testing.assert_close(steered.mean(0), target, atol=2e-2, rtol=2e-2)
    assert not torch.allclose(plain.mean(0), target, atol=0.2)


def test_ablation_along_the_direction_leaves_nothing_of_it(lm):
    u = torch.nn.functional.normalize(cv.directions(lm, CONTRAST)[2], dim=0)
    plain, steered = changed(lm, cv.steer(lm, CONTRAST, layers=[2], kind="ablate"))
    assert (steered @ u).abs().max() < 1e-2 * (plain @ u).abs().max() + 1e-2
    plain, half = changed(lm, cv.steer(lm, CONTRAST, layers=[2], kind="ablate", strength=0.5))
    torch.testing.assert_close(half @ u, plain @ u / 2, atol=2e-2, rtol=2e-2)


def test_mean_ablation_leaves_the_mean_along_the_direction_and_nothing_else_changes(lm):
    reading = read_contrast(lm, CONTRAST, cv.positions.LAST)
    u = torch.nn.functional.normalize(reading.difference[2], dim=0)
    plain, steered = changed(lm, cv.steer(lm, CONTRAST, layers=[2], kind="mean-ablate"))
    torch.testing.assert_close(steered @ u, (reading.stream(2).mean @ u).expand(20), atol=2e-2, rtol=2e-2)
    rest = torch.eye(lm.d_model) - torch.outer(u, u)
    torch.testing.assert_close(steered @ rest, plain @ rest, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("strength", "side"), [(0.3, "low"), (-0.3, "high")])
def test_clamping_bounds_the_part_along_the_direction(lm, strength, side):
    reading = read_contrast(lm, CONTRAST, cv.positions.LAST)
    u, length = torch.nn.functional.normalize(reading.difference[2], dim=0), reading.difference[2].norm()
    level = float(getattr(reading.stream(2), side) @ u + strength * length)
    plain, steered = changed(lm, cv.steer(lm, CONTRAST, layers=[2], kind="clamp", strength=strength))
    bounded = (plain @ u).clamp(min=level) if strength > 0 else (plain @ u).clamp(max=level)
    torch.testing.assert_close(steered @ u, bounded, atol=3e-2, rtol=2e-2)


def test_relative_strength_is_a_share_of_the_typical_norm(lm):
    adapter = cv.steer(lm, CONTRAST, layers=[1, 2], strength=0.25, relative=True)
    norms = read_contrast(lm, CONTRAST, cv.positions.LAST).norms
    for layer in (1, 2):
        assert adapter.interventions[layer][0].write.norm() == pytest.approx(0.25 * float(norms[layer]), rel=1e-4)
    with pytest.raises(InputError, match="takes no relative strength"):
        cv.steer(lm, CONTRAST, kind="ablate", relative=True)


def test_directions_that_need_more_say_so(lm):
    some = {1: torch.randn(lm.d_model)}
    for arguments in ({"kind": "clamp"}, {"kind": "mean-ablate"}, {"relative": True}):
        with pytest.raises(InputError, match="needs typical="):
            cv.from_directions(some, lm.ref, **arguments)
    with pytest.raises(InputError, match="layer 1 is zero"):
        cv.from_directions({1: torch.zeros(lm.d_model)}, lm.ref)
    with pytest.raises(InputError, match="expected one of add"):
        cv.from_directions(some, lm.ref, kind="push")


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_side_of_the_padding_does_not_matter(lm, padding):
    """A steered pass gives each prompt what it has alone, whichever side shorter prompts are filled up on."""
    texts = ["Tea?", "How do I paint the garden and the door?"]
    with cv.attach(lm, cv.steer(lm, CONTRAST, at="l1")):
        together = cv.profile(lm, texts, padding=padding, cache=False, text=None)
        single = [cv.profile(lm, [text], cache=False, text=None) for text in texts]
    for layer in range(lm.n_layers):
        rows = torch.cat([one.layer(layer) for one in single])
        torch.testing.assert_close(together.layer(layer), rows, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", APPLICATIONS)
def test_every_method_and_kind_survives_saving(lm, tmp_path, method, kind):
    adapter = cv.steer(lm, contrast_for(method), method=method, kind=kind, at="f1+l1", trigger=None)
    cv.save(adapter, tmp_path / "a")
    again = cv.load_adapter(tmp_path / "a")
    assert again.provenance == adapter.provenance
    assert again.layers == adapter.layers
    h = torch.randn(3, lm.d_model)
    for layer in adapter.layers:
        for one, two in zip(adapter.interventions[layer], again.interventions[layer], strict=True):
            assert one.positions == two.positions
            torch.testing.assert_close(two.delta(h), one.delta(h))


# -- choosing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def loud(lm):
    """A task whose judge counts the answer's characters, and a strong steering adapter on every layer."""
    judge = ByText("length", len, "characters")  # type: ignore[arg-type]
    sums = prompts("Count {}", 8)
    task = Task("length", sums[:4], sums[4:], judge, max_new_tokens=3)
    return lm, task, cv.steer(lm, CONTRAST, layers="all_layers", strength=2.0)


def test_late_layers_and_costly_settings_are_left_aside(loud, monkeypatch):
    lm, task, adapter = loud
    monkeypatch.setattr(Task, "prompts", lambda self, split: self.dev if split == "dev" else pytest.fail("test split"))
    free = choose_layer(lm, adapter, task, strengths=(0.5, 1.0), budget=None, passages=PASSAGES, depth=0.75)
    assert [(one.setting.layers, one.setting.scale) for one in free.tried] == [
        (str(n), s) for n in range(3) for s in (0.5, 1.0)
    ]
    assert free.chosen.value == max(one.value for one in free.tried)
    layer = int(free.chosen.setting.layers)
    assert free.adapter.layers == [layer]
    written = free.adapter.interventions[layer][0].write
    torch.testing.assert_close(written, free.chosen.setting.scale * adapter.interventions[layer][0].write)
    cheapest = min(one.kl for one in free.tried)
    tight = choose_layer(lm, adapter, task, strengths=(0.5, 1.0), budget=cheapest, passages=PASSAGES, depth=0.75)
    assert (tight.chosen.kl, tight.within_budget) == (cheapest, True)
    assert not choose_layer(lm, adapter, task, budget=-1.0, passages=PASSAGES).within_budget


def test_a_side_effect_rules_settings_out(loud):
    lm, task, adapter = loud
    fewer = dataclasses.replace(task, success="less")
    both = choose_layer(
        lm, adapter, task, layers=[1], strengths=(0.0, 1.0), budget=None, side_task=fewer, passages=PASSAGES
    )
    assert all(one.side is not None for one in both.tried)
    plain = next(one.side for one in both.tried if one.setting.scale == 0.0)
    assert both.within_budget
    assert both.chosen.side <= plain


def test_nothing_to_choose_from_is_refused(loud):
    lm, task, adapter = loud
    with pytest.raises(InputError, match="none of them is among"):
        choose_layer(lm, adapter.on_layers([3]), task, depth=0.5)
    with pytest.raises(InputError, match="expected a share"):
        choose_layer(lm, adapter, task, depth=0)


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.tiny_model().save_pretrained(path)
    tiny.tiny_tokenizer().save_pretrained(path)
    return path


def ran(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["commandv", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_verb_writes_an_adapter(monkeypatch, capsys, tmp_path, model):
    rows = [{"positive": f"How {n}?", "negative": f"Never {n}!"} for n in range(4)]
    pairs, out = written(tmp_path / "pairs.jsonl", *rows), tmp_path / "out"
    arguments = ("steer", model, pairs, "-o", out, "--dtype", "float32", "--json")
    assert ran(monkeypatch, *arguments, "--layers", "1,2", "--strength", 0.5, "--relative") == 0
    assert [row["layer"] for row in json.loads(capsys.readouterr().out)["layers"]] == [1, 2]
    assert cv.load_adapter(out).provenance["relative"]
    assert ran(monkeypatch, *arguments, "--negative-trigger", "x") == 2
    assert "give --trigger" in capsys.readouterr().err
    negative = written(tmp_path / "negative.txt", "Never!", "No!")
    positive = written(tmp_path / "positive.txt", "How?", "Why?", "Where?")
    two = ("steer", model, positive, "-o", out, "--dtype", "float32", "--negative", negative)
    assert ran(monkeypatch, *two, "--kind", "clamp", "--method", "probe", "--layers", "1") == 0
    assert cv.load_adapter(out).interventions[1][0].activation == "relu"
    capsys.readouterr()
    assert ran(monkeypatch, *two, "--method", "pca") == 2
    assert "needs pairs" in capsys.readouterr().err
