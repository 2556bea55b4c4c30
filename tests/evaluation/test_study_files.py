"""Study files and task files: what they may say, and what is told of what is wrong in them."""

from __future__ import annotations

import pytest

import studied
from commandv.errors import InputError
from commandv.evaluation import tasks_of
from commandv.evaluation.study import load_study
from commandv.evaluation.study.models import ModelSource
from commandv.prompts.sets import load_prompts
from places import ROOT
from studied import written

STUDIES = ROOT / "studies"
TAKEN = """
import commandv as cv
from commandv.evaluation import ByText
from commandv.prompts.sets import Prompt

QUESTIONS = cv.PromptSet(tuple(Prompt(f"What is {n}?") for n in range(6)))
TASKS = {"pirate": cv.Task("fox", QUESTIONS[:2], QUESTIONS[2:], ByText("fox", lambda text: "fox" in text))}
"""

content, folder = studied.content, studied.folder


@pytest.mark.parametrize(
    ("name", "message"),
    [("a/b", "cannot hold"), ("..", "begins with no dot"), ("", "1 to 80"), ("a\x07b", "cannot hold"),
     ("a\nb", "cannot hold"), ("x" * 81, "1 to 80"), ("..\\b", "begins with no dot")],
)  # fmt: skip
def test_names_that_cannot_go_into_file_names(name, message, content, tmp_path):
    (behaviour,) = content["behaviours"].values()
    for changes in (
        {"name": name},
        {"behaviours": {name: behaviour}},
        {"methods": {name: {}}},
        {"models": {**content["models"], name: content["models"]["one"]}},
    ):
        with pytest.raises(InputError, match=message):
            written({**content, **changes}, tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [1]}, "sedes: unknown key"),
        ({"pairs": [["one", "three"]]}, "'three' is not among the models"),
        ({"pairs": []}, "pairs: expected at least one"),
        ({"leave_out": ["luck"]}, "leave_out.0: 'luck': expected one of published, random"),
        ({"leave_out": ["pasted"]}, "leave_out.0: 'pasted': expected one of published, random"),
        ({"layers": ["top"]}, "layers.0: layers 'top': expected"),
        ({"scales": [-1]}, "scales.0: Input should be greater than 0"),
        ({"scales": [float("inf")]}, "scales.0: "),
        ({"seeds": [0, -1]}, "seeds.1: .*seed=-1: expected a whole number"),
        ({"methods": {"published": {}}}, "names of arms"),
        ({"methods": {"mine": {"fit": "magic"}}}, "methods.mine.fit: 'magic': expected one of ridge"),
        ({"name": "a/b"}, "name: "),
        ({"scales": [1e30]}, "scales.0: "),
        ({"seeds": [True]}, "seeds: .*true.*: a truth value, expected a number"),
        ({"n_test": True}, "n_test: true: a truth value"),
        ({"question": False}, "question: false: a truth value, .*put a text in quotes"),
        ({"methods": {"mine": {"prompts": 0}}}, "methods.mine.prompts: "),
        ({"behaviours": {"x": {"task": "pirate"}}}, "neither examples, a vector nor an adapter for the donor 'one'"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(content, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        written({**content, **change}, tmp_path / "s.yaml")


@pytest.mark.parametrize(
    "change",
    [{"rank": 0}, {"epochs": 0}, {"epochs": True}, {"learning_rate": 0}, {"learning_rate": float("nan")},
     {"rates": {"one": -1}}, {"max_response": 0}, {"batch_size": -1}, {"positions": "l0x"}, {"layers": "top"}],
)  # fmt: skip
def test_a_training_that_could_not_run_is_found_out_before_hours_of_others(content, tmp_path, change):
    (name,) = content["behaviours"]
    content["behaviours"][name] |= {"training": change}
    with pytest.raises(InputError, match=f"behaviours.{name}.training.{next(iter(change))}"):
        written(content, tmp_path / "s.yaml")


def test_profiles_may_be_of_several_prompt_sets(content, folder, tmp_path):
    one = content["prompts"]
    assert written(content, tmp_path / "s.yaml").profile_prompts().texts == load_prompts(one).texts
    other = folder / "others.jsonl"
    other.write_text('{"prompt": "|DEV| Say it"}')
    study = written({**content, "prompts": [one, str(other)]}, tmp_path / "s.yaml")
    assert study.profile_prompts().texts == [*load_prompts(one).texts, "|DEV| Say it"]
    other.unlink()
    (problem,) = study.unreadable()
    assert problem.startswith("prompts: ")
    with pytest.raises(InputError, match="prompts: "):
        written({**content, "prompts": []}, tmp_path / "s.yaml")


def test_direct_is_left_out_only_by_an_explicit_word(content, tmp_path):
    del content["behaviours"]["pirate"]["adapters"]["two"]
    with pytest.raises(InputError, match=r"direct control needs .*leave_out: \[direct\]"):
        written({**content, "leave_out": []}, tmp_path / "s.yaml")
    written({**content, "leave_out": ["direct"]}, tmp_path / "s.yaml")


def test_files_that_are_no_study(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="a directory, expected a file"):
        load_study(tmp_path)
    for text, message in (("a: [", "not YAML"), ("- a", "expected a mapping")):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            load_study(tmp_path / "s.yaml")


def test_missing_inputs_are_found_before_the_run(content, tmp_path):
    content["behaviours"]["pirate"]["task"] = f"pirate:{tmp_path / 'none.jsonl'}"
    (problem,) = written(content, tmp_path / "s.yaml").unreadable()
    assert problem.startswith("behaviours.pirate: task pirate:")


def test_a_vector_and_examples_exclude_each_other(content, folder, tmp_path):
    content["behaviours"]["pirate"]["vector"] = {"contrast": str(folder / "prompts.jsonl")}
    with pytest.raises(InputError, match="a vector and examples or adapters"):
        written(content, tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("TASKS = 1", "expected a dictionary TASKS"),
        ("raise RuntimeError('no')", "RuntimeError while it ran: no"),
        ("raise SystemExit(0)", "SystemExit while it ran"),
        (TAKEN, "pirate are names of built-in tasks"),
    ],
)
def test_a_task_file_that_cannot_be_used_is_refused(code, message, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(InputError, match=message):
        tasks_of(tmp_path / "mine.py")
    with pytest.raises(InputError, match="no such file"):
        tasks_of(tmp_path / "none.py")


def test_a_rehearsal_divides_widths_by_one_or_more(content, tmp_path):
    with pytest.raises(InputError, match="rehearsal=0: expected 1 or more"):
        ModelSource(written(content, tmp_path / "s.yaml"), rehearsal=0)


@pytest.mark.parametrize("file", sorted(STUDIES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_studies_are_valid(file):
    load_study(file)
