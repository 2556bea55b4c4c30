"""`evaluate`: one model, one adapter, one task, several judges; and the verbs that measure, end to end."""

from __future__ import annotations

import json

import pytest

import commandv as cv
import tiny
from commandv import cli
from commandv.errors import FormatError
from commandv.evaluation import session
from commandv.evaluation.price import MEASURES
from commandv.evaluation.session import ADAPTED, UNMODIFIED, evaluate

ROWS = [{"prompt": f"What is {n} and {m}?", "split": "dev" if m == 0 else "test"} for n in range(4) for m in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    lm = tiny.tiny_lm()
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    loaded = cv.load_model(str(folder / "model"))
    cv.save(tiny.random_adapter(loaded, layers=(1, 2)), folder / "adapter")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


@pytest.fixture
def lm(folder):
    return cv.load_model(str(folder / "model"))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    passages = cv.load_prompts("builtin:drift")[:2]
    monkeypatch.setattr("commandv.evaluation.meter.load_prompts", lambda source: passages)


def test_labels_go_into_a_directory_that_holds_other_files_and_replace_labels_only(lm, folder, tmp_path, monkeypatch):
    task = f"refusal:{folder / 'rows.jsonl'}"
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        evaluate(lm, task, judges=["gcg"], out=tmp_path)
    labels = tmp_path / "unmodified-gcg.jsonl"
    assert labels.exists()
    labels.write_text("not labels")
    monkeypatch.setattr(session, "Meter", None)  # nothing is generated
    with pytest.raises(FormatError, match=r"unmodified-gcg\.jsonl.*choose another place"):
        evaluate(lm, task, judges=["gcg"], out=tmp_path)
    assert labels.read_text() == "not labels"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(FormatError, match="expected a directory"):
        evaluate(lm, task, judges=["gcg"], out=tmp_path / "notes.txt")


def test_arms_price_and_notes(lm, folder):
    task = f"over-refusal:{folder / 'rows.jsonl'}"
    found = evaluate(lm, task, cv.load_adapter(folder / "adapter"))
    (rows,) = found.rows.values()
    assert [row.method for row in rows] == [UNMODIFIED, ADAPTED, "random"]
    assert rows[0].score.n == 4
    assert rows[1].adjusted is not None
    assert set(found.price[ADAPTED]) == set(MEASURES)
    assert set(found.price[UNMODIFIED]) == {"perplexity_first", "perplexity_after"}  # nothing to differ from
    assert {arm: score.n for arm, score in found.loops.items()} == {UNMODIFIED: 4, ADAPTED: 4, "random": 4}
    assert set(found.words) == set(found.loops)
    assert found.as_dict()["loops"][UNMODIFIED]["name"] == "loops"
    assert "text-bridge" in found.notes[0]
    assert json.dumps(found.as_dict())


def test_without_an_adapter_only_the_model_is_measured(lm, folder):
    found = evaluate(lm, f"pirate:{folder / 'rows.jsonl'}")
    assert [row.method for row in found.rows["pirate"]] == [UNMODIFIED]
    assert set(found.price) == {UNMODIFIED}


def test_leaving_controls_out_is_said(lm, folder):
    found = evaluate(lm, f"pirate:{folder / 'rows.jsonl'}", cv.load_adapter(folder / "adapter"), controls=False)
    assert [row.method for row in found.rows["pirate"]] == [UNMODIFIED, ADAPTED]
    assert found.notes == ["All controls were left out: without them a rate means little."]


def test_judges_label_the_same_answers_and_their_agreement_is_told(lm, folder, tmp_path):
    task = f"over-refusal:{folder / 'rows.jsonl'}"
    found = evaluate(lm, task, judges=["gcg", "arditi"], out=tmp_path)
    assert set(found.rows) == {"gcg", "arditi"}
    ((one, other, value, n),) = found.agreement
    assert ({one, other}, n) == ({"gcg", "arditi"}, 4)
    assert value != value or -1 <= value <= 1
    files = {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in tmp_path.iterdir()}
    assert set(files) == {"unmodified-gcg.jsonl", "unmodified-arditi.jsonl"}
    texts = [[row["answer"] for row in rows] for rows in files.values()]
    assert texts[0] == texts[1]


def test_answers_that_may_be_harmful_are_never_written(lm, folder, tmp_path):
    found = evaluate(lm, f"refusal:{folder / 'rows.jsonl'}", judges=["gcg"], out=tmp_path)
    assert found.rows["gcg"][0].score.n == 4
    (file,) = tmp_path.iterdir()
    assert all("answer" not in json.loads(line) for line in file.read_text().splitlines())


# -- the verbs --------------------------------------------------------------------------------------------------------


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["commandv", *map(str, arguments)])
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr()


