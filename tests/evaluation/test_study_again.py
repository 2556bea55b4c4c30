"""What a study keeps, makes again and does not count."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing

import pytest

import commandv as cv
import studied
import studying
from commandv.errors import FormatError, InputError
from commandv.evaluation import load_task, versions
from commandv.evaluation.results import cell_key, load_run
from commandv.evaluation.study import cell as cell_module, run_study, shared as shared_module
from commandv.evaluation.study.models import ModelSource
from commandv.evaluation.study.running import cell_content, claim
from commandv.storage.files import LOCK
from studied import cell_file, written

asked, out, study = studying.asked, studying.out, studying.study


content, folder, finished, short = studied.content, studied.folder, studied.finished, studied.short


def test_finished_cells_are_kept_and_others_are_run_again(study, out, content, tmp_path, monkeypatch):
    ran = []
    original = cell_module.CellRun.run
    monkeypatch.setattr(cell_module.CellRun, "run", lambda self: ran.append(self.spec) or original(self))
    assert len(run_study(study, out).cells) == 2
    assert ran == []
    cell_file(out, seed=1).unlink()
    run_study(study, out)
    assert [spec.seed for spec in ran] == [1]
    run_study(written({**content, "seeds": [0, 1], "n_test": 3}, tmp_path / "s.yaml"), out)
    assert [spec.seed for spec in ran] == [1, 0, 1]


def test_an_edited_study_that_is_cut_off_mixes_no_cells_of_two_settings(study, out, content, tmp_path, monkeypatch):
    edited = written({**content, "seeds": [0, 1], "n_test": 3}, tmp_path / "s.yaml")
    original = cell_module.CellRun.run

    def once(self):
        if self.spec.seed == 1:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(cell_module.CellRun, "run", once)
        with pytest.raises(KeyboardInterrupt):
            run_study(edited, out)
    halfway = load_run(out)
    assert (halfway.planned, [cell.seed for cell in halfway.cells]) == (2, [0])
    assert all(len(arm.labels["pirate:questions"]) == 3 for arm in halfway.cells[0].arms)
    assert set(halfway.ignored.values()) == {"a cell of other settings, or no cell of this study"}
    assert len(halfway.ignored) == 2
    assert [cell.seed for cell in run_study(edited, out).cells] == [0, 1]
    monkeypatch.setattr(cell_module.CellRun, "run", None)  # the cells of the first settings are still there
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
    del cell["checksum"]  # else it would be an edited one
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


def test_a_cell_whose_labels_were_edited_is_measured_again(content, tmp_path, caplog):
    study = written(content, tmp_path / "s.yaml")
    out = tmp_path / "run"
    before = run_study(study, out).cells[0]
    cell = json.loads((file := cell_file(out, seed=0)).read_text())
    cell["arms"][0]["labels"] = {task: "1" * len(labels) for task, labels in cell["arms"][0]["labels"].items()}
    file.write_text(json.dumps(cell))
    with pytest.raises(FormatError, match="changed since it was written"):
        load_run(out)
    after = run_study(study, out).cells[0]
    assert [arm.labels for arm in after.arms] == [arm.labels for arm in before.arms]
    assert "changed since it was written" in caplog.text


def test_a_directory_serves_one_study_and_one_process(content, tmp_path):
    study = written(content, tmp_path / "s.yaml")
    out = tmp_path / "run"
    out.mkdir()
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(out / LOCK), held, done))
    other.start()
    try:
        assert held.wait(120)
        with pytest.raises(InputError, match="another process"):
            run_study(study, out)
        with pytest.raises(InputError, match="another process"):
            claim(study, out)  # before the models are loaded
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
