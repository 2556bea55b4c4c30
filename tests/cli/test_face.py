"""The face of the command line: help, options, tables, JSON."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from rich.console import Console
from typer.main import get_command

import command_files
import command_line
import commandv as cv
from command_line import Ran, fails
from commandv import cli, known
from commandv.adapters.adapter import Adapter
from commandv.adapters.kinds import steering_vector
from commandv.cli import words
from commandv.cli.options import show
from commandv.cli.tables import arms_table, fidelity_table
from commandv.evaluation import Comparison, Score
from commandv.evaluation.arms import ARMS, METHODS as TRANSFERRED
from commandv.models.identity import ModelRef
from commandv.steering.making import APPLICATIONS
from commandv.steering.methods import METHODS
from commandv.training.train import TRAINABLE
from commandv.transfer.convert.table import FITTERS
from commandv.transfer.distil.distil import METHODS as DISTILLED
from commandv.transfer.match import MATCHERS

models = command_files.models


run = command_line.run


def test_program_reports_an_error_without_a_traceback(models):
    """After loading a model, so that the libraries' own bars and notices would be seen."""
    command = [sys.executable, "-m", "commandv.cli", "generate", str(models["donor"]), "hi", "--template", "fancy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    fails(Ran(done.returncode, done.stdout, done.stderr), "--template", "fancy")


def test_json_has_no_nan(capsys):
    show({"r2": [1.5, float("nan"), float("inf")], "path": Path("a"), "name": "ünï"}, True)
    out = capsys.readouterr().out
    assert Ran(0, out, "").json == {"r2": [1.5, None, None], "path": "a", "name": "ünï"}


VERBS = (
    *("profile", "train", "paste", "generate", "inspect", "doctor", "demo", "push", "pull", "chat", "serve"),
    *("export", "steer", "evaluate", "study", "report", "demonstrate", "distil", "predict", "transfer", "tune"),
    "rehearse",
)


def test_help_loads_no_heavy_library():
    """Every verb's help, in one process; torch alone would take longer than the half second that help may take."""
    code = f"""
import sys
from commandv.cli import app
for verb in ([], *([name] for name in {VERBS!r})):
    try:
        app([*verb, "-h"])
    except SystemExit as stop:
        assert not stop.code, (verb, stop.code)
heavy = {{"torch", "transformers", "numpy", "scipy", "safetensors"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f" {verb} [OPTIONS]" in done.stdout


def test_the_tables_of_tasks_and_judges_are_read_without_torch():
    code = """
import sys
from commandv.evaluation import JUDGES, TASKS, load_judge, load_task
tasks = [load_task(name) for name, entry in TASKS.items() if not entry.needs_file]
judges = [load_judge(name) for name in ("refusal", "gcg", "endpoint:http://localhost#model")]
heavy = {"torch", "transformers", "scipy"} & set(sys.modules)
assert tasks and judges and not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_that_are_known_before_the_tables_are_imported_are_those_of_the_tables():
    for names, table in (
        (known.Kind, TRAINABLE),
        (known.Fitter, FITTERS),
        (known.Matcher, MATCHERS),
        (known.Direction, METHODS),
        (known.Application, APPLICATIONS),
        (known.Method, TRANSFERRED),
    ):
        assert set(get_args(names)) == set(table)
    assert {*get_args(known.Needed), *get_args(known.Spared)} == set(ARMS)
    assert set(get_args(get_type_hints(words.distil)["by"])) == {"auto", *DISTILLED}


def test_tables_fit_a_terminal_of_80_columns():
    score = Score("a", 0.25, 0.125, 0.5, 64, "rate")
    row = Comparison("within the recipient", score, score, 0.04, 0.04, score)
    price = {"within the recipient": {"kl_first": score, "kl_after": score}}
    fidelity = dict.fromkeys(("read_r2", "write_r2", "read_cosine", "write_cosine", "cycle_error"), -0.123)
    fidelity |= {"adapter_read_r2": -10.5, "adapter_write_r2": 0.5, "donor": 28, "recipient": 29, "n": 1030}
    for table in (
        arms_table("a task", [row], price=price, loops={row.method: score}, words={row.method: 31.5}),
        fidelity_table([fidelity]),
    ):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(table)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text


def test_every_verb_takes_json():
    commands = get_command(cli.app).commands
    assert set(commands) == set(VERBS)
    for name, command in commands.items():
        if name == "chat":  # a conversation
            continue
        assert any("--json" in parameter.opts for parameter in command.params), name


def test_adapter_without_a_stated_model_attaches_by_width(run, models, tmp_path):
    vector = Adapter({2: steering_vector(torch.ones(32))}, ModelRef(d_model=32))
    path = cv.save(vector, tmp_path / "v")
    arguments = ("generate", models["donor"], "hi", "--adapter", path, "--max-new-tokens", 2)
    assert run(*arguments, "--scale", 50).code == 0
    fails(run(*arguments, "--scale", "nan"), "scale")
