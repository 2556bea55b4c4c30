"""Files of tasks: their splits, and the outcomes that are written."""

from __future__ import annotations

import json
import math

import pytest

from commandv.errors import FormatError, InputError
from commandv.evaluation import Outcome, load_splits, load_task
from commandv.evaluation.outcomes import write_outcome
from commandv.prompts.sets import Prompt
from places import SHARED_DATA
from task_rows import rows_file

# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_without_splits_is_split_by_content_not_by_order(tmp_path):
    rows = [{"prompt": f"prompt {i}"} for i in range(30)]
    dev, test = load_splits(rows_file(tmp_path / "a.jsonl", rows))
    other, _ = load_splits(rows_file(tmp_path / "b.jsonl", rows[::-1]))
    assert (len(dev), len(test)) == (10, 20)
    assert set(dev.texts) == set(other.texts)
    assert dev.texts != [row["prompt"] for row in rows[:10]]
    twice, rest = load_splits(rows_file(tmp_path / "c.jsonl", rows + rows))
    assert (len(twice), len(rest)) == (20, 40)
    assert not set(twice.texts) & set(rest.texts)


@pytest.mark.parametrize(
    ("splits", "dev", "test"),
    [
        (["dev", "test", "test"], ["0"], ["1", "2"]),
        (["validation", "test", "train"], ["0"], ["1"]),
        (["train", "test", "train"], ["0", "2"], ["1"]),
    ],
)
def test_splits_that_a_file_names(tmp_path, splits, dev, test):
    path = rows_file(tmp_path / "a.jsonl", [{"prompt": str(i), "split": split} for i, split in enumerate(splits)])
    found = load_splits(path)
    assert [one.texts for one in found] == [dev, test]


def test_rows_with_another_label_are_left_out(tmp_path):
    rows = [{"prompt": str(i), "label": "safe" if i % 2 else "unsafe"} for i in range(8)]
    path = rows_file(tmp_path / "x.jsonl", rows)
    harmful, benign = load_task(f"refusal:{path}"), load_task(f"over-refusal:{path}")
    assert sorted(harmful.dev.texts + harmful.test.texts) == ["0", "2", "4", "6"]
    assert sorted(benign.dev.texts + benign.test.texts) == ["1", "3", "5", "7"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"prompt": "a", "answer": "1"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('{"prompt": "a", "answer": "1"}\n{"promt": "b"}\n', "line 2: no column prompt"),
        ('{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n', "line 2: no answer to compare with"),
        ('{"prompt": "a", "answer": true}\n', "line 1: the response is bool"),
        ('{"prompt": "a", "answer": "1", "split": "later"}\n', "line 1: split 'later'; expected 'dev' or 'test'"),
        (
            '{"prompt": "a", "answer": 1, "split": "dev"}\n{"prompt": "b", "answer": 1}\n',
            "line 2: some rows have a spl",
        ),
        ('{"prompt": "a", "answer": 0, "split": "dev"}\n', "1 dev and 0 test prompts"),
        ('{"prompt": "a", "answer": 0}\n', "1 dev and 0 test prompts"),
        (
            '{"prompt": "a", "answer": 0, "split": "dev"}\n{"prompt": "a", "answer": 0, "split": "test"}\n',
            "both splits",
        ),
    ],
)
def test_malformed_task_files(tmp_path, content, message):
    path = tmp_path / "task.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_task(f"exact:{path}")
    assert "task" in str(caught.value)


def test_targets_and_numbers_are_references(tmp_path):
    rows = [{"input": "1 + 1", "target": "2"}, {"question": "0 + 0", "answer": 0}, {"prompt": "x", "response": "y"}]
    dev, test = load_splits(rows_file(tmp_path / "a.jsonl", rows), reference=True)
    assert {prompt.text: prompt.response for prompt in (*dev, *test)} == {"1 + 1": "2", "0 + 0": "0", "x": "y"}


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("spec", "n_dev", "n_test"),
    [
        ("exact:bbh_commandv_tasks.jsonl", 166, 334),
        ("exact:gsm8k_test_dev_300.jsonl", 100, 200),
        ("refusal:advbench_shared.jsonl", 320, 163),
        ("over-refusal:xstest_shared.jsonl", 41, 82),
    ],
)
def test_public_files_are_tasks(spec, n_dev, n_test):
    name, _, file = spec.partition(":")
    task = load_task(f"{name}:{SHARED_DATA / file}")
    assert (len(task.dev), len(task.test)) == (n_dev, n_test)


# -- written outcomes -------------------------------------------------------------------------------------------------


def test_no_judgment_is_written_as_null(tmp_path):
    task = load_task("length")
    outcome = Outcome("length", "arm ü", "words", (2.0, math.nan), (False, True), ("a b", "\u2028"))
    write_outcome(outcome, task, tmp_path / "deep" / "out.jsonl")
    lines = (tmp_path / "deep" / "out.jsonl").read_text("utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    assert [row["label"] for row in rows] == [2.0, None]
    assert (rows[1]["loops"], rows[1]["answer"]) == (True, "\u2028")
    assert rows[0] == {
        "task": "length",
        "arm": "arm ü",
        "split": "test",
        "prompt": task.test.texts[0],
        "response": "",
        "category": "",
        "unit": "words",
        "label": 2.0,
        "loops": False,
        "answer": "a b",
    }


def test_an_outcome_of_another_task_is_refused(tmp_path):
    task = load_task("length")
    with pytest.raises(InputError, match="an outcome of json with 1 labels; expected length"):
        write_outcome(Outcome("json", "arm", "rate", (1.0,), (False,)), task, tmp_path / "out.jsonl")
    with pytest.raises(InputError, match=r"with 65 labels; expected length with at most 64 \(dev\)"):
        write_outcome(
            Outcome("length", "arm", "words", (1.0,) * 65, (False,) * 65), task, tmp_path / "out.jsonl", split="dev"
        )
    assert not (tmp_path / "out.jsonl").exists()


def test_an_outcome_of_every_prompt_is_written_and_replaces_one(tmp_path):
    task, place = load_task("length"), tmp_path / "out.jsonl"
    n = len(task.test)
    for label in (1.0, 2.0):
        write_outcome(Outcome("length", "arm", "words", (label,) * n, (False,) * n), task, place)
        assert [json.loads(line)["label"] for line in place.read_text("utf-8").splitlines()] == [label] * n


@pytest.mark.parametrize("first", ['{"prompt": "Mine?", "label": 1}', "[1]", "3", "not JSON"])
def test_what_is_no_outcome_is_not_replaced(tmp_path, first):
    task, place = load_task("length"), tmp_path / "mine.jsonl"
    place.write_text(first + "\n")
    with pytest.raises(FormatError, match="no outcome of a task, so it is not replaced"):
        write_outcome(Outcome("length", "arm", "words", (1.0,), (False,)), task, place)
    assert place.read_text() == first + "\n"


def test_an_echo_of_the_question_is_no_result():
    judge = load_task("arithmetic").judge
    prompts = [Prompt("What is -3 * 0 + -5?", "-5")] * 3
    assert judge(prompts, ["-3 * 0 + -5 is a sum.", "-3 * 0 + -5 = -5", "0 + -5 = -5"]) == [0.0, 1.0, 1.0]
    said = [
        "-3 * 0 + -5 = -5, as known since 1900",
        "-3 * 0 + -5 = 2 or -3 * 0 + -5 = -5, and nobody here knows which of them is right",
        "It is -5",
    ]
    assert judge(prompts, said) == [1.0, 0.0, 1.0]
