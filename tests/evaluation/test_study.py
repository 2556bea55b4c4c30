"""Runs of studies on tiny models: resumed, cut off, failing in part."""

from __future__ import annotations

import json

import pytest

import gguf_model
import real
import studied
import studying
import tiny
from commandv.errors import FormatError
from commandv.evaluation import ByText, Task, tasks_of
from commandv.evaluation.arms import ARMS
from commandv.evaluation.results import load_run
from commandv.evaluation.study import load_study, plan, run_study
from commandv.evaluation.study.models import ModelSource
from commandv.prompts.sets import load_prompts
from places import ROOT
from studied import QUICK, cell_file, written

asked, out, study = studying.asked, studying.out, studying.study


STUDIES = ROOT / "studies"


content, folder, finished, short = studied.content, studied.folder, studied.finished, studied.short


def test_a_run_measures_every_arm(content, tmp_path):
    run = run_study(written({**content, "leave_out": []}, tmp_path / "s.yaml"), tmp_path / "run")
    (cell,) = run.cells
    assert (cell.state, cell.error) == ("done", "")
    assert [arm.method for arm in cell.arms] == [*ARMS, "error-map", "donor"]
    for arm in cell.arms:
        assert len(arm.labels["pirate:questions"]) == 4
        assert set(arm.loops["pirate:questions"]) <= {0.0, 1.0}
        assert len(arm.loops["pirate:questions"]) == len(arm.words["pirate:questions"]) == 4
        for measure in ("kl", "kl_first", "kl_after"):
            assert len(arm.price.get(measure, [])) == (0 if arm.method == "unmodified" else 2)
        assert len(arm.price["perplexity_first"]) == 2
    settings = {arm.method: arm.setting for arm in cell.arms}
    assert set(cell.curve) == {"pasted", "text-bridge"}
    assert all(settings[method] in [one.setting for one in tried] for method, tried in cell.curve.items())
    assert next(arm for arm in cell.arms if arm.method == "few-shot").cost.tokens > 0
    assert cell.fidelity["pasted"]
    assert cell.samples
    assert cell.settings["success"] == {"pirate:questions": "more"}
    assert run.versions["commandv"]
    assert str(content["prompts"]) in run.hashes


def test_models_may_be_asked_with_a_system_prompt_and_template_options(content, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}{{ 'quietly' if quiet else '' }}"
    tokenizer.save_pretrained(tmp_path / "asked")
    tiny.tiny_model().save_pretrained(tmp_path / "asked")
    asked = {
        "id": str(tmp_path / "asked"),
        "system": "Be brief.",
        "template_options": {"quiet": True},
        "same_as": "org/one",
    }
    content["models"]["one"] |= asked
    lm = ModelSource(written(content, tmp_path / "s.yaml"))["one"]
    assert (lm.format.system, lm.format.options, lm.ref.id) == ("Be brief.", {"quiet": True}, "org/one")


