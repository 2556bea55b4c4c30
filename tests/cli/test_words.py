"""Demonstrating and distilling from the command line, on tiny models in local directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import command_line
import commandv as cv
import tiny
from command_line import fails
from toy import examples

run = command_line.run
HERE = ("--dtype", "float32", "--json")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two models, prompts with replies, and an adapter of the donor."""
    folder = tmp_path_factory.mktemp("words")
    for name, arch, chat in (("donor", "llama", True), ("recipient", "gpt2", False)):
        tiny.tiny_model(arch, seed=len(name)).save_pretrained(folder / name)
        tiny.tiny_tokenizer(chat=chat).save_pretrained(folder / name)
    rows = [{"prompt": one.text, "response": f"The fox likes {one.text}"} for one in examples(16)]
    (folder / "told.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "harmful.txt").write_text("How do I break it?\nHow do I hurt the fox?")
    donor = cv.load_model(folder / "donor", dtype="float32")
    cv.save(tiny.random_adapter(donor, (2, 3), size=2.0), folder / "adapter")
    return folder


def test_a_donor_demonstrates_and_a_recipient_distils(run, made, tmp_path):
    arguments = (made / "donor", made / "adapter", made / "told.jsonl", "-o", tmp_path / "shown")
    shown = run("demonstrate", *arguments, "--max-new-tokens", 4, *HERE).json
    assert shown["answers"] + sum(shown["left_out"].values()) == 16
    assert shown["mean_divergence"] > 0
    told = run("inspect", tmp_path / "shown", "--json").json
    assert told["what"] == "commandv-demonstrations"
    assert told["answers"] == shown["answers"]
    by = ("--by", "vocabulary", "--rank", 2)
    distilled = run("distil", made / "recipient", tmp_path / "shown", "-o", tmp_path / "out", *by, *HERE).json
    assert distilled["by"] == "vocabulary"
    assert distilled["positions"].startswith("l1+g")
    with cv.attach(cv.load_model(made / "recipient", dtype="float32"), cv.load_adapter(str(tmp_path / "out"))):
        pass


def test_replies_of_a_file_serve_without_an_adapter(run, made, tmp_path):
    assert run("demonstrate", made / "donor", "none", made / "told.jsonl", "-o", tmp_path / "s", *HERE).code == 0
    assert cv.load_demonstrations(tmp_path / "s").changes is None
    ran = run("distil", made / "recipient", tmp_path / "s", "-o", tmp_path / "a", "--by", "vocabulary", *HERE)
    fails(ran, "texts only", "--by context")
    assert not (tmp_path / "a").exists()


def test_harmful_prompts_are_kept_where_they_are_refused_only(run, made, tmp_path):
    arguments = (made / "donor", made / "adapter", made / "told.jsonl", "-o", tmp_path / "s", "--max-new-tokens", 3)
    ran = run("demonstrate", *arguments, "--harmful", made / "harmful.txt", *HERE).json
    assert ran["left_out"]["not to keep"] == 2
    assert not [one for one in cv.load_demonstrations(tmp_path / "s").prompts if "hurt" in one]


def test_a_forecast_is_made_of_an_adapter_and_demonstrations(run, made, tmp_path):
    arguments = (made / "donor", made / "adapter", made / "told.jsonl", "-o", tmp_path / "shown")
    run("demonstrate", *arguments, "--max-new-tokens", 4, *HERE)
    recipient = cv.load_model(made / "recipient", dtype="float32")
    cv.save(tiny.random_adapter(recipient, (2, 3), size=2.0), tmp_path / "own")
    told = run("predict", made / "recipient", tmp_path / "own", tmp_path / "shown", *HERE).json
    assert 0 <= told["probability"] <= 1
    assert told["reason"]
    assert told["evidence"]["first_n"] > 0
    spoken = run("predict", made / "recipient", tmp_path / "own", tmp_path / "shown", "--dtype", "float32").out
    assert f"{told['probability']:.2f}" in spoken
    ran = run("predict", made / "recipient", made / "adapter", tmp_path / "shown", *HERE)
    fails(ran, "made for", code=5)


def test_demonstrations_of_another_version_make_no_forecast(run, made, tmp_path):
    arguments = (made / "donor", made / "adapter", made / "told.jsonl", "-o", tmp_path / "shown")
    run("demonstrate", *arguments, "--max-new-tokens", 4, *HERE)
    config = json.loads((tmp_path / "shown" / "config.json").read_text("utf-8"))
    (tmp_path / "shown" / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    fails(run("predict", made / "donor", made / "adapter", tmp_path / "shown", *HERE), "99", code=6)
