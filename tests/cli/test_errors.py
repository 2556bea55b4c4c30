"""What the command line refuses: one line that says why, before the work starts."""

from __future__ import annotations

import pytest

import command_files
import command_line
import commandv as cv
from command_line import fails

files, models, trained = command_files.files, command_files.models, command_files.trained


run = command_line.run


def test_errors_are_one_line(run, models, files, trained, tmp_path):
    model, out = models["donor"], ("-o", tmp_path / "out")
    fails(run("inspect", tmp_path / "nowhere"), "nowhere", "no such file")
    fails(run("inspect", "builtin:juggling@nobody"), "builtin:juggling@nobody", "no such adapter")
    fails(run("generate", model, "hi", "--adapter", "builtin:juggling@nobody"), "no such adapter")
    fails(run("generate", model), "give prompts")
    fails(run("generate", model, "hi", "--prompts", files["prompts"]), "one of the two")
    fails(run("generate", model, "hi", "--template", "fancy"), "--template", "fancy", "plain")
    fails(run("generate", model, "hi", "--dtype", "int7"), "int7", "float32")
    fails(run("generate", model, " "), "empty")
    fails(run("generate", models["recipient"], "hi", "--template", "chat"), "no chat template", "plain")
    fails(run("generate", models["recipient"], "hi", "--adapter", trained), "width", "paste")
    fails(run("generate", model, "hi", "--prompts", tmp_path / "no.txt"), "no.txt: no such file")
    fails(run("profile", model, "--prompts", tmp_path / "no.txt"), "no.txt: no such file")
    fails(run("profile", tmp_path / "nomodel"), "nomodel", "no such file", code=3)
    fails(run("profile", "nobody/no-such-model"), "nobody/no-such-model", "cannot be loaded")
    fails(run("train", model, files["agree"], *out, "--kind", "magic"), "'magic'", "direft")
    fails(run("train", model, files["agree"], *out, "--layers", "9"), "[9]", "0 .. 3")
    fails(run("train", model, files["agree"], *out, "--positions", "z1"), "'z1'")
    fails(run("train", model, files["prompts"], *out), "example 1 has no response")
    fails(run("paste", trained, tmp_path, tmp_path, *out), "not a commandv-profile")
    assert not (tmp_path / "out").exists()


def test_paste_errors(run, models, files, trained, tmp_path):
    sets = {"donor": files["prompts"], "recipient": files["prompts"], "other": files["texts"]}
    for name, prompts in sets.items():
        model = models.get(name, models["recipient"])
        arguments = ("--prompts", prompts, "--no-text", "--out", tmp_path / name, "--dtype", "float32")
        assert run("profile", model, *arguments).code == 0
    donor, recipient, other = (tmp_path / name for name in sets)
    out = ("-o", tmp_path / "out")
    fails(run("paste", trained, donor, other, *out), "different prompts")
    fails(run("paste", trained, recipient, donor, *out), "adapter agree")
    fails(run("paste", trained, donor, recipient, *out, "--fit", "magic"), "'magic'", "ridge")
    fails(run("paste", trained, donor, recipient, *out, "--match", "sideways"), "--match sideways", "2:1,4:3")
    fails(run("paste", trained, donor, recipient, *out, "--match", "0:99"), "99")
    fails(run("paste", trained, donor, recipient, *out, "--layers", "77"), "77")
    fails(run("paste", donor, donor, recipient, *out), "a profile, not an adapter")
    assert not (tmp_path / "out").exists()
    fails(run("paste", trained, donor, recipient, "-o", models["donor"], "--no-fidelity"), "choose another place")
    assert (models["donor"] / "model.safetensors").exists()


def test_a_place_that_is_taken_is_refused_before_the_work_starts(run, models, files, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")

    def never(*_, **__):
        pytest.fail("the model was loaded before the output was checked")

    monkeypatch.setattr(cv, "load_model", never)
    fails(run("train", models["donor"], files["agree"], "-o", tmp_path), "choose another place", "notes.txt")


def test_wrong_usage_exits_with_2(run):
    for arguments in (
        ("fly",),
        ("inspect",),
        ("inspect", "x", "--colour", "red"),
        ("train", "gemma-3-270m", "builtin:pirate"),
    ):
        fails(run(*arguments), "-h` lists what there is", code=2)
