"""A classifier and a guard, trained here, as judges."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

import tiny
from commandv.errors import InputError, ModelError
from commandv.evaluation import Classifier, Guard, Judgment, load_judge
from commandv.prompts.sets import Prompt
from judging import asked

# A classifier

NO = [f"no {word} no" for word in ("tea", "door", "book", "cat", "river", "garden", "letter", "planet")]
YES = [f"yes {word} yes" for word in ("tea", "door", "book", "cat", "river", "garden", "letter", "planet")]


def train(model, loss_of, steps, lr):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Directory of a tiny BERT that tells "no ..." from "yes ..."."""
    place = tmp_path_factory.mktemp("classifier")
    tokenizer = tiny.tiny_tokenizer()
    config = transformers.BertConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        id2label={0: "ANSWER", 1: "REFUSAL"},
        label2id={"ANSWER": 0, "REFUSAL": 1},
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        batch = tokenizer([*NO, *YES], padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        truth = torch.tensor([1] * len(NO) + [0] * len(YES))
        train(model, lambda: model(**batch, labels=truth).loss, steps=60, lr=5e-3)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("label", "counts"),
    [(None, 1.0), ("REFUSAL", 1.0), ("refusal", 1.0), (1, 1.0), ("1", 1.0), ("ANSWER", 0.0), (0, 0.0)],
)
def test_a_classifier_judges(classifier, label, counts):
    judge = Classifier(str(classifier), label, batch_size=3)
    answers = ["no tea no", "yes tea yes", "no cat no", "yes book yes", "yes river yes"]
    expected = [counts if answer.startswith("no") else 1 - counts for answer in answers]
    assert judge(asked(answers), answers) == expected


def test_a_classifier_sees_what_its_template_says(classifier):
    judge = Classifier(str(classifier), template="no {answer} no")
    assert judge([Prompt("x")], ["tea"]) == [1.0]
    with_prompt = Classifier(str(classifier), template="{prompt}{answer}")
    assert with_prompt([Prompt("no {answer} no")], [""]) == [1.0]  # braces in the texts are left alone


def test_a_long_answer_loses_its_end(classifier, caplog):
    judge = Classifier(str(classifier))
    assert judge([Prompt("x")], ["no tea no " * 100])[0] in (0.0, 1.0)
    assert "beyond 64 tokens" in caplog.text


def test_an_unknown_label_is_refused(classifier):
    with pytest.raises(InputError, match=r"no label 'TOXIC'; it has 0 ANSWER, 1 REFUSAL"):
        Classifier(str(classifier), "TOXIC")(asked("a"), ["a"])
    with pytest.raises(InputError, match="no label 2"):
        Classifier(str(classifier), 2)(asked("a"), ["a"])
    with pytest.raises(InputError, match="template"):
        Classifier("x", template="{prompt}")


def test_a_model_without_a_trained_head_is_refused(tmp_path, tokenizer):
    tiny.tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="weights are not in its files"):
        Classifier(str(tmp_path))(asked("a"), ["a"])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Classifier(str(tmp_path / "nowhere"))(asked("a"), ["a"])


def test_a_decoder_classifier_gives_the_same_alone_and_in_a_batch(tmp_path, tokenizer):
    config = transformers.LlamaConfig(
        **{**tiny.ARCHS["llama"][1], "vocab_size": tiny.VOCAB, "initializer_range": 0.5, "num_labels": 3}
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answers = [*NO, "a much longer answer than the others, so that there is padding", "x"]
    judge = Classifier(str(tmp_path), 2, batch_size=10)
    assert judge(asked(answers), answers) == [judge([Prompt("x")], [answer])[0] for answer in answers]
    with pytest.raises(InputError, match="say which label counts"):
        Classifier(str(tmp_path))(asked("a"), ["a"])


def test_a_classifier_is_kept_too_and_loaded_only_when_needed(classifier, monkeypatch):
    judge = load_judge(f"classifier:{classifier}#REFUSAL")
    assert judge(asked("ab"), ["no tea no", "yes tea yes"]) == [1.0, 0.0]
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", None)
    fresh = load_judge(f"classifier:{classifier}#REFUSAL")
    assert fresh(asked("ab"), ["no tea no", "yes tea yes"]) == [1.0, 0.0]


# A guard


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """Directory of a tiny Llama that replies "safe", "unsafe" or "hm" to three kinds of exchanges."""
    place = tmp_path_factory.mktemp("guard")
    tokenizer = tiny.tiny_tokenizer(chat=True)
    model = tiny.tiny_model("llama", initializer_range=0.1)
    pairs = [("tea", "safe\n"), ("door", "unsafe\nS1"), ("river", "hm")]
    rows = []
    for answer, reply in pairs:
        turns = [{"role": "user", "content": "request"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        rows.append((prompt, [*tokenizer(reply, add_special_tokens=False).input_ids, tokenizer.eos_token_id]))
    batches = [(torch.tensor([prompt + reply]), torch.tensor([[-100] * len(prompt) + reply])) for prompt, reply in rows]
    train(model, lambda: sum(model(input_ids=ids, labels=labels).loss for ids, labels in batches), steps=60, lr=3e-3)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_a_guard_judges(guard):
    judge = Guard(str(guard), batch_size=2, max_new_tokens=12)
    answers = ["tea", "door", "river"]
    found = judge([Prompt("request")] * 3, answers)
    assert found[:2] == [0.0, 1.0]
    assert math.isnan(found[2])
    swapped = Guard(str(guard), unsafe=("SAFE",), safe=("hm",), max_new_tokens=12)
    again = swapped([Prompt("request")] * 3, answers)
    assert (again[0], again[2]) == (1.0, 0.0)
    assert math.isnan(again[1])


def test_a_guard_has_no_judgment_on_what_does_not_fit(guard, caplog):
    found = Guard(str(guard), max_new_tokens=12)([Prompt("request")] * 2, ["door", "tea " * 2000])
    assert found[0] == 1.0
    assert math.isnan(found[1])
    assert "1 exchanges are longer" in caplog.text


def test_a_guard_reads_behind_its_lead():
    judge = Guard("any", lead="Safety:", unsafe=("Unsafe",), safe=("Safe",))
    assert judge._read(0, "Safety: Unsafe\nCategories: none") == Judgment(0, 1.0, "unsafe")
    assert judge._read(0, " Safety: **Safe**") == Judgment(0, 0.0, "safe")
    assert math.isnan(judge._read(0, "").label)


def test_a_guard_without_a_chat_template_is_refused(tmp_path, tokenizer):
    tiny.tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        Guard(str(tmp_path))(asked("a"), ["a"])
