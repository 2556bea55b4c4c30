"""`commandv transfer` and `tune` on tiny twins in local directories."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import filelock
import pytest

import command_line
import commandv as cv
import tiny
import twin
from command_line import fails
from commandv.storage.files import LOCK

run = command_line.run
HERE = ("--dtype", "float32", "--template", "plain")
SMALL = ("--by", "activations", "--layers", "last_third", "--scales", 1.0, "--budget", 9, "--n-dev", 8, "--n-test", 16)
WORDS = ("river", "fox", "tea", "door", "tree", "yes", "cat", "letter", "garden", "water", "city", "quick")
BEGINS = "th"  # one token of the tiny vocabulary


def lines(n: int) -> str:
    return "\n".join(f"{WORDS[(n + i) % 12]} {WORDS[(5 * n + i * i) % 12]} {n + i}" for i in range(6))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two models, the donor's adapter, questions with what is expected of the answers, prompts of profiles."""
    folder = tmp_path_factory.mktemp("transfer")
    donor = tiny.tiny_lm(seed=3, template="plain")
    for name, lm in (("donor", donor), ("recipient", twin.twin_of(donor, noise=0.02))):
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
    donor = cv.load_model(folder / "donor", dtype="float32", template="plain")
    token = donor.tokenizer.encode(BEGINS, add_special_tokens=False)[0]
    cv.save(twin.saying(donor, token), folder / "adapter")
    rows = [{"prompt": f"What is {n} and {m}?", "expect": f"^{BEGINS}"} for n in range(8) for m in range(8)]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.txt").write_text("\n".join(row["prompt"] for row in rows))
    return folder


@pytest.fixture
def brief(monkeypatch):
    """Short answers; profiles and prices from few passages."""
    passages = cv.PromptSet(tuple(cv.Prompt(f"Say {n}", lines(n)) for n in range(40)), "passages")
    load = cv.load_prompts
    few = {"builtin:text": passages, "builtin:drift": passages[:3], "builtin:general": passages}
    for place in ("transferring.job", "tuning", "meter", "catalogue"):
        module = importlib.import_module(f"commandv.evaluation.{place}")
        monkeypatch.setattr(
            module, "load_prompts", lambda source, **how: few[source] if source in few else load(source, **how)
        )
    monkeypatch.setattr("commandv.evaluation.material.ANSWER_TOKENS", 4)
    monkeypatch.setattr("commandv.transfer.distil.demonstrate.loops", lambda text: False)


def pair(made: Path) -> tuple[Path, Path, Path]:
    return made / "donor", made / "adapter", made / "recipient"


def test_one_command_carries_measures_and_certifies(run, made, tmp_path, brief):
    ran = run("transfer", *pair(made), "--expect-file", made / "task.jsonl", "--prompts", made / "prompts.txt",
              *SMALL, *HERE, "-o", tmp_path / "out", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    told = ran.json
    assert told["arrived"]
    assert told["verdict"] == "crosses"
    assert "commandv transfer" in told["command"]
    kept = cv.load_adapter(tmp_path / "out")
    assert kept.provenance["certificate"]["sentence"] == told["sentence"]
    shown = run("inspect", tmp_path / "out")
    assert told["sentence"][:40] in shown.out
    assert run("inspect", tmp_path / "out", "--json").json["certificate"]["verdict"] == "crosses"
    again = run("transfer", *pair(made), "--expect-file", made / "task.jsonl", "--prompts", made / "prompts.txt",
                *SMALL, *HERE, "-o", tmp_path / "out")  # fmt: skip
    for words in ("in all", "random-in-span", "before:", "after:", told["sentence"][:40], "commandv generate"):
        assert words in again.out, words


def test_a_dry_run_says_what_and_how_long(run, made, tmp_path, brief):
    ran = run("transfer", *pair(made), "--expect", "^x", *SMALL, *HERE, "-o", tmp_path / "out", "--dry-run", "--json")
    told = ran.json
    assert {"profiles", "fit: activations", "tune: activations", "test prompts"} <= {
        one["name"] for one in told["stages"]
    }
    assert told["seconds"] == pytest.approx(sum(one["seconds"] for one in told["stages"]), abs=0.5)
    assert not (tmp_path / "out").exists()


def test_layers_and_scale_of_an_adapter_are_chosen_on_its_own_model(run, made, tmp_path, brief):
    ran = run("tune", made / "adapter", made / "donor", f"expect:{made / 'task.jsonl'}", "--limit", 8, "--scales", 0.05,
              "--scales", 1.0, "--budget", 9, *HERE, "-o", tmp_path / "out", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    told = ran.json
    assert told["value"] == max(one["value"] for one in told["tried"]) == 1.0
    assert told["unmodified"] == 0.0
    own, tuned = cv.load_adapter(made / "adapter"), cv.load_adapter(tmp_path / "out")
    assert tuned.interventions[3][0].write_norm == pytest.approx(own.interventions[3][0].write_norm * told["scale"])
    assert tuned.provenance["tuned"]["within_budget"]
    table = run("tune", made / "adapter", made / "donor", f"expect:{made / 'task.jsonl'}", "--limit", 8, "--scales",
                1.0, "--budget", 9, *HERE, "-o", tmp_path / "out")  # fmt: skip
    assert "chosen" in table.out


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--task", "numbered-lst"), ("numbered-list",)),
        (("--expect", "("), ("no regular expression",)),
        (("--task", "json", "--expect", "x"), ("not both",)),
        (("--by", "magic"), ("expected auto", "activations")),
        (("--scales", "0"), ("scales above 0",)),
        (("--judge", "nobody"), ("expected",)),
    ],
)
def test_what_can_be_checked_is_checked_before_a_model_is_loaded(run, made, tmp_path, monkeypatch, given, words):
    monkeypatch.setattr(cv, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    fails(run("transfer", *pair(made), *given, "-o", tmp_path / "out"), *words)


def test_a_directory_that_holds_something_else_is_left_alone(run, made, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fails(run("transfer", *pair(made), "--task", "json", "-o", tmp_path), "notes.txt", "choose another place")


def test_a_place_that_another_transfer_writes_is_refused_at_once(run, made, tmp_path, monkeypatch):
    monkeypatch.setattr(cv, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / LOCK):
        ran = run("transfer", *pair(made), "--task", "json", "-o", tmp_path / "out")
    fails(ran, "another process is writing there", "choose another directory", code=2)


def test_an_adapter_of_another_width_is_refused(run, made, tmp_path):
    lm = tiny.tiny_lm(hidden_size=16, id="narrow")
    cv.save(tiny.random_adapter(lm), tmp_path / "narrow")
    fails(run("transfer", made / "donor", tmp_path / "narrow", made / "recipient", "--task", "json", *HERE, "-o",
              tmp_path / "out"), "width 16")  # fmt: skip


def test_the_donor_itself_is_no_recipient(run, made, tmp_path):
    fails(run("transfer", made / "donor", made / "adapter", made / "donor", "--task", "json", *HERE, "-o",
              tmp_path / "out"), "the same model")  # fmt: skip