def test_evaluate_from_the_command_line(monkeypatch, capsys, folder):
    arguments = ("evaluate", folder / "model", f"pirate:{folder / 'rows.jsonl'}", "-a", folder / "adapter")
    code, printed = run(monkeypatch, capsys, *arguments, "--json")
    assert code == 0
    assert [row["method"] for row in json.loads(printed.out)["judges"]["pirate"]] == [UNMODIFIED, ADAPTED, "random"]
    code, printed = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "more is the aim" in " ".join(printed.out.split())
    assert "Left out" in printed.out
    code, printed = run(monkeypatch, capsys, "evaluate", folder / "model", "juggling")
    assert code == 2
    assert "juggling" in printed.err


def test_what_is_expected_in_words_is_a_task(monkeypatch, capsys, folder):
    asked = ("evaluate", folder / "model", "--expect", "the|a", "--n", 4, "--json")
    code, printed = run(monkeypatch, capsys, *asked)
    assert code == 0
    assert json.loads(printed.out)["task"] == "expect"
    code, printed = run(monkeypatch, capsys, "evaluate", folder / "model", "json", "--expect", "x")
    assert (code, "not both" in printed.err) == (2, True)
    code, printed = run(monkeypatch, capsys, "evaluate", folder / "model")
    assert (code, "--expect" in printed.err) == (2, True)


def test_study_and_report_from_the_command_line(monkeypatch, capsys, folder, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(f"""
name: tiny
prompts: {folder / "rows.jsonl"}
text: null
models: {{one: {{id: {folder / "model"}}}}}
pairs: [[one, one]]
behaviours: {{pirate: {{task: "pirate:{folder / "rows.jsonl"}", adapters: {{one: {folder / "adapter"}}}}}}}
layers: [all_layers]
scales: [1.0]
n_dev: 1
n_test: 2
""")
    code, printed = run(monkeypatch, capsys, "study", file, "--dry-run", "--json")
    assert code == 0
    assert json.loads(printed.out)["cells"] == 1
    assert not (tmp_path / "out").exists()
    code, printed = run(monkeypatch, capsys, "study", file, "-o", tmp_path / "out", "--json")
    assert (code, json.loads(printed.out)["failed"]) == (0, [])
    code, _ = run(monkeypatch, capsys, "report", tmp_path / "out")
    assert code == 0
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
    code, printed = run(monkeypatch, capsys, "report", tmp_path)
    assert code == cli.EXIT_CODES[FormatError]
    assert "no run.json" in printed.err


def test_a_failed_cell_is_told_by_the_exit_code(monkeypatch, capsys, folder, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(f"""
name: broken
prompts: {folder / "rows.jsonl"}
text: null
models: {{one: {{id: {folder / "model"}}}}}
pairs: [[one, one]]
behaviours: {{pirate: {{task: "pirate:{folder / "rows.jsonl"}", adapters: {{one: {folder / "nowhere"}}}}}}}
""")
    code, printed = run(monkeypatch, capsys, "study", file, "-o", tmp_path / "out", "--json")
    assert code == 1
    assert "nowhere" in json.loads(printed.out)["failed"][0]
