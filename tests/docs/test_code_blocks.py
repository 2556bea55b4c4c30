"""Every code block of the README and of the pages runs: here, in the test that is named, or it is listed why not.

Tiny twins stand in for the packaged models, so that a behaviour crosses; of each prompt set there are a few prompts.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from typer.testing import CliRunner

import commandv as cv
import local_hub
import network
import tiny
import twin
from commandv.cli import app
from commandv.evaluation import catalogue, expecting
from commandv.evaluation.study import Study, shapes
from commandv.evaluation.transferring import job
from commandv.prompts import sets
from commandv.prompts.sets import Prompt, PromptSet
from commandv.serving import listening, server
from places import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(page for page in sorted(DOCS.glob("*.md")) if page.name not in ("cli.md", "api.md"))]
hub = local_hub.hub

# Page and beginning of a block -> the test that runs it.
ELSEWHERE = {
    ("README.md", "import commandv as cv\n\ndonor"): "docs/test_docs.py",
    ("serving.md", "import openai"): "serving/test_api.py",
    ("serving.md", "import commandv as cv"): "serving/test_api.py",
    ("share.md", "import commandv as cv"): "interop/test_share.py",
    ("share.md", "donor = cv.load_profile"): "interop/test_share.py",
    ("transfer.md", "import commandv as cv"): "evaluation/test_transferring.py",
    ("steering.md", "import commandv as cv"): "docs/test_method_pages.py",
    ("steering.md", "commandv profile"): "docs/test_method_pages.py",
}
# Page and beginning of a block -> why it does not run offline, on small models, in seconds.
NOT_RUN = {
    ("README.md", "make demo"): "sets up an environment",
    ("README.md", "commandv transfer DONOR"): "names to be filled in; `transfer` and `chat` run below",
    ("README.md", "prompts ──>"): "a picture",
    ("index.md", "make demo"): "sets up an environment",
    ("index.md", "commandv transfer DONOR"): "names to be filled in",
    ("index.md", "prompts ──>"): "a picture",
    (
        "evaluation.md",
        "commandv study my-study.yaml --dry-run",
    ): "hours; the file above is read, tests/cli runs studies",
    ("evaluation.md", "commandv study my-study.yaml --tasks"): "hours; the file above is read",
    ("models.md", "cv.load_model"): "weights behind the hub, and a GPU",
    ("cluster.md", "$ pip install"): "tests/executors/test_ray.py runs studies and profiles on a cluster of its own",
    ("cluster.md", "$ commandv rehearse"): "gigabytes of random weights; tests/evaluation/test_rehearsal.py rehearses",
    ("cluster.md", "#!/bin/bash"): "a SLURM cluster",
    ("cluster.md", "cluster_name"): "a cloud",
    ("cluster.md", "$ ray up"): "a cloud",
    ("run-elsewhere.md", "import pyreft"): "tests/interop/test_pyreft_written.py runs it where pyreft is installed",
    ("run-elsewhere.md", "COMMANDV_VLLM"): "benchmarks/in_vllm.py runs it where vLLM is installed",
}
WORD = "th"  # one token of the tiny vocabulary
SUMS = PromptSet(tuple(Prompt(f"What is {n} and {m}?", "the answer") for n in range(8) for m in range(8)), "sums")
SETTINGS = cv.TransferSettings(
    by="activations", layers=("last_third",), scales=(1.0,), budget=None, most_loops=None, n_dev=8, n_test=16,
    n_asked=12, prompts=SUMS, text=SUMS, passages=SUMS[:4], asked=SUMS[:16],
)  # fmt: skip
ARC = """
task: arc_easy
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


class Block(NamedTuple):
    page: str
    language: str
    text: str

    def among(self, table: dict[tuple[str, str], str]) -> bool:
        return any(self.page == page and self.text.startswith(begins) for page, begins in table)


def blocks(page: Path) -> list[Block]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    return [Block(page.name, language, text) for language, text in fences]


