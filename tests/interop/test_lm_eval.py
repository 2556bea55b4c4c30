"""lm-evaluation-harness: its own results without an adapter, those of a hand-written loop with one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import commandv as cv
import network
import tiny

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install 'commandv[lm-eval]'")

import datasets  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from commandv.interop.lm_eval import CommandVLM  # noqa: E402

# Contexts of different lengths; the last two pairs are the same tokens split in two places.
PAIRS = [
    ("How do I make tea?", " Boil fresh water"),
    ("How do I make tea?", " Boil fresh coffee"),
    ("The quick brown fox jumps over", " the lazy dog, and then it sleeps"),
    ("Why", " does Venus spin backwards?"),
    ("She said that nobody", " had seen"),
    ("She said that nobody had", " seen"),
]
DOCS = [
    {"question": "How do I make tea?", "choices": ["Boil water", "Open the window", "x"], "answer": 0},
    {"question": "What jumps over the lazy dog?", "choices": ["the cat", "the quick brown fox"], "answer": 1},
    {"question": "Why?", "choices": ["because it never left", "yes"], "answer": 1},
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
""",
    "tiny_generate": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
""",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    with network.refused(monkeypatch):
        yield


@pytest.fixture
def manager(tmp_path):
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS), "utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text.lstrip(), "utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def requests(kind, rows):
    return [Instance(request_type=kind, doc={}, arguments=row, idx=i) for i, row in enumerate(rows)]


def by_hand(lm, adapter, scale=1.0, pairs=PAIRS):
    """Score each pair on its own, uncached, straight from the library's `attach`."""
    scores = []
    for context, continuation in pairs:
        prompt = lm.tokenizer(context).input_ids
        whole = lm.tokenizer(context + continuation).input_ids
        ids = torch.tensor([whole])
        with torch.no_grad(), cv.attach(lm, adapter, scale=scale, n_prompt=len(prompt)):
            logits = lm.model(ids).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt), len(whole))
        scores.append((float(logits[at - 1, ids[0, at]].sum()), bool((logits[at - 1].argmax(-1) == ids[0, at]).all())))
    return scores


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_without_effect_the_results_are_the_harness_own(lm, kind, batch_size):
    rows = {
        "loglikelihood": PAIRS[:-1],  # the last one is scored wrongly by the harness's cache, beside the one before it
        "loglikelihood_rolling": [(a + b,) for a, b in PAIRS],
        "generate_until": [(a, {"until": ["\n"], "max_gen_toks": 6}) for a, _ in PAIRS],
    }[kind]
    plain = getattr(HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size), kind)
    expected = plain(requests(kind, rows))
    assert getattr(CommandVLM(lm, batch_size=batch_size), kind)(requests(kind, rows)) == expected
    still = getattr(CommandVLM(lm, tiny.random_adapter(lm), 0.0, batch_size=batch_size), kind)(requests(kind, rows))
    if batch_size == 1 or kind == "generate_until":
        assert still == expected
    else:  # other rows share a batch, so the last bits may differ
        torch.testing.assert_close(torch.tensor(still), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["l1", "f2+l3", "g2", "l2+g1", "all"])
@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_scores_are_those_of_a_hand_written_loop(arch, positions, batch_size):
    lm = tiny.tiny_lm(arch)
    adapter = tiny.random_adapter(lm, layers=(1, 2), positions=positions)
    model = CommandVLM(lm, adapter, 0.7, batch_size=batch_size, max_batch_size=4, max_length=64)
    got = model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    expected = by_hand(lm, adapter, 0.7)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    unchanged = CommandVLM(lm).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(got, unchanged, strict=True))


def test_equal_tokens_split_in_two_places_are_not_mixed_up(lm):
    """The harness's cache shares a pass between them; with an adapter at the prompt's end they differ."""
    pairs = [("She said that nobody", " had seen"), ("She said that nobody had", " seen")]
    adapter = tiny.random_adapter(lm)
    got = CommandVLM(lm, adapter, batch_size=2).loglikelihood(requests("loglikelihood", pairs))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(by_hand(lm, adapter, pairs=pairs)))


def test_a_context_that_is_cut_keeps_its_prompt(lm):
    adapter = tiny.random_adapter(lm)
    context, continuation = "The quick brown fox jumps over the lazy dog, and then it sleeps", " under a tree"
    n_reply = len(lm.tokenizer(context + continuation).input_ids) - len(lm.tokenizer(context).input_ids)
    model = CommandVLM(lm, adapter, max_length=n_reply + 4)
    ((score, _),) = model.loglikelihood(requests("loglikelihood", [(context, continuation)]))
    ids = torch.tensor([lm.tokenizer(context + continuation).input_ids[-(n_reply + 5) :]])
    with torch.no_grad(), cv.attach(lm, adapter, n_prompt=5):
        logits = lm.model(ids[:, :-1]).logits[0].log_softmax(-1)
    assert score == pytest.approx(float(logits[4:].gather(1, ids[0, 5:, None]).sum()), abs=1e-4)


