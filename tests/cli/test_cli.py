"""The command line from end to end, on tiny models in local directories."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from rich.console import Console
from typer.main import get_command

import command_line
import commandv as cv
import tiny
from command_line import Ran, fails
from commandv import cli
from commandv.adapters.adapter import Adapter
from commandv.adapters.kinds import steering_vector
from commandv.cli import checks, core, inspection, steering, words
from commandv.cli.options import show
from commandv.cli.tables import arms_table, fidelity_table
from commandv.errors import StorageError
from commandv.evaluation import Comparison, Score
from commandv.evaluation.arms import METHODS as TRANSFERRED
from commandv.models.identity import ModelRef
from commandv.steering.making import APPLICATIONS
from commandv.steering.methods import METHODS
from commandv.training.train import TRAINABLE
from commandv.transfer.convert.table import FITTERS
from commandv.transfer.distil.distil import METHODS as DISTILLED
from commandv.transfer.match import MATCHERS
from stored import data_file

PROMPTS = [
    f"{form} {thing}?" for form in ("What is", "Why is there", "How good is") for thing in ("tea", "a fox", "it")
]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Boil fresh water\nand steep the leaves, then read a book."]

run = command_line.run


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two models of different families, widths and depths in directories."""
    made = {}
    for name, arch, settings in (
        ("donor", "llama", {}),
        ("recipient", "gpt2", {"n_embd": 48, "n_layer": 6}),
    ):
        path = tmp_path_factory.mktemp("models") / name
        tiny.tiny_model(arch, seed=len(name), **settings).save_pretrained(path)
        tiny.tiny_tokenizer(chat=name == "donor").save_pretrained(path)
        made[name] = path
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A prompt file, passages, and examples to train on."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text.replace(" ", "\n")}) + "\n" for text in TEXTS))
    rows = [json.dumps({"prompt": prompt, "response": "yes"}) for prompt in PROMPTS]
    (folder / "agree.jsonl").write_text("\n".join(rows))
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(models, files, tmp_path_factory) -> Path:
    """An adapter of the donor on all its layers."""
    lm = cv.load_model(models["donor"], dtype="float32")
    settings = cv.TrainSettings(epochs=1, batch_size=4, held_out=0)
    kind = cv.DiReFT(rank=2, layers="all_layers")
    adapter = cv.train(lm, cv.load_prompts(files["agree"]), kind, settings, name="agree")
    return cv.save(adapter, tmp_path_factory.mktemp("trained") / "adapter")


# -- the whole way ----------------------------------------------------------------------------------------------------


def test_from_training_to_pasted_answers(run, models, files, tmp_path):
    out = {name: tmp_path / name for name in ("donor", "recipient", "adapter", "pasted")}
    for name in ("donor", "recipient"):
        facts = run(
            *("profile", models[name], "--prompts", files["prompts"], "--text", files["texts"]),
            *("--out", out[name], "--dtype", "float32", "--json"),
        ).json
        assert facts["profile"] == str(out[name])
        assert facts["rows"] > len(PROMPTS)
        assert (facts["d_model"], facts["layers"]) == ((32, 4) if name == "donor" else (48, 6))
        described = run("inspect", out[name], "--json").json
        assert described["what"] == "commandv-profile"
        assert described["d_model"] == facts["d_model"]
        assert described["end_rows"] >= len(PROMPTS)
        assert described["text_rows"] == facts["rows"] - described["end_rows"] > 0

    trained = run(
        *("train", models["donor"], files["agree"], "-o", out["adapter"], "--rank", 2, "--layers", "1,3"),
        *("--positions", "l2", "--kind", "nodireft", "--epochs", 1, "--batch-size", 4, "--dtype", "float32", "--json"),
    ).json
    assert len(trained["held_out_loss"]) == 2
    described = run("inspect", out["adapter"], "--json").json
    assert described["layers"] == [1, 3]
    assert described["name"] == "agree"
    assert described["made_by"] == "train"
    assert described["parameters"] == trained["parameters"] == 2 * (2 * 32 * 2 + 2)
    assert {(one["rank"], one["positions"]) for one in described["interventions"]} == {(2, "l2")}

    pasted = run(
        *("paste", out["adapter"], out["donor"], out["recipient"], "-o", out["pasted"]),
        *("--layers", "all_layers", "--match", "1:2,3:5", "--no-fidelity", "--scale", 0.5, "--json"),
    ).json
    assert pasted["layers"] == [2, 5]
    adapter = cv.load_adapter(out["pasted"])
    assert adapter.provenance["scale"] == 0.5
    assert adapter.d_model == 48

    arguments = ("generate", models["recipient"], *PROMPTS[:2], "--max-new-tokens", 5, "--dtype", "float32")
    plain = run(*arguments, "--json").json["answers"]
    steered = run(*arguments, "--adapter", out["pasted"], "--scale", 1e5, "--json").json["answers"]
    assert [row["prompt"] for row in plain] == [row["prompt"] for row in steered] == PROMPTS[:2]
    lm = cv.load_model(models["recipient"], dtype="float32")
    assert [row["answer"] for row in plain] == cv.generate(lm, PROMPTS[:2], max_new_tokens=5)
    assert [row["answer"] for row in plain] != [row["answer"] for row in steered]
    with cv.attach(lm, adapter, scale=1e5):
        assert [row["answer"] for row in steered] == cv.generate(lm, PROMPTS[:2], max_new_tokens=5)


