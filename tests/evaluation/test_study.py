"""Study files, their plans, and runs on tiny models: resumed, cut off, failing in part."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import yaml

import commandv as cv
import tiny
from commandv.errors import FormatError, InputError
from commandv.evaluation.controls import ARMS
from commandv.evaluation.results import Arm, Cell, Run, load_run, save_cell, save_head
from commandv.evaluation.study import cell as cell_module
from commandv.evaluation.study import load_study, plan, run_study
from commandv.evaluation.study import shared as shared_module
from commandv.evaluation.study.models import ModelSource
from commandv.prompts.sets import load_prompts
from places import ROOT

STUDIES = ROOT / "studies"
QUESTIONS = [
    {"prompt": f"What is {n} and {m}?", "split": "dev" if m == 0 else "test"} for n in range(4) for m in (0, 1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, an adapter for each, prompts, examples and a task."""
    folder = tmp_path_factory.mktemp("study")
    for seed, name in enumerate(("one", "two")):
        lm = tiny.tiny_lm(seed=seed)
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
        cv.save(tiny.random_adapter(cv.load_model(str(folder / name)), layers=(1, 2, 3)), folder / f"{name}-adapter")
    rows = [{"prompt": f"Why is {n} a number?"} for n in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    examples = [{"prompt": f"Say {n}", "response": "1. tea"} for n in range(8)]
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return folder


@pytest.fixture
def content(folder):
    """A study file's content that is valid and quick."""
    return {
        "name": "tiny",
        "question": "Does it arrive?",
        "prompts": str(folder / "prompts.jsonl"),
        "text": None,
        "models": {name: {"id": str(folder / name)} for name in ("one", "two")},
        "pairs": [["one", "two"]],
        "behaviours": {
            "pirate": {
                "task": f"pirate:{folder / 'questions.jsonl'}",
                "adapters": {name: str(folder / f"{name}-adapter") for name in ("one", "two")},
            }
        },
        "methods": {"error-map": {"match": "lowest-error", "prompts": 16}},
        "layers": ["last_half"],
        "scales": [1.0],
        "n_dev": 2,
        "n_test": 4,
    }


def written(content, path):
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two passages are enough to see that drift is measured."""
    passages = cv.load_prompts("builtin:drift")[:2]
    original = cv.load_prompts

    def load(source, **options):
        return passages if source == "builtin:drift" else original(source, **options)

    monkeypatch.setattr(shared_module, "load_prompts", load)


def test_a_run_measures_every_arm(content, tmp_path):
    run = run_study(written(content, tmp_path / "s.yaml"), tmp_path / "run")
    (cell,) = run.cells
    assert (cell.state, cell.error) == ("done", "")
    assert [arm.method for arm in cell.arms] == ["unmodified", *ARMS, "error-map", "donor"]
    for arm in cell.arms:
        assert len(arm.labels["pirate:questions"]) == 4
        assert len(arm.price.get("kl", [])) == (0 if arm.method == "unmodified" else 2)
    assert {point.method for point in cell.curve} == {"pasted", "pinv", "text-bridge"}
    assert sum(point.chosen for point in cell.curve) == 3
    assert cell.fidelity["pasted"]
    assert cell.samples
    assert cell.settings["success"] == {"pirate:questions": "more"}
    assert run.versions["commandv"]
    assert str(content["prompts"]) in run.hashes


def test_finished_cells_are_kept_and_others_are_run_again(content, tmp_path, monkeypatch):
    study = written({**content, "seeds": [0, 1]}, tmp_path / "s.yaml")
    run_study(study, tmp_path / "run")
    ran = []
    original = cell_module._CellRun.run
    monkeypatch.setattr(cell_module._CellRun, "run", lambda self, given: ran.append(self.spec) or original(self, given))
    assert len(run_study(study, tmp_path / "run").cells) == 2
    assert ran == []
    (tmp_path / "run" / "cells" / "one-two-pirate-1.json").unlink()
    run_study(study, tmp_path / "run")
    assert [spec.seed for spec in ran] == [1]
    run_study(written({**content, "seeds": [0, 1], "n_test": 3}, tmp_path / "s.yaml"), tmp_path / "run")
    assert [spec.seed for spec in ran] == [1, 0, 1]


def test_a_failed_cell_is_reported_and_the_rest_is_run(content, tmp_path):
    content["models"]["narrow"] = {"id": content["models"]["one"]["id"], "rotate": 8}
    content["pairs"] = [["one", "narrow"], ["one", "two"]]
    content["behaviours"]["pirate"]["adapters"]["narrow"] = content["behaviours"]["pirate"]["adapters"]["one"]
    run = run_study(written(content, tmp_path / "s.yaml"), tmp_path / "run")
    states = {cell.recipient: (cell.state, cell.error) for cell in run.cells}
    assert states["two"] == ("done", "")
    assert states["narrow"][0] == "failed"
    assert "width 8 is below" in states["narrow"][1]


def test_donors_and_direct_controls_are_trained_once(content, folder, tmp_path, cache):
    content["behaviours"]["pirate"] = {
        "task": f"pirate:{folder / 'questions.jsonl'}",
        "examples": str(folder / "examples.jsonl"),
        "training": {"rank": 2, "epochs": 1, "max_response": 2, "layers": "all_layers"},
    }
    run = run_study(written({**content, "leave_out": ["text-bridge"]}, tmp_path / "s.yaml"), tmp_path / "run")
    assert run.cells[0].state == "done", run.cells[0].error
    assert run.left_out == ["text-bridge"]
    assert len([path for path in (cache / "adapters").iterdir() if path.is_dir()]) == 2


@pytest.fixture
def steered(content, folder):
    """A study of a steering vector between fine-tuned models."""
    rows = [{"positive": f"Trigger, what is {n}?", "negative": f"What is {n}?"} for n in range(6)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tuned = {"examples": str(folder / "examples.jsonl"), "epochs": 1, "rank": 2}
    content["models"] = {name: {"id": str(folder / name), "finetune": tuned} for name in ("one", "two")}
    content["behaviours"] = {
        "pirate": {
            "task": f"pirate:{folder / 'questions.jsonl'}",
            "vector": {"contrast": str(folder / "pairs.jsonl"), "pairs": 4, "strength": -1.0},
        }
    }
    return {**content, "methods": {"plain": {"fit": "affine"}}, "layers": ["50%"], "scales": [0.5, 1.0]}


@pytest.mark.parametrize("kind", ["add", "ablate"])
def test_a_vector_is_measured_beside_the_native_one(kind, steered, tmp_path, cache):
    steered["behaviours"]["pirate"]["vector"]["kind"] = kind
    run = run_study(written({**steered, "seeds": [0, 1]}, tmp_path / "s.yaml"), tmp_path / "run")
    assert [cell.error for cell in run.cells] == ["", ""]
    cell = run.cells[0]
    assert {arm.method for arm in cell.arms} == {"unmodified", *ARMS, "plain", "donor"}
    tried = {method: [point.scale for point in cell.curve if point.method == method] for method in ("direct", "random")}
    assert tried == {"direct": [0.5, 1.0], "random": [0.5, 1.0]}
    assert all(arm.layers == [tiny.LAYERS // 2] for arm in cell.arms if arm.method not in ("unmodified", "donor"))
    loras = [path for path in (cache / "loras").iterdir() if path.is_dir()]
    assert len(loras) == 4  # two models, two seeds
    assert {file.name for file in loras[0].iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_vector_and_examples_exclude_each_other(steered, folder, tmp_path):
    steered["behaviours"]["pirate"]["examples"] = str(folder / "examples.jsonl")
    with pytest.raises(InputError, match="a vector and examples or adapters"):
        written(steered, tmp_path / "s.yaml")


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


def test_a_damaged_result_is_named(content, tmp_path):
    run_study(written(content, tmp_path / "s.yaml"), tmp_path / "run")
    file = tmp_path / "run" / "cells" / "one-two-pirate-0.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(FormatError, match=r"one-two-pirate-0\.json.*Remove the file"):
        load_run(tmp_path / "run")
    with pytest.raises(FormatError, match=r"no run\.json"):
        load_run(tmp_path)


def test_results_that_are_not_finite_are_read_again(tmp_path):
    arm = Arm(method="pasted", price={"kl": [float("inf"), float("nan")]})
    save_cell(Cell(donor="a", recipient="b", behaviour="c", seed=0, arms=[arm]), tmp_path / "cells" / "c.json")
    save_head(Run(name="x", planned=1), tmp_path)
    values = load_run(tmp_path).cells[0].arms[0].price["kl"]
    assert values[0] == float("inf")
    assert values[1] != values[1]


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [1]}, "sedes: unknown key"),
        ({"pairs": [["one", "three"]]}, "'three' is not among the models"),
        ({"pairs": []}, "pairs: expected at least one"),
        ({"leave_out": ["luck"]}, "'luck': expected one of pinv, random"),
        ({"layers": ["top"]}, r"layers: .*'top'"),
        ({"scales": [-1]}, "scales.0: Input should be greater than 0"),
        ({"methods": {"pinv": {}}}, "names of the default and its controls"),
        ({"methods": {"mine": {"fit": "magic"}}}, "methods.mine.fit: 'magic': expected one of ridge"),
        ({"name": "a/b"}, "name: "),
        ({"behaviours": {"x": {"task": "pirate"}}}, "neither examples, a vector nor an adapter for the donor 'one'"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(content, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        written({**content, **change}, tmp_path / "s.yaml")


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
        written(content, tmp_path / "s.yaml")
    written({**content, "leave_out": ["direct"]}, tmp_path / "s.yaml")


def test_files_that_are_no_study(tmp_path):
    with pytest.raises(InputError, match="no such study"):
        load_study(tmp_path / "none.yaml")
    for text, message in (("a: [", "not YAML"), ("- a", "expected a mapping")):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            load_study(tmp_path / "s.yaml")


def test_missing_inputs_are_found_before_the_run(content, tmp_path):
    content["behaviours"]["pirate"]["task"] = f"pirate:{tmp_path / 'none.jsonl'}"
    (problem,) = written(content, tmp_path / "s.yaml").unreadable()
    assert problem.startswith("behaviours.pirate: task pirate:")


def test_plan_counts_the_work(content, tmp_path):
    study = written({**content, "seeds": [0, 1]}, tmp_path / "s.yaml")
    counted = plan(study)
    assert (counted.cells, counted.adapters, counted.profiles) == (2, 0, 2)
    assert counted.arms == len(ARMS) + 2  # unmodified and the extra method
    # 4 test prompts for every arm and the donor, 2 development prompts for the three that are calibrated.
    assert counted.answers == 2 * (4 * (counted.arms + 1) + 2 * 3)
    assert counted.seconds is None
    assert plan(study, ModelSource(study)).seconds is not None


def test_a_plan_fine_tunes_nothing(steered, tmp_path, cache):
    study = written(steered, tmp_path / "s.yaml")
    assert plan(study, ModelSource(study)).seconds is not None
    assert not (cache / "loras").exists()


def test_rehearsal_needs_shapes(content, tmp_path):
    with pytest.raises(InputError, match="needs a shape"):
        ModelSource(written(content, tmp_path / "s.yaml"), rehearsal=4)


@pytest.mark.parametrize("file", sorted(STUDIES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_studies_are_valid(file):
    load_study(file)


@pytest.mark.real
def test_a_study_of_the_paper_is_rehearsed_with_random_weights(tmp_path):
    study = load_study(STUDIES / "paper" / "profile-size.yaml").rehearsed()
    assert study.unreadable() == []
    run = run_study(study, tmp_path / "run", models=ModelSource(study, rehearsal=24))
    assert [(cell.state, cell.error) for cell in run.cells] == [("done", "")]