def test_rolling_takes_the_token_before_the_text_as_the_prompt(lm):
    adapter = tiny.random_adapter(lm)
    text = "The quick brown fox"
    (score,) = CommandVLM(lm, adapter).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer(text).input_ids]])
    with torch.no_grad(), cv.attach(lm, adapter, n_prompt=1):
        logits = lm.model(ids[:, :-1]).logits[0].log_softmax(-1)
    assert score == pytest.approx(float(logits.gather(1, ids[0, 1:, None]).sum()), abs=1e-4)


@pytest.mark.parametrize("positions", ["l1", "g2"])
def test_generation_is_that_of_each_prompt_alone(lm, positions):
    adapter = tiny.random_adapter(lm, positions=positions)
    rows = [(context, {"until": ["<never>"], "max_gen_toks": 6}) for context, _ in PAIRS]
    got = CommandVLM(lm, adapter, batch_size=3).generate_until(requests("generate_until", rows))
    for (context, _), answer in zip(rows, got, strict=True):
        ids = torch.tensor([lm.tokenizer(context).input_ids])
        with torch.no_grad(), cv.attach(lm, adapter):
            out = lm.model.generate(input_ids=ids, do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert answer == lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_whole_tasks_run_and_leave_the_model_as_it_was(lm, manager):
    before = [parameter.clone() for parameter in lm.model.parameters()]
    results = {}
    for name, adapter in (("plain", None), ("adapted", tiny.random_adapter(lm, layers=(1, 2)))):
        out = lm_eval.simple_evaluate(
            model=CommandVLM(lm, adapter, batch_size=4),
            tasks=list(TASKS),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
        assert set(out["results"]) == set(TASKS)
        assert out["config"]["commandv_adapter"] == (adapter.name if adapter else None)
        json.dumps(out["config"], default=str)
        results[name] = {task: [one["resps"] for one in out["samples"][task]] for task in TASKS}
    assert all(results["plain"][task] != results["adapted"][task] for task in TASKS)
    assert "generate" not in lm.model.__dict__
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))


def test_by_name_and_on_the_command_line(manager, tmp_path):
    lm = tiny.tiny_lm(chat=True)
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    lm = cv.load_model(tmp_path / "model", dtype="float32")
    cv.save(tiny.random_adapter(lm), tmp_path / "adapter")
    arguments = f"pretrained={tmp_path / 'model'},adapter={tmp_path / 'adapter'},scale=1,dtype=float32"
    options = {"tasks": ["tiny_choice"], "task_manager": manager, "bootstrap_iters": 0, "apply_chat_template": True}
    named = lm_eval.simple_evaluate(model="commandv", model_args=arguments, batch_size=2, device="cpu", **options)
    given = lm_eval.simple_evaluate(model=CommandVLM(lm, tmp_path / "adapter", batch_size=2), **options)
    assert [one["resps"] for one in named["samples"]["tiny_choice"]] == [
        one["resps"] for one in given["samples"]["tiny_choice"]
    ]
    command = [
        sys.executable,
        "-m",
        "commandv.interop.lm_eval",
        "run",
        "--model",
        "commandv",
        "--model_args",
        arguments,
    ]
    command += ["--tasks", "tiny_choice", "--include_path", str(tmp_path / "tasks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny_choice" in done.stdout


def test_errors_come_before_the_work(lm, tmp_path):
    with pytest.raises(cv.CommandVError, match="width"):
        CommandVLM(tiny.tiny_lm(hidden_size=64), tiny.random_adapter(lm))
    with pytest.raises(cv.CommandVError, match="loaded already"):
        CommandVLM(lm, dtype="float32")
    with pytest.raises(cv.CommandVError, match="no such file"):
        CommandVLM(lm, tmp_path / "nothing")


def test_contexts_have_the_models_system_prompt_and_template_options(tmp_path):
    lm = tiny.tiny_lm()
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    given = f"pretrained={tmp_path},dtype=float32,system=Be brief.,enable_thinking=False,think_end_token=</think>"
    made = CommandVLM.create_from_arg_string(given, {"batch_size": 1})
    turns = [{"role": "user", "content": "Why?"}]
    expected = "<|system|>Be brief.<eos>\n<|user|>Why?<eos>\n<|assistant|><think></think>"
    assert made.apply_chat_template(turns) == expected
    assert "enable_thinking" in made.get_model_info()["commandv_format"]
    own = [{"role": "system", "content": "Be wise."}, *turns]
    assert made.apply_chat_template(own).startswith("<|system|>Be wise.<eos>\n<|user|>")
    with pytest.raises(cv.CommandVError, match="is loaded already"):
        CommandVLM(lm, enable_thinking=False)
