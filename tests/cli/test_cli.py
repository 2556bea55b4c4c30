"""The command line from end to end, on tiny models in local directories."""

from __future__ import annotations

from pathlib import Path

import torch

import command_files
import command_line
import commandv as cv
from command_files import PROMPTS
from command_line import fails
from commandv.cli import inspection
from stored import data_file

files, models, trained = command_files.files, command_files.models, command_files.trained


run = command_line.run


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