def test_paste_tells_fidelity_and_takes_every_fitter(run, models, trained, tmp_path):
    prompts = tmp_path / "many.txt"
    prompts.write_text("\n".join(f"{prompt} And {n}?" for n in range(9) for prompt in PROMPTS))
    for name in models:
        arguments = ("--prompts", prompts, "--no-text", "--out", tmp_path / name, "--dtype", "float32")
        assert run("profile", models[name], *arguments).code == 0
    for fit in ("ridge", "pinv", "affine", "reduced-rank", "procrustes"):
        ran = run("paste", trained, tmp_path / "donor", tmp_path / "recipient", "-o", tmp_path / fit, "--fit", fit)
        assert ran.code == 0, ran.err
        assert "3 -> 4" in ran.out
        assert cv.load_adapter(tmp_path / fit).provenance["link"]["fit"]["name"] == fit
    again = run("paste", trained, tmp_path / "donor", tmp_path / "recipient", "-o", tmp_path / "ridge", "--json").json
    assert [(row["donor"], row["recipient"]) for row in again["fidelity"]] == [(3, 4)]
    assert again["fidelity"][0]["n"] > 0
    assert -100 < again["fidelity"][0]["read_r2"] <= 1


def test_profile_goes_to_the_cache_and_comes_from_there(run, models, files, cache):
    arguments = ("profile", models["donor"], "--prompts", files["prompts"], "--no-text", "--limit", 4, "--json")
    first = run(*arguments).json
    assert first["rows"] == 4
    assert Path(first["profile"]).is_relative_to(cache)
    stamp = (Path(first["profile"]) / "config.json").stat().st_mtime_ns
    assert run(*arguments).json == first
    assert (Path(first["profile"]) / "config.json").stat().st_mtime_ns == stamp


