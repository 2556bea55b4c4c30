"""Runs of studies on tiny models: resumed, cut off, failing in part."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil

import pytest

import commandv as cv
import real
import studied
import tiny
from commandv.errors import FormatError, InputError
from commandv.evaluation import ByText, Task, load_task, outcomes, tasks_of, versions
from commandv.evaluation.arms import ARMS
from commandv.evaluation.results import cell_key, load_run
from commandv.evaluation.study import cell as cell_module, load_study, plan, run_study, shared as shared_module
from commandv.evaluation.study.models import ModelSource
from commandv.evaluation.study.running import cell_content
from commandv.prompts.sets import load_prompts
from places import ROOT
from studied import QUICK, cell_file, written

STUDIES = ROOT / "studies"

content, folder, finished, short = studied.content, studied.folder, studied.finished, studied.short


@pytest.fixture
def out(finished, tmp_path):
    """A finished run of a quick study of two seeds, to change."""
    return shutil.copytree(finished / "run", tmp_path / "finished")


@pytest.fixture
def study(finished):
    """The study that `out` is a run of."""
    return load_study(finished / "s.yaml")


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


def test_finished_cells_are_kept_and_others_are_run_again(study, out, content, tmp_path, monkeypatch):
    ran = []
    original = cell_module._CellRun.run
    monkeypatch.setattr(cell_module._CellRun, "run", lambda self: ran.append(self.spec) or original(self))
    assert len(run_study(study, out).cells) == 2
    assert ran == []
    cell_file(out, seed=1).unlink()
    run_study(study, out)
    assert [spec.seed for spec in ran] == [1]
    run_study(written({**content, "seeds": [0, 1], "n_test": 3}, tmp_path / "s.yaml"), out)
    assert [spec.seed for spec in ran] == [1, 0, 1]


def test_an_edited_study_that_is_cut_off_mixes_no_cells_of_two_settings(study, out, content, tmp_path, monkeypatch):
    edited = written({**content, "seeds": [0, 1], "n_test": 3}, tmp_path / "s.yaml")
    original = cell_module._CellRun.run

    def once(self):
        if self.spec.seed == 1:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(cell_module._CellRun, "run", once)
        with pytest.raises(KeyboardInterrupt):
            run_study(edited, out)
    halfway = load_run(out)
    assert (halfway.planned, [cell.seed for cell in halfway.cells]) == (2, [0])
    assert all(len(arm.labels["pirate:questions"]) == 3 for arm in halfway.cells[0].arms)
    assert set(halfway.ignored.values()) == {"a cell of other settings, or no cell of this study"}
    assert len(halfway.ignored) == 2
    assert [cell.seed for cell in run_study(edited, out).cells] == [0, 1]
    monkeypatch.setattr(cell_module._CellRun, "run", None)  # the cells of the first settings are still there
    again = run_study(study, out)
    assert [len(arm.labels["pirate:questions"]) for arm in again.cells[1].arms] == [4] * len(again.cells[1].arms)


def test_names_that_a_hyphen_could_confuse_have_files_of_their_own(content, folder, tmp_path):
    content["models"] |= {"one-two": content["models"]["one"], "two-one": content["models"]["two"]}
    adapters = content["behaviours"]["pirate"]["adapters"]
    adapters |= {"one-two": adapters["one"], "two-one": adapters["two"]}
    content["pairs"] = [["one", "two-one"], ["one-two", "one"]]
    run = run_study(written(content, tmp_path / "s.yaml"), tmp_path / "run")
    assert [(cell.donor, cell.recipient) for cell in run.cells] == [("one", "two-one"), ("one-two", "one")]


@pytest.mark.parametrize("change", ["copied", "other cell", "settings", "labels of another study"])
def test_files_among_the_cells_that_are_not_the_runs_own_are_not_counted(change, out):
    before = load_run(out)
    file = cell_file(out, seed=1)
    cell = json.loads(file.read_text())
    if change == "copied":
        (out / "cells" / "backup copy.json").write_text(file.read_text())
    elif change == "other cell":
        (out / "cells" / "0123456789abcdef.json").write_text(json.dumps({**cell, "behaviour": "removed", "seed": 77}))
    elif change == "settings":
        file.write_text(json.dumps({**cell, "settings": {**cell["settings"], "scales": [9.0]}}))
    else:
        file.write_text(json.dumps({**cell, "behaviour": "removed"}))
    run = load_run(out)
    kept = before.cells if change in ("copied", "other cell") else before.cells[:1]
    assert run.cells == kept
    assert len(run.ignored) == 1


def test_a_damaged_cell_is_made_again(study, out, caplog):
    before = load_run(out)
    cell_file(out, seed=1).write_text("{")
    after = run_study(study, out)
    assert [cell.state for cell in after.cells] == ["done", "done"]
    assert [arm.labels for arm in after.cells[1].arms] == [arm.labels for arm in before.cells[1].arms]
    assert "Remove the file" in caplog.text


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


def test_a_directory_serves_one_study_and_one_process(content, tmp_path):
    study = written(content, tmp_path / "s.yaml")
    out = tmp_path / "run"
    out.mkdir()
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(out / ".lock"), held, done))
    other.start()
    try:
        assert held.wait(30)
        with pytest.raises(InputError, match="another process"):
            run_study(study, out)
    finally:
        done.set()
        other.join()
    run_study(study, out)
    with pytest.raises(InputError, match="holds the study 'tiny', not 'other'"):
        run_study(written({**content, "name": "other"}, tmp_path / "s.yaml"), out)


def _hold(path, held, done):
    import filelock

    with filelock.FileLock(path):
        held.set()
        done.wait(30)


def test_a_damaged_result_is_named(out, tmp_path):
    file = cell_file(out, seed=0)
    file.write_text(file.read_text()[:100])
    with pytest.raises(FormatError, match=r"\.json.*Remove the file"):
        load_run(out)
    with pytest.raises(FormatError, match=r"no run\.json"):
        load_run(tmp_path)


def test_a_cell_of_code_that_is_not_known_is_not_counted(out, monkeypatch):
    monkeypatch.setitem(versions.VERSIONS, "price", versions.VERSIONS["price"] - 1)
    run = load_run(out)
    assert run.cells == []
    assert "made by code that this version does not know" in next(iter(run.ignored.values()))


@pytest.mark.parametrize("part", ["graders", "arms", "price", "tuning", "carrying", "answering"])
def test_cells_are_made_anew_when_the_code_of_a_part_has_a_new_version(part, content, tmp_path, monkeypatch):
    study = written(content, tmp_path / "s.yaml")
    source = ModelSource(study)
    before = study_keys(study, source)
    monkeypatch.setitem(versions.VERSIONS, part, versions.VERSIONS[part] + 1)
    assert set(before).isdisjoint(study_keys(study, source))


def study_keys(study, source):
    shared = shared_module.Shared(study, source)
    return [cell_key(*spec, cell_content(shared, spec)) for spec in study.cells()]


@pytest.fixture
def asked(monkeypatch):
    """How many prompts were asked of which task, in test runs of a study."""
    counts: list[tuple[str, int]] = []
    generate = outcomes.generate

    def counting(lm, prompts, **options):
        counts.append((options["turns"] and "turns", len(prompts)))
        return generate(lm, prompts, **options)

    monkeypatch.setattr(outcomes, "generate", counting)
    return counts


def test_a_new_grader_reads_kept_answers_and_asks_the_development_prompts_alone(
    content, tmp_path, cache, monkeypatch, asked
):
    content = {**content, "methods": {}, "leave_out": ["donor-answers", "context", "vocabulary"]}
    study = written(content, tmp_path / "s.yaml")
    (before,) = run_study(study, tmp_path / "run").cells
    assert 4 in {n for _, n in asked}
    asked.clear()
    monkeypatch.setitem(versions.VERSIONS, "graders", 1000)
    monkeypatch.setattr("commandv.evaluation.graders.loops", lambda text: True, raising=False)
    (after,) = run_study(study, tmp_path / "run").cells
    assert {n for _, n in asked} == {2}, "only what settings are chosen on"
    assert [arm.method for arm in after.arms] == [arm.method for arm in before.arms]
    assert after.settings["content"] != before.settings["content"]
    for one, other in zip(before.arms, after.arms, strict=True):
        assert (one.price, one.words, one.cost) == (other.price, other.words, other.cost)


def test_where_no_answers_are_kept_a_new_grader_has_them_asked_again(content, tmp_path, cache, monkeypatch, asked):
    content = {**content, "methods": {}, "leave_out": ["donor-answers", "context", "vocabulary"]}
    study = written(content, tmp_path / "s.yaml")
    known = load_task(content["behaviours"]["pirate"]["task"])
    hidden = {"hidden": dataclasses.replace(known, name="hidden", keep_answers=False)}
    study = study.model_copy(
        update={"behaviours": {"pirate": study.behaviours["pirate"].model_copy(update={"task": "hidden"})}}
    )
    run_study(study, tmp_path / "run", tasks=hidden)
    assert "tea" not in "".join(path.read_text() for path in (cache / "answers").iterdir())
    first = [n for _, n in asked].count(4)
    asked.clear()
    monkeypatch.setitem(versions.VERSIONS, "graders", 1000)
    run_study(study, tmp_path / "run", tasks=hidden)
    assert [n for _, n in asked].count(4) == first


def test_an_arm_that_was_measured_before_a_cell_was_cut_off_is_not_measured_again(content, tmp_path, cache, asked):
    study = written(
        {**content, "methods": {}, "leave_out": ["donor-answers", "context", "vocabulary"]}, tmp_path / "s.yaml"
    )
    run_study(study, tmp_path / "run")
    asked.clear()
    for file in (tmp_path / "run" / "cells").iterdir():
        file.unlink()
    for file in sorted((cache / "answers").iterdir())[:1]:
        file.write_text("{")
    (again,) = run_study(study, tmp_path / "run").cells
    assert [n for _, n in asked].count(4) == 1
    assert again.state == "done"


def test_cells_are_made_anew_when_an_adapter_or_a_model_behind_a_name_has_changed(content, folder, tmp_path):
    study = written(content, tmp_path / "s.yaml")
    before = study_keys(study, ModelSource(study))
    assert before == study_keys(study, ModelSource(study))
    place = folder / "two-adapter"
    kept = cv.load_adapter(place)
    cv.save(kept.scaled(2.0), place)
    try:
        assert before != study_keys(study, ModelSource(study))
    finally:
        cv.save(kept, place)
    assert before == study_keys(study, ModelSource(study))


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
    assert counted.seconds is None
    assert plan(study, ModelSource(study)).seconds is not None


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
