from __future__ import annotations

import pytest
import torch
import transformers

import commandv as cv
import tiny
from commandv.errors import InputError, ModelError
from commandv.evaluation.price import drift
from commandv.models.encoding import encode, pad
from commandv.models.generation import batches
from commandv.models.sampling import Sampled, Sampling

PROMPTS = [
    "Why does Venus spin?",
    "How do I make a good cup of tea, and how long do the leaves steep before the water gets cold?",
    "Hi",
    "Tell me about the river that runs through the city.",
    "Read the book.",
]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom", "opt"])
def test_batch_size_changes_nothing(arch):
    lm = tiny.tiny_lm(arch)
    one = cv.generate(lm, PROMPTS, max_new_tokens=6, batch_size=1)
    assert cv.generate(lm, PROMPTS, max_new_tokens=6, batch_size=16) == one
    assert cv.generate(lm, PROMPTS, max_new_tokens=6, batch_size=2) == one
    assert len(set(one)) > 2


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_the_greedy_tokens_in_the_order_of_the_prompts(chat):
    lm = tiny.tiny_lm(chat=chat)
    answers = cv.generate(lm, PROMPTS, max_new_tokens=5)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = encode(lm, prompt).ids
        for _ in range(5):
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        text = lm.tokenizer.decode(ids[-5:], skip_special_tokens=True)
        assert answer == (text if chat else text.strip())


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 40},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"suppress_tokens": list(range(3, 200))},
        {"min_new_tokens": 7, "max_length": 4},
    ],
    ids=lambda own: next(iter(own)),
)
def test_the_models_own_settings_are_left_aside(own):
    lm = tiny.tiny_lm()
    expected = cv.generate(lm, PROMPTS, max_new_tokens=6)
    lm.model.generation_config = mine = transformers.GenerationConfig(**own, eos_token_id=2)
    assert cv.generate(lm, PROMPTS, max_new_tokens=6) == expected
    assert lm.model.generation_config is mine


def test_own_settings_come_back_after_an_error(monkeypatch):
    lm = tiny.tiny_lm()
    mine = lm.model.generation_config

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lm.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        cv.generate(lm, PROMPTS)
    assert lm.model.generation_config is mine


def test_stops_at_every_end_token_of_the_model():
    lm = tiny.tiny_lm(chat=True)
    batch = pad(lm, [encode(lm, PROMPTS[0]).ids])
    tokens = lm.model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=4)
    first, second = tokens[0, -4:-2].tolist()
    assert first != second
    lm.model.generation_config.eos_token_id = [2, second]
    assert cv.generate(lm, PROMPTS[:1], max_new_tokens=4) == [lm.tokenizer.decode([first])]


def test_a_plain_answer_ends_before_a_new_question(monkeypatch):
    lm = tiny.tiny_lm()
    reply = lm.tokenizer(" Yes.\nQuestion: and now?", add_special_tokens=False).input_ids

    def say(input_ids, **_):
        return torch.cat([input_ids, torch.tensor([reply] * len(input_ids))], 1)

    monkeypatch.setattr(lm.model, "generate", say)
    assert cv.generate(lm, PROMPTS[:2]) == ["Yes.", "Yes."]


def test_an_attached_adapter_changes_the_answers():
    lm = tiny.tiny_lm()
    plain = cv.generate(lm, PROMPTS, max_new_tokens=6)
    with cv.attach(lm, tiny.random_adapter(lm, (1, 2))):
        one, many = (cv.generate(lm, PROMPTS, max_new_tokens=6, batch_size=size) for size in (1, 16))
    assert one == many != plain
    assert cv.generate(lm, PROMPTS, max_new_tokens=6) == plain


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"batch_size": 0}])
def test_sizes_below_one_are_refused(lm, options):
    with pytest.raises(InputError, match="expected 1 or more"):
        cv.generate(lm, PROMPTS, **options)


def test_one_string_is_not_a_list_of_prompts(lm):
    with pytest.raises(InputError, match="write \\[text\\] for one"):
        cv.generate(lm, "How do I make tea?")


def test_batches_hold_every_index_once_longest_first():
    lengths = [3, 9, 1, 4, 9, 2, 7]
    found = list(batches(lengths, 3))
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert [lengths[i] for batch in found for i in batch] == sorted(lengths, reverse=True)
    assert sorted(i for batch in found for i in batch) == list(range(7))


def test_answers_that_would_leave_the_context_are_refused():
    lm = tiny.tiny_lm("gpt2", n_positions=64)
    longest = max(len(encode(lm, prompt).ids) for prompt in PROMPTS[3:])
    cv.generate(lm, PROMPTS[3:], max_new_tokens=64 - longest)
    with pytest.raises(InputError, match="make 65, the context of tiny-gpt2 is 64"):
        cv.generate(lm, PROMPTS[3:], max_new_tokens=65 - longest)