def test_a_run_directory_that_holds_something_else_is_refused(content, tmp_path):
    study = written(content, tmp_path / "s.yaml")
    for name, text in (("notes.txt", "mine"), ("run.json", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(text)
        with pytest.raises(FormatError):
            run_study(study, tmp_path / name)
        assert [one.name for one in (tmp_path / name).iterdir()] == [name]
    with pytest.raises(FormatError, match="a file, expected a run directory"):
        run_study(study, tmp_path / "s.yaml")


def test_a_failed_cell_is_reported_and_the_rest_is_run(content, tmp_path):
    content["models"]["absent"] = {"id": str(tmp_path / "absent")}
    content["pairs"] = [["one", "absent"], ["one", "two"]]
    content["behaviours"]["pirate"]["adapters"]["absent"] = content["behaviours"]["pirate"]["adapters"]["one"]
    run = run_study(written(content, tmp_path / "s.yaml"), tmp_path / "run")
    states = {cell.recipient: (cell.state, cell.error) for cell in run.cells}
    assert states["two"] == ("done", "")
    assert states["absent"][0] == "failed"
    assert "absent" in states["absent"][1]


def test_donors_and_direct_controls_are_trained_once(content, folder, tmp_path, cache):
    content["behaviours"]["pirate"] = {
        "task": f"pirate:{folder / 'questions.jsonl'}",
        "examples": str(folder / "examples.jsonl"),
        "training": {"rank": 2, "epochs": 1, "max_response": 2, "layers": "all_layers"},
    }
    left_out = [name for name in QUICK if name != "direct"]
    run = run_study(written({**content, "leave_out": left_out}, tmp_path / "s.yaml"), tmp_path / "run")
    assert run.cells[0].state == "done", run.cells[0].error
    assert run.left_out == left_out
    assert len([path for path in (cache / "adapters").iterdir() if path.is_dir()]) == 2


@pytest.fixture
def steered(content, folder):
    """A study of a steering vector."""
    rows = [{"positive": f"Trigger, what is {n}?", "negative": f"What is {n}?"} for n in range(6)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content["behaviours"] = {
        "pirate": {
            "task": f"pirate:{folder / 'questions.jsonl'}",
            "vector": {"contrast": str(folder / "pairs.jsonl"), "pairs": 4, "strength": -1.0},
        }
    }
    changes = {"methods": {"plain": {"fit": "affine"}}, "layers": ["50%"], "scales": [0.5, 1.0], "leave_out": []}
    return {**content, **changes}


@pytest.mark.parametrize(("kind", "seeds"), [("add", [0, 1]), ("ablate", [0])])
def test_a_vector_is_measured_beside_the_native_one(kind, seeds, steered, tmp_path):
    steered["behaviours"]["pirate"]["vector"]["kind"] = kind
    run = run_study(written({**steered, "seeds": seeds}, tmp_path / "s.yaml"), tmp_path / "run")
    assert [cell.error for cell in run.cells] == [""] * len(seeds)
    cell = run.cells[0]
    assert {arm.method for arm in cell.arms} == {*ARMS, "plain", "donor"}
    tried = {method: [one.setting.scale for one in many] for method, many in cell.curve.items()}
    tuned = ("pasted", "text-bridge", "direct", "random", "random-in-span")
    assert tried == {name: [0.5, 1.0] for name in tuned}
    elsewhere = ("unmodified", "donor", "few-shot", "context", "vocabulary", "answers", "donor-answers")
    assert all(arm.layers == [tiny.LAYERS // 2] for arm in cell.arms if arm.method not in elsewhere)


def test_a_damaged_result_is_named(out, tmp_path):
    file = cell_file(out, seed=0)
    file.write_text(file.read_text()[:100])
    with pytest.raises(FormatError, match=r"\.json.*Remove the file"):
        load_run(out)
    with pytest.raises(FormatError, match=r"no run\.json"):
        load_run(tmp_path)


def test_a_judge_that_raises_fails_its_cell_and_is_named(content, tmp_path):
    def broken(answer):
        raise ZeroDivisionError("nothing to divide")

    asked = load_prompts(content["prompts"])
    known = {"mine": Task("mine", asked[:2], asked[2:5], ByText("broken", broken), max_new_tokens=2)}
    content["behaviours"]["pirate"]["task"] = "mine"
    run = run_study(written(content, tmp_path / "s.yaml"), tmp_path / "run", tasks=known)
    assert run.cells[0].state == "failed"
    assert "judge broken of task mine failed" in run.cells[0].error
    assert "nothing to divide" in run.cells[0].error


def test_an_arm_that_cannot_be_made_is_told_and_the_others_stand(content, tmp_path, monkeypatch):
    monkeypatch.setattr("commandv.transfer.distil.demonstrate.loops", lambda text: True)
    left_out = ["published", "random-in-span", "shuffled", "mean-ablation", "text-bridge"]
    (cell,) = run_study(written({**content, "leave_out": left_out}, tmp_path / "s.yaml"), tmp_path / "run").cells
    assert cell.state == "done"
    assert set(cell.missing) == {"few-shot", "context", "vocabulary", "answers", "donor-answers"}
    assert "answers can be used" in cell.missing["few-shot"]
    assert {arm.method for arm in cell.arms} >= {"pasted", "random", "direct"}


TASK_FILE = """
import commandv as cv
from commandv.evaluation import ByText
from commandv.prompts.sets import Prompt

QUESTIONS = cv.PromptSet(tuple(Prompt(f"What is {n}?") for n in range(6)))
TASKS = {"fox": cv.Task("fox", QUESTIONS[:2], QUESTIONS[2:], ByText("fox", lambda text: "fox" in text))}
"""


def test_a_task_defined_outside_the_package_is_known_to_a_study(content, tmp_path):
    (tmp_path / "mine.py").write_text(TASK_FILE)
    tasks = tasks_of(tmp_path / "mine.py")
    content["behaviours"] = {"fox": {**content["behaviours"]["pirate"], "task": "fox"}}
    study = written(content, tmp_path / "s.yaml")
    assert "expected NAME" in study.unreadable()[0]
    assert study.unreadable(tasks) == []
    assert plan(study, tasks=tasks).answers > 0
    (cell,) = run_study(study, tmp_path / "run", tasks=tasks).cells
    assert cell.error == ""
    assert all(len(arm.labels["fox"]) == 4 for arm in cell.arms)


def test_plan_counts_the_work(content, tmp_path):
    study = written({**content, "seeds": [0, 1], "leave_out": []}, tmp_path / "s.yaml")
    counted = plan(study)
    assert (counted.cells, counted.adapters, counted.profiles) == (2, 0, 2)
    assert counted.arms == len(ARMS) + 1  # and the extra method
    # 4 test prompts for every arm and the donor, 2 development prompts for the two that are tuned.
    assert counted.answers == 2 * (4 * (counted.arms + 1) + 2 * 2)
    assert counted.seconds is not None


def test_a_plan_may_leave_models_unconverted(content, tmp_path, monkeypatch):
    monkeypatch.setenv("COMMANDV_CACHE", str(tmp_path / "cache"))
    content["models"]["one"] = {
        "id": str(gguf_model.write(tmp_path / "one.gguf", gguf_model.tensors(tiny.tiny_model())))
    }
    study = written(content, tmp_path / "s.yaml")
    assert plan(study, convert=False).seconds is None
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert plan(study).seconds is not None
    assert plan(study, convert=False).seconds is not None


@pytest.mark.real
def test_a_study_of_the_paper_is_rehearsed_with_random_weights(tmp_path):
    real.require(real.SMOL)  # lends its tokenizer
    whole = load_study(STUDIES / "paper" / "profile-size.yaml").rehearsed()
    methods = {name: whole.methods[name] for name in ("prompts-128", "pinv-128")}
    left_out = tuple(name for name in QUICK if name != "direct")
    study = whole.model_copy(update={"methods": methods, "leave_out": left_out})
    assert study.unreadable() == []
    run = run_study(study, tmp_path / "run", models=ModelSource(study, rehearsal=24))
    assert [(cell.state, cell.error) for cell in run.cells] == [("done", "")]