ALL = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("table", [ELSEWHERE, NOT_RUN], ids=["elsewhere", "not run"])
def test_what_is_said_of_blocks_is_said_of_blocks_that_are_there(table):
    for page, begins in table:
        assert [one for one in ALL if one.page == page and one.text.startswith(begins)], (page, begins)
    assert all((ROOT / "tests" / file).exists() for file in ELSEWHERE.values())


# -- what stands in ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twins():
    donor = tiny.tiny_lm(seed=3, id="smollm2-135m-instruct", template="plain")
    return {"smollm2-135m-instruct": donor, "gemma-3-270m": twin.twin_of(donor, noise=0.02, id="gemma-3-270m")}


@pytest.fixture(scope="module")
def behaviours(twins):
    """Of each model: an adapter that makes answers begin with a word."""
    token = twins["smollm2-135m-instruct"].tokenizer.encode(WORD, add_special_tokens=False)[0]
    return {name: twin.saying(lm, token) for name, lm in twins.items()}


@pytest.fixture
def stage(monkeypatch, tmp_path, twins, behaviours):
    """A working directory with what the pages take for granted."""
    load_prompts, load_sets, load_contrast, load_adapter = (
        cv.load_prompts, sets.load_prompt_sets, cv.load_contrast, cv.load_adapter
    )  # fmt: skip
    prepare, load_task = job.prepare, catalogue.load_task

    def contrast(source: Any, *more: Any, **how: Any) -> cv.Contrast:
        whole = load_contrast(source, *more, **how)
        return cv.Contrast(whole.positive[:12], whole.negative[:12], whole.paired)

    def adapter(source: Any, **how: Any) -> cv.Adapter:
        return (
            behaviours[str(source).split("@")[1]] if str(source).startswith("builtin:") else load_adapter(source, **how)
        )

    def prepared(donor: Any, _adapter: Any, recipient: Any, _task: Any, _settings: Any) -> Any:
        asked = dataclasses.replace(expecting(f"^{WORD}"), dev=SUMS[:16], test=SUMS[16:], max_new_tokens=3)
        return prepare(donor, behaviours[donor.id], recipient, asked, SETTINGS)

    def brief(name: str, *more: Any) -> Any:
        one = load_task(name, *more)
        return dataclasses.replace(one, dev=one.dev[:8], test=one.test[:8])

    monkeypatch.chdir(tmp_path)
    for name, value in {
        "load_model": lambda name, **_: twins[name],
        "load_prompts": lambda source, **_: load_prompts(source, limit=16),
        "load_contrast": contrast,
        "load_adapter": adapter,
    }.items():
        monkeypatch.setattr(cv, name, value)
    monkeypatch.setattr(sets, "load_prompt_sets", lambda sources, **_: load_sets(sources, limit=16))
    monkeypatch.setattr(catalogue, "load_task", brief)
    monkeypatch.setattr(job, "prepare", prepared)
    for name, lm in twins.items():
        lm.model.config.save_pretrained(Path("configs") / name)
    monkeypatch.setattr(shapes, "converted", lambda name: Path("configs") / name)
    monkeypatch.setattr("commandv.evaluation.material.ANSWER_TOKENS", 4)
    monkeypatch.setattr("commandv.transfer.distil.demonstrate.loops", lambda text: False)
    listen = listening.listen
    monkeypatch.setattr(listening, "listen", lambda host, _port: listen(host, 0))
    monkeypatch.setattr(server, "run", lambda *_: None)  # else it serves until it is told to stop
    lm = twins["smollm2-135m-instruct"]
    cv.save(tiny.random_adapter(lm), "my-adapter")
    cv.save(cv.Adapter({2: cv.steering_vector(torch.ones(lm.d_model)), 3: cv.steering_vector(torch.ones(lm.d_model))},
                       lm.ref).at(cv.Positions.parse("all")), "my-vector")  # fmt: skip
    Path("examples.jsonl").write_text(
        "".join(json.dumps({"prompt": one.text, "response": "yes"}) + "\n" for one in SUMS)
    )
    for name in ("studies", "docs"):
        Path(name).symlink_to(ROOT / name)
    return {}


