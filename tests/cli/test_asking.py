"""Which model a verb runs, and how it is asked."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import command_files
import command_line
import commandv as cv
import tiny
from command_line import fails
from commandv import cli
from commandv.adapters.kinds import steering_vector
from commandv.errors import StorageError
from commandv.models.identity import ModelRef

files, models, trained = command_files.files, command_files.models, command_files.trained


run = command_line.run


SWITCH = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}<|assistant|>\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>\n{% endif %}"
)


@pytest.fixture
def switched(tmp_path) -> Path:
    """A model whose chat template has a switch for thinking."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role != 'system' %}<|system|>Be kind.<eos>\n{% endif %}" + SWITCH
    tiny.tiny_model().save_pretrained(tmp_path / "switched")
    tokenizer.save_pretrained(tmp_path / "switched")
    return tmp_path / "switched"


def test_a_system_prompt_and_template_options_for_every_verb(run, switched, files, tmp_path):
    options = ("--dtype", "float32", "--system", "Be brief.", "--template-option", "enable_thinking=false", "--json")
    lm = cv.load_model(switched, dtype="float32", system="Be brief.", template_options={"enable_thinking": False})
    said = run("generate", switched, "Hi", "--max-new-tokens", 4, *options).json["answers"][0]["answer"]
    assert said == cv.generate(lm, ["Hi"], max_new_tokens=4)[0]
    out = {name: tmp_path / name for name in ("profile", "trained", "steered")}
    profiled = run("profile", switched, "--prompts", files["prompts"], "--no-text", "--out", out["profile"], *options)
    learned = ("--epochs", 1, "--max-response", 1, "-o", out["trained"])
    assert run("train", switched, files["agree"], *learned, *options).code == profiled.code == 0
    assert run("steer", switched, "builtin:sentiment", "-o", out["steered"], *options).code == 0
    for path in out.values():
        template = run("inspect", path, "--json").json["template"]
        assert json.loads(template) == {"system": "Be brief.", "options": {"enable_thinking": False}}
    fails(run("generate", switched, "Hi", "--template-option", "thinking=1"), "knows enable_thinking")
    fails(run("generate", switched, "Hi", "--template-option", "thinking"), "expected NAME=VALUE")


def test_inspect_tells_how_a_model_is_asked(run, switched):
    told = run("inspect", switched, "--json").json
    assert told["what"] == "model"
    assert (told["layers"], told["d_model"]) == (tiny.LAYERS, tiny.D)
    assert told["default_system_prompt"] == "Be kind."
    assert told["template_options"] == ["enable_thinking"]
    assert told["ends_at"] == ["<eos>"]


def test_a_copy_under_another_name_is_said_to_be_the_same_model(run, models, files, tmp_path):
    made = cv.Adapter({0: steering_vector(torch.ones(tiny.D))}, ModelRef(id="org/Model", d_model=tiny.D), "push")
    cv.save(made, tmp_path / "push")
    asked = ("generate", models["donor"], "Hi", "-a", tmp_path / "push", "--max-new-tokens", 2)
    fails(run(*asked), "made for org/Model", "--same-as 'org/Model'")
    assert run(*asked, "--same-as", "org/Model").code == 0
    out = {name: tmp_path / name for name in models}
    for name, path in models.items():
        assert run("profile", path, "--prompts", files["prompts"], "--no-text", "--out", out[name]).code == 0
    pasting = (
        "paste",
        tmp_path / "push",
        out["donor"],
        out["recipient"],
        "-o",
        tmp_path / "pasted",
        "--layers",
        "all_layers",
    )
    fails(run(*pasting), "made for org/Model")
    assert run(*pasting, "--same-as", models["donor"], "--no-fidelity").code == 0


def test_names_in_files_cannot_steer_the_terminal(run, tmp_path):
    adapter = tiny.random_adapter(tiny.tiny_lm())
    cv.save(dataclasses.replace(adapter, name="\x1b]0;title\x07\x1b[2J\x1b[31mred"), tmp_path / "a")
    told = run("inspect", tmp_path / "a").out
    assert not set("\x1b\x07") & set(told)
    assert "red" in told


def program(*arguments: object, **how: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the program in a process of its own, which has streams of its own."""
    command = [sys.executable, "-m", "commandv.cli", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, check=False, **how)


def test_output_holds_every_character_whatever_the_terminal_can_show(tmp_path):
    place = cv.save(dataclasses.replace(tiny.random_adapter(tiny.tiny_lm()), name="thé 茶"), tmp_path / "a")
    poor = {**os.environ, "PYTHONIOENCODING": "ascii"}
    told = program("inspect", place, stdout=subprocess.PIPE, env=poor)
    assert (told.returncode, told.stderr) == (0, b"")
    assert rb"th\xe9 \u8336" in told.stdout
    told = program("inspect", place, "--json", stdout=subprocess.PIPE, env=poor)
    assert json.loads(told.stdout.decode("utf-8"))["name"] == "thé 茶"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_told(tmp_path):
    place = cv.save(tiny.random_adapter(tiny.tiny_lm()), tmp_path / "a")
    with open("/dev/full", "wb") as full:
        told = program("inspect", place, "--json", stdout=full)
    assert told.returncode == cli.EXIT_CODES[StorageError]
    assert told.stderr.startswith(b"commandv: the output cannot be written: ")
    assert told.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("words", "run_it"), [((), False), (("--trust-remote-code",), True)])
def test_code_of_a_model_is_run_only_where_it_is_asked_for(run, monkeypatch, tmp_path, words, run_it):
    tiny.tiny_model().save_pretrained(tmp_path / "model")
    asked = []

    def load(_model, **how):
        asked.append(how["trust_remote_code"])
        raise cv.errors.ModelError("loaded")

    monkeypatch.setattr(cv, "load_model", load)
    fails(run("generate", tmp_path / "model", "hi", *words), "loaded")
    assert asked == [run_it]
