"""The labelled answers that graders are validated on, and the page made from them."""

from __future__ import annotations

import functools
import json
import runpy

import pytest

from commandv.errors import FormatError
from places import ROOT


@functools.cache
def benchmark():
    return runpy.run_path(str(ROOT / "benchmarks" / "graders.py"))


@functools.cache
def labelled():
    results = ROOT / "benchmarks" / "results" / "graders"
    return {name: benchmark()["load_labels"](results / f"{name}.jsonl") for name in benchmark()["SETS"]}


def test_every_behaviour_is_checked_on_two_hundred_answers_of_every_arm():
    arms = {"unmodified", "pasted", "published", "random", "text-bridge", "direct", "few-shot"}
    for name, rows in labelled().items():
        assert len(rows) >= 200, name
        assert arms <= {row["arm"] for row in rows}, name
        assert {row["model"] for row in rows} == {"smollm2-135m-instruct", "gemma-3-270m"}
        halves = [row["half"] for row in rows]
        assert abs(halves.count("dev") - halves.count("test")) <= 1


def test_no_labelled_answer_is_to_a_harmful_request_or_a_test_prompt():
    from commandv.prompts.sets import builtin_names, load_prompts

    sets = [name for name in builtin_names("prompts", "behaviours") if name.endswith("-test") or "harmful" in name]
    away = {text for name in sets for text in load_prompts(f"builtin:{name}").texts}
    assert not away & {row["prompt"] for rows in labelled().values() for row in rows}


def rows_of(n=2):
    labels = {"shows": 1, "loops": 0, "readable": 1}
    header = {"version": 1, "set": "x", "n": n, "definitions": {"shows": "It shows."}}
    return [header, *({"half": "dev", "model": "m", "arm": "a", "prompt": f"q{i}", "answer": "", "labels": labels}
                      for i in range(n))]  # fmt: skip


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_whole_file_is_read(tmp_path):
    assert len(benchmark()["load_labels"](written(tmp_path / "x.jsonl", rows_of()))) == 2


def spoil(change):
    rows = rows_of()
    change(rows)
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of()[:-1], "1 labelled answers, its header says 2"),
        (spoil(lambda rows: rows[0].update(version=2)), "labels of version 2, expected 1"),
        (spoil(lambda rows: rows.pop(0)), "labels of version None"),
        (spoil(lambda rows: rows[2].update(prompt="q0")), r"line 3: \('m', 'a', 'q0'\) is labelled twice"),
        (spoil(lambda rows: rows[1].update(labels={"loops": 0, "readable": 1})), "line 2: .*expected a half"),
        (spoil(lambda rows: rows[1].update(labels={"shows": 2, "loops": 0, "readable": 1})), "line 2: .*0 or 1"),
        (spoil(lambda rows: rows[1].update(half="train")), "line 2: half 'train'"),
        ([], "not a file of labels"),
    ],
)
def test_spoilt_files_are_refused(tmp_path, rows, message):
    with pytest.raises(FormatError, match=message):
        benchmark()["load_labels"](written(tmp_path / "x.jsonl", rows))