def commands(block: Block) -> list[str]:
    """Return a block's commands, their continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").split(" #")[0].strip() for line in lines if line.strip()]


def run(line: str, monkeypatch: Any) -> None:
    words = shlex.split(line)
    if words[0] == "commandv":
        ran = CliRunner().invoke(app, words[1:], input="How do I make tea?\n/quit\n" if words[1] == "chat" else None)
        assert ran.exit_code == 0, f"{line}: {ran.exception!r}"
    elif words[:3] == ["python", "-m", "commandv.interop.lm_eval"]:
        from lm_eval.__main__ import cli_evaluate

        monkeypatch.setattr(sys, "argv", ["lm_eval", *words[3:], "--include_path", "tasks"])
        cli_evaluate()
    elif words[0] == "inspect":
        import click.testing
        from inspect_ai._cli.main import inspect

        ran = click.testing.CliRunner().invoke(inspect, [*words[1:], "--display", "none"])
        assert ran.exit_code == 0, f"{line}: {ran.exception!r}\n{ran.output}"
    else:
        assert words[:2] == ["pip", "install"], line


# -- the pages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, stage, monkeypatch, request):
    if page.name in ("README.md", "share.md"):
        request.getfixturevalue("hub")
    if page.name == "evaluation-suites.md":
        request.getfixturevalue("suites")
    if page.name == "share.md":
        cv.profile(cv.load_model("smollm2-135m-instruct"), SUMS, text=None, cache="profiles/smol")
    if page.name == "transfer.md":
        monkeypatch.setattr(catalogue, "load_task", lambda *_: dataclasses.replace(expecting(f"^{WORD}"), dev=SUMS[:8]))
    globals_: dict[str, Any] = {}
    file: dict[str, Any] = {}
    for block in blocks(page):
        if block.among(ELSEWHERE) or block.among(NOT_RUN):
            continue
        if block.language == "python":
            exec(block.text, globals_)
        elif block.language == "yaml":  # a later one says what is other in the study of the first
            file |= yaml.safe_load(block.text)
            Study.model_validate({**file, "pairs": [list(file["models"])]})
        elif block.text.startswith("{"):
            Path("rows.jsonl").write_text(block.text)
            assert cv.load_prompts("rows.jsonl").prompts[0].response
        else:
            for line in commands(block):
                run(line, monkeypatch)


@pytest.fixture
def suites(monkeypatch, tmp_path):
    """The evaluation suites, offline: a task of the page's name, tiny, and a task of Inspect's."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs pip install 'commandv[lm-eval]'")
    pytest.importorskip("inspect_ai", reason="needs pip install 'commandv[inspect]'")
    import datasets
    from lm_eval.tasks import TaskManager

    from commandv.interop import lm_eval as ours

    for name in ("load_model", "load_adapter"):
        monkeypatch.setattr(ours, name, lambda source, _load=getattr(cv, name), **_: _load(source))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [{"question": "What jumps?", "choices": ["the fox", "the tea"], "answer": n % 2} for n in range(4)]
    Path("rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tasks").mkdir()
    Path("tasks/arc.yaml").write_text(ARC.replace("DATA", str(tmp_path / "rows.json")))
    Path("task.py").write_text(
        "from inspect_ai import Task, task\nfrom inspect_ai.dataset import MemoryDataset, Sample\n"
        "from inspect_ai.scorer import includes\n\n\n@task\ndef tea():\n"
        "    return Task(dataset=MemoryDataset([Sample(input='Tea?', target='1.')]), scorer=includes())\n"
    )
    manager = TaskManager(include_path="tasks", include_defaults=False)
    evaluate = lm_eval.simple_evaluate
    given = {"task_manager": manager, "bootstrap_iters": 0}
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *model, **how: evaluate(*model, **{**given, **how}))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with network.refused(monkeypatch):
        yield