def test_profile_joins_prompt_sets_and_mixes_their_forms(run, models, tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("Where is Paris?\nWho is Ann?\n")
    second.write_text("What is Tea?\n")
    arguments = ("--prompts", first, "--prompts", second, "--no-text", "--mixed-forms", "--json")
    found = cv.load_profile(run("profile", models["donor"], *arguments).json["profile"])
    wanted = ["Where is Paris?", "Who is Ann", "what is tea"]
    expected = cv.profile(cv.load_model(models["donor"]), wanted, text=None)
    assert found.prompts == expected.prompts
    assert torch.equal(found.layer(0), expected.layer(0))


def test_train_resumes_and_reports_plain_text(run, models, files, tmp_path, monkeypatch):
    arguments = ("train", models["donor"], files["agree"], "--rank", 1, "--epochs", 2, "--dtype", "float32")
    assert run(*arguments, "-o", tmp_path / "whole").code == 0
    original, steps = torch.optim.Adam.step, []

    def cut(self):
        steps.append(1)
        if len(steps) == 2:  # in the second epoch, which has one step
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(torch.optim.Adam, "step", cut)
    checkpoint = ("-o", tmp_path / "resumed", "--checkpoint", tmp_path / "checkpoint")
    stopped = run(*arguments, *checkpoint)
    assert stopped.code not in (0, 2)
    assert "Traceback" not in stopped.err
    assert not (tmp_path / "resumed").exists()
    ran = run(*arguments, *checkpoint)
    assert ran.code == 0
    assert f"adapter        {tmp_path / 'resumed'}" in ran.out
    one, two = (data_file(tmp_path / name).read_bytes() for name in ("whole", "resumed"))
    assert one == two


def test_generate_reads_prompt_files_and_prints_brackets_as_they_are(run, models, tmp_path):
    (tmp_path / "p.txt").write_text("What is [bold]tea[/bold]?\nWhy [/x]?\n")
    ran = run("generate", models["donor"], "--prompts", tmp_path / "p.txt", "--max-new-tokens", 2)
    assert ran.code == 0
    assert "What is [bold]tea[/bold]?" in ran.out
    assert "Why [/x]?" in ran.out


# -- inspect and doctor -----------------------------------------------------------------------------------------------


def test_inspect_tells_what_vectors_are(run, tmp_path):
    torch.save(torch.ones(6), tmp_path / "one.pt")
    torch.save(torch.ones(3, 6), tmp_path / "stack.pt")
    assert run("inspect", tmp_path / "stack.pt", "--json").json["layers"] == [0, 1, 2]
    one = run("inspect", tmp_path / "one.pt", "--layer", 4, "--json").json
    assert (one["what"], one["layers"], one["model"]) == ("vector", [4], "not stated")
    fails(run("inspect", tmp_path / "one.pt"), "one.pt", "say where it acts", "layer")
    plain = run("inspect", tmp_path / "stack.pt")
    assert plain.code == 0
    assert "[0, 1, 2]" in plain.out


def test_doctor_lists_what_it_checked_and_its_exit_code_says_whether_all_is_well(run, cache, monkeypatch):
    names = ["commandv", "python", "torch", "transformers", "safetensors", "device", "cache", "gemma-3-270m"]
    ran = run("doctor", "--json")
    checks = ran.json["checks"]
    assert [one["name"] for one in checks][: len(names)] == names
    assert ran.code == int(not all(one["ok"] for one in checks))
    assert str(cache) in next(one["found"] for one in checks if one["name"] == "cache")
    monkeypatch.setattr(inspection, "NEEDED_GB", 1e9)
    ran = run("doctor", "--json")
    assert ran.code == 1
    short = next(one for one in ran.json["checks"] if one["name"] == "cache")
    assert (short["ok"], "COMMANDV_CACHE" in short["remedy"]) == (False, True)
    assert "FAIL" in run("doctor").out


def test_doctor_names_a_cache_that_cannot_be_written(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COMMANDV_CACHE", str(tmp_path / "file" / "cache"))
    ran = run("doctor", "--json")
    assert ran.code == 1
    assert "cache" in [one["name"] for one in ran.json["checks"] if not one["ok"]]


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors_are_one_line(run, models, files, trained, tmp_path):
    model, out = models["donor"], ("-o", tmp_path / "out")
    fails(run("inspect", tmp_path / "nowhere"), "nowhere", "no such file")
    fails(run("inspect", "builtin:juggling@nobody"), "builtin:juggling@nobody", "no such adapter")
    fails(run("generate", model, "hi", "--adapter", "builtin:juggling@nobody"), "no such adapter")
    fails(run("generate", model), "give prompts")
    fails(run("generate", model, "hi", "--prompts", files["prompts"]), "one of the two")
    fails(run("generate", model, "hi", "--template", "fancy"), "--template", "fancy", "plain")
    fails(run("generate", model, "hi", "--dtype", "int7"), "int7", "float32")
    fails(run("generate", model, " "), "empty")
    fails(run("generate", models["recipient"], "hi", "--template", "chat"), "no chat template", "plain")
    fails(run("generate", models["recipient"], "hi", "--adapter", trained), "width", "paste")
    fails(run("generate", model, "hi", "--prompts", tmp_path / "no.txt"), "no.txt: no such file")
    fails(run("profile", model, "--prompts", tmp_path / "no.txt"), "no.txt: no such file")
    fails(run("profile", tmp_path / "nomodel"), "nomodel", "no such file", code=3)
    fails(run("profile", "nobody/no-such-model"), "nobody/no-such-model", "cannot be loaded")
    fails(run("train", model, files["agree"], *out, "--kind", "magic"), "'magic'", "direft")
    fails(run("train", model, files["agree"], *out, "--layers", "9"), "[9]", "0 .. 3")
    fails(run("train", model, files["agree"], *out, "--positions", "z1"), "'z1'")
    fails(run("train", model, files["prompts"], *out), "example 1 has no response")
    fails(run("paste", trained, tmp_path, tmp_path, *out), "not a commandv-profile")
    assert not (tmp_path / "out").exists()


def test_paste_errors(run, models, files, trained, tmp_path):
    sets = {"donor": files["prompts"], "recipient": files["prompts"], "other": files["texts"]}
    for name, prompts in sets.items():
        model = models.get(name, models["recipient"])
        arguments = ("--prompts", prompts, "--no-text", "--out", tmp_path / name, "--dtype", "float32")
        assert run("profile", model, *arguments).code == 0
    donor, recipient, other = (tmp_path / name for name in sets)
    out = ("-o", tmp_path / "out")
    fails(run("paste", trained, donor, other, *out), "different prompts")
    fails(run("paste", trained, recipient, donor, *out), "adapter agree")
    fails(run("paste", trained, donor, recipient, *out, "--fit", "magic"), "'magic'", "ridge")
    fails(run("paste", trained, donor, recipient, *out, "--match", "sideways"), "--match sideways", "2:1,4:3")
    fails(run("paste", trained, donor, recipient, *out, "--match", "0:99"), "99")
    fails(run("paste", trained, donor, recipient, *out, "--layers", "77"), "77")
    fails(run("paste", donor, donor, recipient, *out), "a profile, not an adapter")
    assert not (tmp_path / "out").exists()
    fails(run("paste", trained, donor, recipient, "-o", models["donor"], "--no-fidelity"), "choose another place")
    assert (models["donor"] / "model.safetensors").exists()


def test_a_place_that_is_taken_is_refused_before_the_work_starts(run, models, files, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")

    def never(*_, **__):
        pytest.fail("the model was loaded before the output was checked")

    monkeypatch.setattr(cv, "load_model", never)
    fails(run("train", models["donor"], files["agree"], "-o", tmp_path), "choose another place", "notes.txt")


def test_wrong_usage_exits_with_2(run):
    for arguments in (
        ("fly",),
        ("inspect",),
        ("inspect", "x", "--colour", "red"),
        ("train", "gemma-3-270m", "builtin:pirate"),
    ):
        fails(run(*arguments), "-h` lists what there is", code=2)


# -- in a process of its own ------------------------------------------------------------------------------------------


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


def test_names_that_are_checked_before_the_tables_are_imported_are_those_of_the_tables():
    assert set(checks.MATCHERS) == set(MATCHERS)
    assert set(checks.METHODS) == {"auto", *TRANSFERRED}


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


CHOICES = {
    (core.paste, "fit"): FITTERS,
    (core.train, "kind"): TRAINABLE,
    (words.distil, "by"): ["auto", *DISTILLED],
    (steering.steer, "method"): METHODS,
    (steering.steer, "kind"): APPLICATIONS,
}


@pytest.mark.parametrize(("verb", "option"), CHOICES)
def test_what_an_option_offers_is_what_the_table_has(verb, option):
    """Written out in the verbs, because help and completion must not import the tables."""
    assert set(get_args(get_type_hints(verb)[option])) == set(CHOICES[verb, option])


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


# -- which model, and how it is asked ---------------------------------------------------------------------------------

SWITCH = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}<|assistant|>\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>\n{% endif %}"
)


@pytest.fixture
def switched(tmp_path) -> Path:
    """A model whose chat template has a switch for thinking."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role != 'system' %}<|system|>Be kind.<eos>\n{% endif %}" + SWITCH
    tiny.tiny_model().save_pretrained(tmp_path / "switched")
    tokenizer.save_pretrained(tmp_path / "switched")
    return tmp_path / "switched"


def test_a_system_prompt_and_template_options_for_every_verb(run, switched, files, tmp_path):
    options = ("--dtype", "float32", "--system", "Be brief.", "--template-option", "enable_thinking=false", "--json")
    lm = cv.load_model(switched, dtype="float32", system="Be brief.", template_options={"enable_thinking": False})
    said = run("generate", switched, "Hi", "--max-new-tokens", 4, *options).json["answers"][0]["answer"]
    assert said == cv.generate(lm, ["Hi"], max_new_tokens=4)[0]
    out = {name: tmp_path / name for name in ("profile", "trained", "steered")}
    profiled = run("profile", switched, "--prompts", files["prompts"], "--no-text", "--out", out["profile"], *options)
    learned = ("--epochs", 1, "--max-response", 1, "-o", out["trained"])
    assert run("train", switched, files["agree"], *learned, *options).code == profiled.code == 0
    assert run("steer", switched, "builtin:sentiment", "-o", out["steered"], *options).code == 0
    for path in out.values():
        template = run("inspect", path, "--json").json["template"]
        assert json.loads(template) == {"system": "Be brief.", "options": {"enable_thinking": False}}
    fails(run("generate", switched, "Hi", "--template-option", "thinking=1"), "knows enable_thinking")
    fails(run("generate", switched, "Hi", "--template-option", "thinking"), "expected NAME=VALUE")


def test_inspect_tells_how_a_model_is_asked(run, switched):
    told = run("inspect", switched, "--json").json
    assert told["what"] == "model"
    assert (told["layers"], told["d_model"]) == (tiny.LAYERS, tiny.D)
    assert told["default_system_prompt"] == "Be kind."
    assert told["template_options"] == ["enable_thinking"]
    assert told["ends_at"] == ["<eos>"]


def test_a_copy_under_another_name_is_said_to_be_the_same_model(run, models, files, tmp_path):
    made = cv.Adapter({0: steering_vector(torch.ones(tiny.D))}, ModelRef(id="org/Model", d_model=tiny.D), "push")
    cv.save(made, tmp_path / "push")
    asked = ("generate", models["donor"], "Hi", "-a", tmp_path / "push", "--max-new-tokens", 2)
    fails(run(*asked), "made for org/Model", "--same-as 'org/Model'")
    assert run(*asked, "--same-as", "org/Model").code == 0
    out = {name: tmp_path / name for name in models}
    for name, path in models.items():
        assert run("profile", path, "--prompts", files["prompts"], "--no-text", "--out", out[name]).code == 0
    pasting = (
        "paste",
        tmp_path / "push",
        out["donor"],
        out["recipient"],
        "-o",
        tmp_path / "pasted",
        "--layers",
        "all_layers",
    )
    fails(run(*pasting), "made for org/Model")
    assert run(*pasting, "--same-as", models["donor"], "--no-fidelity").code == 0


def test_names_in_files_cannot_steer_the_terminal(run, tmp_path):
    adapter = tiny.random_adapter(tiny.tiny_lm())
    cv.save(dataclasses.replace(adapter, name="\x1b]0;title\x07\x1b[2J\x1b[31mred"), tmp_path / "a")
    told = run("inspect", tmp_path / "a").out
    assert not set("\x1b\x07") & set(told)
    assert "red" in told


def program(*arguments: object, **how: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the program in a process of its own, which has streams of its own."""
    command = [sys.executable, "-m", "commandv.cli", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, check=False, **how)


def test_output_holds_every_character_whatever_the_terminal_can_show(tmp_path):
    place = cv.save(dataclasses.replace(tiny.random_adapter(tiny.tiny_lm()), name="thé 茶"), tmp_path / "a")
    poor = {**os.environ, "PYTHONIOENCODING": "ascii"}
    told = program("inspect", place, stdout=subprocess.PIPE, env=poor)
    assert (told.returncode, told.stderr) == (0, b"")
    assert rb"th\xe9 \u8336" in told.stdout
    told = program("inspect", place, "--json", stdout=subprocess.PIPE, env=poor)
    assert json.loads(told.stdout.decode("utf-8"))["name"] == "thé 茶"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_told(tmp_path):
    place = cv.save(tiny.random_adapter(tiny.tiny_lm()), tmp_path / "a")
    with open("/dev/full", "wb") as full:
        told = program("inspect", place, "--json", stdout=full)
    assert told.returncode == cli.EXIT_CODES[StorageError]
    assert told.stderr.startswith(b"commandv: the output cannot be written: ")
    assert told.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("words", "run_it"), [((), False), (("--trust-remote-code",), True)])
def test_code_of_a_model_is_run_only_where_it_is_asked_for(run, monkeypatch, tmp_path, words, run_it):
    tiny.tiny_model().save_pretrained(tmp_path / "model")
    asked = []

    def load(_model, **how):
        asked.append(how["trust_remote_code"])
        raise cv.errors.ModelError("loaded")

    monkeypatch.setattr(cv, "load_model", load)
    fails(run("generate", tmp_path / "model", "hi", *words), "loaded")
    assert asked == [run_it]
