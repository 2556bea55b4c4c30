"""Typical mistakes: one line that says what is wrong and what to do, a status by its kind, and no model loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import command_line
import commandv as cv
import made_up
import tiny
from command_line import fails
from commandv.cli import EXIT_CODES
from commandv.errors import FormatError, HubError, InputError, MismatchError, ModelError, StorageError, WorkerError

run = command_line.run
USAGE, INPUT, MODEL, STORAGE = 2, EXIT_CODES[InputError], EXIT_CODES[ModelError], EXIT_CODES[StorageError]
MISMATCH, FORMAT, HUB = EXIT_CODES[MismatchError], EXIT_CODES[FormatError], EXIT_CODES[HubError]
STUDY = {
    "name": "mine",
    "models": {"one": {"id": "a"}, "two": {"id": "b"}},
    "pairs": [["one", "two"]],
    "behaviours": {"list": {"task": "numbered-list", "vector": {"contrast": "builtin:sentiment"}}},
}


CUDA = not torch.__version__.endswith("+cpu")  # a build in which only torch itself knows what is there


class Mistake(NamedTuple):
    """What is typed, with `@` for the folder of files; what it exits with; and words of the message.

    All but those that only PyTorch can tell are told before it is imported, which takes seconds.
    """

    typed: str
    code: int
    words: tuple[str, ...]
    by_torch: bool = False

    def words_typed(self, folder: Path) -> list[str]:
        return self.typed.replace("@", f"{folder}/").replace(f"list{folder}/", "list@").split()


MISTAKES = {
    "a verb misspelt": Mistake("inspct @wide", USAGE, ("inspct", "Did you mean 'inspect'", "commandv -h")),
    "an option misspelt": Mistake("generate @model hi --adaptr @wide", USAGE, ("--adapter", "commandv generate -h")),
    "an option without its value": Mistake("generate @model hi --scale", USAGE, ("--scale", "requires an argument")),
    "a number that is none": Mistake(
        "generate @model hi --max-new-tokens many", USAGE, ("--max-new-tokens", "integer")
    ),
    "an argument forgotten": Mistake("train @model @rows.jsonl", USAGE, ("--out",)),
    "a choice misspelt": Mistake(
        "paste @wide @empty @empty -o @out --fit rigde", USAGE, ("rigde", "did you mean ridge?")
    ),
    "a packaged model misspelt": Mistake("generate gemma-270m hi", MODEL, ("no model", "did you mean gemma-3-270m?")),
    "a model's directory misspelt": Mistake("generate @modle hi", MODEL, ("no such file", "did you mean model?")),
    "a directory without a model": Mistake("generate @empty hi", MODEL, ("config.json", "holds nothing")),
    "a model that nobody has": Mistake("generate nobody/no-model hi", MODEL, ("nobody/no-model", "hub")),
    "a shipped adapter misspelt": Mistake(
        "inspect builtin:numberd-list@gemma-3-270m", FORMAT, ("did you mean numbered-list@gemma-3-270m",)
    ),
    "an adapter's directory misspelt": Mistake("generate @model hi -a @wid", FORMAT, ("did you mean wide?",)),
    "an adapter of another width": Mistake("generate @model hi -a @wide", MISMATCH, ("width 48", "paste() carries")),
    "a vector without a layer": Mistake("generate @model hi -a @bare.pt", INPUT, ("one vector of width 32", "--layer")),
    "a convention that is none": Mistake(
        "inspect @stack.pt --convention tokens", INPUT, ("--convention tokens", "blocks")
    ),
    "a scale that is none": Mistake("generate @model hi -a @narrow --scale nan", INPUT, ("--scale nan",)),
    "a task misspelt": Mistake("evaluate @model numbered-lst", INPUT, ("did you mean numbered-list?",)),
    "a task's file misspelt": Mistake("evaluate @model exact:@row.jsonl", INPUT, ("did you mean rows.jsonl?",)),
    "a judge misspelt": Mistake("evaluate @model pirate --judge refusl", INPUT, ("did you mean refusal",)),
    "a prompt file misspelt": Mistake("profile @model --prompts @rows.jsn", INPUT, ("rows.jsn", "rows.jsonl")),
    "a built-in set misspelt": Mistake("profile @model --prompts builtin:generl", INPUT, ("did you mean general",)),
    "layers that are not there": Mistake("train @model @rows.jsonl -o @out --layers 9", INPUT, ("[9]", "0 .. 3")),
    "positions that are none": Mistake("steer @model builtin:sentiment -o @out --at z1", INPUT, ("z1", "'l1'")),
    "a graphics card that is not there": Mistake(
        "generate @model hi --device-map cuda:7", INPUT, ("--device-map cuda:7",), CUDA
    ),
    "a device that is none": Mistake("generate @model hi --device-map cdua", INPUT, ("did you mean cuda?", "mps")),
    "examples without answers": Mistake(
        "train @model @lines.txt -o @out", INPUT, ("example 1 has no response", "{prompt, response}")
    ),
    "a place that is taken": Mistake("train @model @rows.jsonl -o @model", FORMAT, ("choose another place",)),
    "a place below a file": Mistake("train @model @rows.jsonl -o @rows.jsonl/out", STORAGE, ("rows.jsonl",)),
    "a profile that is none": Mistake("paste @wide @empty @empty -o @out", FORMAT, ("empty", "not a commandv-profile")),
    "a profile misspelt": Mistake("paste @wide @emtpy @empty -o @out", FORMAT, ("no such file", "empty")),
    "a temperature that is none": Mistake("generate @model hi --temperature -1", INPUT, ("--temperature", "0")),
    "a number below the least": Mistake(
        "generate @model hi --batch-size 0", USAGE, ("--batch-size", "greater than or equal to 1")
    ),
    "a template's option without a value": Mistake(
        "generate @model hi --template-option thinking", INPUT, ("thinking", "NAME=VALUE")
    ),
    "an adapter that is half there": Mistake("generate @model hi -a @cut", FORMAT, ("truncated", "copy it again")),
    "a profile for an adapter": Mistake("generate @model hi -a @profile", FORMAT, ("a profile, not an adapter",)),
    "something else to look at": Mistake("inspect @rows.jsonl", FORMAT, ("'.jsonl'", ".safetensors")),
    "a matcher misspelt": Mistake(
        "paste @wide @profile @profile -o @out --match nearst", INPUT, ("did you mean nearest?", "2:1,4:3")
    ),
    "a method misspelt": Mistake(
        "transfer @model @narrow @model -o @out --task pirate --by contxt", INPUT, ("did you mean context?",)
    ),
    "a served adapter without a name": Mistake("serve @model -a @narrow", INPUT, ("NAME=DIR",)),
    "a served adapter of another width": Mistake("serve @model -a x=@wide", MISMATCH, ("width 48", "paste() carries")),
    "an adapter of another width in a talk": Mistake("chat @model -a x=@wide", MISMATCH, ("width 48",)),
    "a format that is none": Mistake("export @narrow @out --to ggfu", USAGE, ("did you mean gguf?",)),
    "nothing to push": Mistake("push @empty anna/lists", FORMAT, ("empty", "holds nothing")),
    "no repository": Mistake("push @narrow justaname", INPUT, ("justaname", "user/name")),
    "an executor that is none": Mistake("profile @model --executor rai", INPUT, ("rai", "ray:auto")),
    "a template option twice": Mistake(
        "generate @model hi --template-option a=1 --template-option a=2", INPUT, ("a is given twice",)
    ),
    "a layer map with a layer twice": Mistake(
        "paste @wide @profile @profile -o @out --match 2:1,2:3", INPUT, ("2:1,2:3", "each donor layer")
    ),
    "prompts that are no lines": Mistake("profile @model --prompts @model/config.json", INPUT, ("'.json'", ".jsonl")),
    "a report of something else": Mistake("report @empty", FORMAT, ("empty", "no run.json", "commandv study")),
    "a cluster that is not there": Mistake(
        "profile @model --executor ray:127.0.0.1:1", EXIT_CODES[WorkerError], ("127.0.0.1:1", "ray start --head")
    ),
    "a report of nothing": Mistake("report @nowhere", FORMAT, ("nowhere", "no such file")),
    "a study with a word misspelt": Mistake(
        "study @study.yaml", INPUT, ("behaviours.list.vector.kind", "did you mean ablate?", "scalse: unknown key")
    ),
    "a study to rehearse with a word misspelt": Mistake("rehearse @study.yaml", INPUT, ("scalse: unknown key",)),
    "an arm left out that is none": Mistake("study @arms.yaml", INPUT, ("leave_out.0", "did you mean shuffled?")),
    "a contrast with other columns": Mistake(
        "steer @model @rows.jsonl -o @out", INPUT, ("no 'positive'", "prompt, response", "{positive, negative}")
    ),
    "a repository that nobody has": Mistake("pull nobody/nothing -o @out", HUB, ("nobody/nothing", "HF_HUB_OFFLINE")),
    "an adapter that nobody has": Mistake("generate @model hi -a nobody/nothing", HUB, ("nobody/nothing",)),
    "a profile that nobody has": Mistake("paste @wide nobody/nothing @profile -o @out", HUB, ("data set nobody",)),
    "a study misspelt": Mistake("study @nowhere.yaml", FORMAT, ("nowhere.yaml", "no such file")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of width 32, adapters of widths 32 and 48, vectors, prompts with replies and an empty directory."""
    made = tmp_path_factory.mktemp("files")
    tiny.tiny_model().save_pretrained(made / "model")
    tiny.tiny_tokenizer().save_pretrained(made / "model")
    for name, width in (("narrow", 32), ("wide", 48)):
        cv.save(tiny.random_adapter(tiny.tiny_lm(hidden_size=width, id="org/some")), made / name)
    torch.save(torch.ones(32), made / "bare.pt")
    torch.save(torch.ones(4, 32), made / "stack.pt")
    (made / "rows.jsonl").write_text(json.dumps({"prompt": "What is tea?", "response": "a drink"}) + "\n")
    (made / "lines.txt").write_text("What is tea?\n")
    wrong = {**STUDY, "scalse": [1.0]}
    wrong["behaviours"] = {"list": {"task": "json", "vector": {"contrast": "builtin:sentiment", "kind": "albate"}}}
    (made / "study.yaml").write_text(json.dumps(wrong))
    (made / "arms.yaml").write_text(json.dumps({**STUDY, "leave_out": ["shufled"]}))
    (made / "empty").mkdir()
    shutil.copytree(made / "wide", made / "cut")
    tensors = next((made / "cut").glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-9])
    cv.save_profile(made_up.profile_of({0: torch.ones(3, 32)}, tiny.tiny_lm().ref), made / "profile")
    return made


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_before_a_model_is_loaded(run, folder, mistake, monkeypatch):
    monkeypatch.setattr("commandv.models.load._load_weights", lambda *_: pytest.fail("the model was loaded"))
    ran = run(*mistake.words_typed(folder))
    fails(ran, *mistake.words, code=mistake.code)
    assert not (folder / "out").exists()