@pytest.mark.parametrize("chat", [True, False])
def test_earlier_turns_come_before_the_prompt(chat):
    lm = tiny.tiny_lm(chat=chat)
    turns = [("What is tea?", "Boiled leaves."), ("And the river?", "It runs.")]
    alone, after = encode(lm, "Read the book."), encode(lm, "Read the book.", turns=turns)
    text = lm.tokenizer.decode(after.ids)
    places = [text.index(one) for one in ("What is tea?", "Boiled leaves.", "And the river?", "It runs.", "Read the")]
    assert places == sorted(places)
    assert [end for end in after.text_ends if end >= 0] == [end for end in alone.text_ends if end >= 0]
    assert cv.generate(lm, ["Read the book."], max_new_tokens=3, turns=turns) != [""]


def test_an_earlier_answer_follows_its_question_as_a_reply_does():
    lm = tiny.tiny_lm(chat=False)
    alone = encode(lm, "What is tea?", "Boiled leaves.")
    after = encode(lm, "Read the book.", turns=[("What is tea?", "Boiled leaves.")])
    assert lm.tokenizer.decode(after.ids).startswith(lm.tokenizer.decode(alone.ids))


# -- numbers that overflow ---------------------------------------------------------------------------------------------


def pushed(lm, size: float, layer: int = 2):
    one = cv.steering_vector(torch.full((lm.d_model,), size))
    return cv.Adapter({layer: one}, lm.ref, "push").at(cv.Positions.parse("all"))


def test_states_that_overflow_stop_generation_and_name_layer_and_prompt():
    lm = tiny.tiny_lm(dtype=torch.float16)
    assert all(cv.generate(lm, ["tea?", "Why does Venus spin?"], max_new_tokens=2))
    with cv.attach(lm, pushed(lm, 7e4)), pytest.raises(ModelError, match=r"output of layer 2 for prompt [12]\."):
        cv.generate(lm, ["tea?", "Why does Venus spin?"], max_new_tokens=4)
    broken = tiny.tiny_lm()
    broken.blocks[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"output of layer 1 for prompt 1\."):
        cv.generate(broken, ["tea?"], max_new_tokens=2)


def test_a_model_that_overflows_by_itself_is_wrapped_and_named_when_it_answers():
    model = tiny.tiny_model()
    model.model.layers[2].mlp.down_proj.weight.data[3, 3] = float("nan")
    late = cv.wrap_model(model, tiny.tiny_tokenizer(), "late")
    with pytest.raises(ModelError, match=r"output of layer 2 for prompt 1\."):
        cv.generate(late, ["tea?"], max_new_tokens=2)
    model.model.layers[0].mlp.down_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ModelError, match="output of its first block"):
        cv.wrap_model(model, tiny.tiny_tokenizer(), "from the start")


def test_states_that_overflow_stop_measuring():
    lm = tiny.tiny_lm(dtype=torch.float16)
    passages = cv.load_prompts("builtin:text")[:2]
    with pytest.raises(ModelError, match=r"output of layer 2 for prompt [12]\."):
        drift(lm, passages, pushed(lm, 7e4))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e30, -1e30, 10**400])
def test_scales_that_overflow_are_refused(scale):
    lm = tiny.tiny_lm()
    adapter = tiny.random_adapter(lm)
    for use in (lambda: cv.attach(lm, adapter, scale=scale), lambda: adapter.scaled(scale)):
        with pytest.raises(InputError, match=r"scale=.*finite number"):
            use()
    with pytest.raises(InputError, match="numbers beyond"):
        cv.attach(lm, pushed(lm, 1e10), scale=1e10)


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_depend_on_the_seed_and_not_on_the_batch():
    lm = tiny.tiny_lm()
    asked = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3}
    one = cv.generate(lm, PROMPTS, **asked)
    assert cv.generate(lm, PROMPTS, **asked, batch_size=1) == one
    assert cv.generate(lm, PROMPTS, **asked | {"seed": 4}) != one
    assert len(set(cv.generate(lm, [PROMPTS[0]] * 8, **asked))) > 1
    assert cv.generate(lm, PROMPTS, max_new_tokens=6, temperature=0.0, seed=4) == cv.generate(
        lm, PROMPTS, max_new_tokens=6
    )


def test_samples_have_the_frequencies_of_the_softmax_and_stay_within_top_p():
    n, temperature = 4000, 2.0
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0])
    ids = torch.zeros(n, 1, dtype=torch.long)

    def frequencies(top_p: float) -> torch.Tensor:
        drawn = Sampled(Sampling(temperature, top_p, 0), range(n))(ids, logits.expand(n, -1)).argmax(1)
        return torch.bincount(drawn, minlength=4) / n

    expected = torch.softmax(logits / temperature, 0)
    assert torch.allclose(frequencies(1.0), expected, atol=4 / (2 * n**0.5))
    top = frequencies(0.5)
    assert top[2:].sum() == 0
    assert torch.allclose(top[:2], expected[:2] / expected[:2].sum(), atol=4 / (2 * n**0.5))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_what_cannot_be_sampled_with_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        cv.generate(tiny.tiny_lm(), PROMPTS, **wrong)
