"""Inspect: its evaluations say what the library's own `generate` says, with and without an adapter."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
import torch

import commandv as cv
import network
import tiny

inspect_ai = pytest.importorskip("inspect_ai", reason="needs pip install 'commandv[inspect]'")

from inspect_ai.dataset import MemoryDataset, Sample  # noqa: E402
from inspect_ai.model import (  # noqa: E402
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes  # noqa: E402
from inspect_ai.tool import ToolInfo  # noqa: E402

from commandv.interop.inspect_ai import inspect_model  # noqa: E402

QUESTIONS = ["How do I make tea?", "Why?", "What jumps over the lazy dog in the garden?", "Name a river.", "And now?"]
TURNS = [
    ChatMessageSystem(content="Be brief."),
    ChatMessageUser(content="Why?"),
    ChatMessageAssistant(content="Because."),
    ChatMessageUser(content="And now?"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    with network.refused(monkeypatch):
        yield


def evaluate(model, log_dir, **options):
    task = inspect_ai.Task(
        dataset=MemoryDataset([Sample(input=text, target="e") for text in QUESTIONS]), scorer=includes()
    )
    options = {"max_tokens": 8, "display": "none", "log_dir": str(log_dir), **options}
    (log,) = inspect_ai.eval(task, model=model, **options)
    assert log.status == "success", log.error
    return log


def answers(log):
    return [sample.output.completion for sample in log.samples]


def ask(model, messages, **config):
    return asyncio.run(model.generate(messages, config=GenerateConfig(**config)))


@pytest.mark.parametrize("chat", [True, False])
def test_an_evaluation_says_what_generate_says(chat, tmp_path):
    lm = tiny.tiny_lm(chat=chat)
    before = [parameter.clone() for parameter in lm.model.parameters()]
    adapter = tiny.random_adapter(lm, layers=(1, 2), positions="l1+g1")
    plain = answers(evaluate(inspect_model(lm), tmp_path))
    assert plain == cv.generate(lm, QUESTIONS, max_new_tokens=8)
    log = evaluate(inspect_model(lm, adapter, scale=0.8), tmp_path)
    with cv.attach(lm, adapter, scale=0.8):
        assert answers(log) == cv.generate(lm, QUESTIONS, max_new_tokens=8)
    assert answers(log) != plain
    assert log.eval.model_args == {"adapter": "random", "scale": 0.8}
    assert "generate" not in lm.model.__dict__
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))


def test_by_name_with_model_arguments(tmp_path):
    lm = tiny.tiny_lm(chat=True)
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    lm = cv.load_model(tmp_path / "model", dtype="float32")
    adapter = tiny.random_adapter(lm)
    cv.save(adapter, tmp_path / "adapter")
    arguments = {"adapter": str(tmp_path / "adapter"), "scale": 1, "dtype": "float32"}
    log = evaluate(f"commandv/{tmp_path / 'model'}", tmp_path, model_args=arguments)
    with cv.attach(lm, adapter):
        assert answers(log) == cv.generate(lm, QUESTIONS, max_new_tokens=8)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_requests_share_batches(batch_size, monkeypatch):
    lm = tiny.tiny_lm(chat=True)
    expected = cv.generate(lm, QUESTIONS, max_new_tokens=4)
    sizes, own = [], lm.model.generate

    def counted(*args, **kwargs):
        sizes.append((len(kwargs["input_ids"]), threading.current_thread() is threading.main_thread()))
        return own(*args, **kwargs)

    monkeypatch.setattr(lm.model, "generate", counted)
    model = inspect_model(lm, batch_size=batch_size)

    async def run():
        many = [
            model.generate(text, config=GenerateConfig(max_tokens=4, max_connections=batch_size)) for text in QUESTIONS
        ]
        return [output.completion for output in await asyncio.gather(*many)]

    assert asyncio.run(run()) == expected
    assert max(size for size, _ in sizes) == min(batch_size, len(QUESTIONS))
    assert not any(on_main for _, on_main in sizes)


def test_system_messages_and_earlier_turns_go_through_the_template():
    lm = tiny.tiny_lm(chat=True)
    output = ask(inspect_model(lm), TURNS, max_tokens=6)
    text = (
        "<bos><|system|>\nBe brief.<eos>\n<|user|>\nWhy?<eos>\n<|assistant|>\nBecause.<eos>\n"
        "<|user|>\nAnd now?<eos>\n<|assistant|>\n"
    )
    ids = torch.tensor([lm.tokenizer(text, add_special_tokens=False).input_ids])
    out = lm.model.generate(input_ids=ids, do_sample=False, max_new_tokens=6, pad_token_id=0)[0, ids.shape[1] :]
    assert output.completion == lm.tokenizer.decode(out, skip_special_tokens=True)
    assert output.usage.input_tokens == ids.shape[1]
    assert output.usage.output_tokens == len(out)


def test_the_models_system_prompt_goes_before_conversations_without_one():
    lm = tiny.tiny_lm(chat=True)
    brief, model = TURNS[:2], inspect_model(tiny.tiny_lm(chat=True, system=TURNS[0].content))
    assert [turn.role for turn in brief] == ["system", "user"]
    with_own = ask(inspect_model(lm), brief, max_tokens=6)
    assert ask(model, brief[1:], max_tokens=6).completion == with_own.completion
    assert ask(model, brief, max_tokens=6).usage.input_tokens == with_own.usage.input_tokens


def test_answers_end_at_stop_sequences_and_token_limits():
    lm = tiny.tiny_lm(chat=True)
    model = inspect_model(lm)
    whole = ask(model, "Why?", max_tokens=12)
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 12)
    stop = whole.completion[5:8]
    cut = ask(model, "Why?", max_tokens=12, stop_seqs=["never said", stop])
    assert cut.completion == whole.completion.split(stop)[0]
    assert cut.stop_reason == "stop"
    assert cut.usage.output_tokens < 12
    short = inspect_model(tiny.tiny_lm(chat=True, max_position_embeddings=40))
    assert ask(short, "Why?").usage.total_tokens == 40
    assert ask(short, QUESTIONS[2] * 3).stop_reason == "model_length"


def test_sampling_only_where_asked_for_and_reproducible_with_a_seed():
    lm = tiny.tiny_lm(chat=True)
    lm.model.generation_config.update(do_sample=True, temperature=1.5)  # the model's own settings are left aside
    model = inspect_model(lm)
    assert ask(model, "Why?", max_tokens=8).completion == ask(model, "Why?", max_tokens=8, temperature=0).completion
    state = torch.get_rng_state()
    hot = [ask(model, "Why?", max_tokens=8, temperature=2.0, seed=seed).completion for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_done_is_a_typed_error(tmp_path):
    chat, plain = inspect_model(tiny.tiny_lm(chat=True)), inspect_model(tiny.tiny_lm())
    with pytest.raises(cv.CommandVError, match="one user message; got system, user, assistant, user"):
        ask(plain, TURNS)
    with pytest.raises(cv.CommandVError, match="logprobs"):
        ask(chat, "Why?", logprobs=True)
    with pytest.raises(cv.CommandVError, match="image"):
        ask(chat, [ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AA==")])])
    with pytest.raises(cv.CommandVError, match="tools"):
        asyncio.run(chat.generate("Why?", tools=[ToolInfo(name="one", description="a tool")]))
    refusing = tiny.tiny_lm(chat=True)
    refusing.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(cv.CommandVError, match="no system role"):
        ask(inspect_model(refusing), TURNS)
    with pytest.raises(cv.CommandVError, match="width"):
        inspect_model(tiny.tiny_lm(hidden_size=64), tiny.random_adapter(tiny.tiny_lm()))
    with pytest.raises(cv.CommandVError, match="no api_key"):
        get_model("commandv/gemma-3-270m", api_key="secret", memoize=False)
    with pytest.raises(cv.CommandVError, match="cannot be loaded"):
        get_model(f"commandv/{tmp_path}", memoize=False)


def test_looking_for_a_provider_does_not_load_torch():
    code = "import sys, commandv.interop.inspect_ai; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