def test_most_mistakes_are_told_before_torch_is_imported(folder):
    at_once = [one.words_typed(folder) for one in MISTAKES.values() if not one.by_torch]
    code = f"""
import sys
from commandv import cli
for words in {at_once!r}:
    sys.argv = ["commandv", *words]
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code, words
    heavy = {{"torch", "transformers"}} & set(sys.modules)
    assert not heavy, (heavy, words)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_with_json_an_error_is_json(run, folder):
    for typed, kind, code in (
        ("inspect builtin:nothing@nobody --json", "FormatError", FORMAT),
        ("generate gemma-270m hi --json", "ModelError", MODEL),
        ("generate --colour --json", "UsageError", USAGE),
    ):
        ran = run(*typed.split())
        fails(ran, code=code)
        error = ran.json["error"]
        assert (error["kind"], error["exit_code"]) == (kind, code)
        assert error["message"] in ran.err


def test_every_kind_of_error_has_a_status_of_its_own_that_the_docs_list():
    from places import ROOT

    raised = {one for one in vars(cv.errors).values() if isinstance(one, type) and one.__base__ is cv.CommandVError}
    assert raised <= set(EXIT_CODES)
    own = [EXIT_CODES[one] for one in raised]
    assert len(set(own)) == len(own)
    assert not {0, 1} & set(own)
    page = (ROOT / "docs" / "exit-codes.md").read_text("utf-8")
    assert all(f"| {code} |" in page for code in (0, 1, 130, *own))
