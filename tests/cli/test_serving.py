"""`serve` and `chat` as a shell runs them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

import command_line
import commandv as cv
import tiny
from command_line import fails
from commandv.serving.listening import listen

run = command_line.run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.tiny_model().save_pretrained(path)
    tiny.tiny_tokenizer(chat=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    lm = cv.load_model(model, dtype="float32")
    return cv.save(tiny.random_adapter(lm, (1, 2)), tmp_path_factory.mktemp("adapters") / "pirate")


@pytest.fixture
def said(run, monkeypatch, model, adapter):
    """What `chat` says to lines from a pipe."""

    def ran(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        words = ("chat", model, "--adapter", f"pirate={adapter}", "--max-new-tokens", 6, "--dtype", "float32")
        return run(*words, *options)

    return ran


def test_chat_reads_questions_and_commands_from_a_pipe(said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    found = said("Hi", "/scale pirate 0.5", "And then?", "/sclae pirate 1", "/quit", "never asked")
    assert (found.code, found.err) == (0, "")
    assert found.out.index("> Hi") < found.out.index("base+pirate@0.5") < found.out.index("> And then?")
    assert "commandv: /sclae: no such command (did you mean /scale?)" in found.out
    assert "never asked" not in found.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--adapter", "pirate"), "expected NAME=DIR"),
        (("--adapter", "a+b=here"), "a+b"),
        (("--adapter", "one=/no/such/place"), "/no/such/place"),
    ],
)
@pytest.mark.parametrize("verb", ["serve", "chat"])
def test_adapters_are_read_before_the_model(run, verb, words, told):
    fails(run(verb, "gemma-3-270m", *words), told)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(run):
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        fails(run("serve", "gemma-3-270m", "--port", port), f"port {port} of 127.0.0.1 is taken", "--port")


def test_serve_says_where_it_is_and_stops_cleanly(model, adapter):
    words = ["serve", str(model), "--adapter", f"pirate={adapter}", "--port", "0", "--dtype", "float32", "--json"]
    command = [sys.executable, "-m", "commandv.cli", *words]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet) as server:
        assert server.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = server.stdout.readline()
            assert line, server.communicate()[1]
            text += line
        facts = json.loads(text)
        assert facts["models"] == ["base", "base+pirate"]
        with urllib.request.urlopen(f"{facts['api']}/models", timeout=30) as response:
            assert [one["id"] for one in json.load(response)["data"]] == facts["models"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert "Traceback" not in server.communicate()[1]
