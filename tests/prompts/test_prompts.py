from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from commandv.errors import InputError
from commandv.prompts.sets import Prompt, PromptSet, as_prompts, builtin_names, load_prompts, mixed_forms
from texts import similar

ROOT = Path(__file__).resolve().parents[2]
DISJOINT = [
    ("questions-dev", "questions-test"),
    ("questions-dev", "numbered-list"),
    ("questions-test", "numbered-list"),
    ("questions-dev", "pirate"),
    ("questions-test", "pirate"),
    ("questions-dev", "general"),
    ("questions-test", "general"),
    ("numbered-list", "general"),
    ("drift", "text"),
    ("drift", "general"),
]


def same(text):
    """A text without what does not tell prompts apart: case, white space, quotes' form and the marks at its end."""
    return " ".join(text.casefold().replace("\u2019", "'").split()).strip(" .?!")


def profiled_in_studies():
    """The built-in sets that the committed study files profile."""
    files = [yaml.safe_load(file.read_text("utf-8")) for file in (ROOT / "studies").rglob("*.yaml")]
    sources = [one for file in files for one in (*file.get("prompts", ()), file.get("text") or "")]
    return {one.removeprefix("builtin:") for one in sources if one.startswith("builtin:")}


# -- the built-in sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size", "categories"), [("general", 1024, 32), ("text", 300, 6)])
def test_size_and_variety(name, size, categories):
    prompts = load_prompts(f"builtin:{name}")
    counts = Counter(prompt.category for prompt in prompts)
    assert len(prompts) >= size
    assert "" not in counts
    assert len(counts) >= categories
    assert max(counts.values()) <= len(prompts) / 4


@pytest.mark.parametrize("name", ["general", "general-dev", "questions-dev", "questions-test"])
def test_prompts_are_not_repeated(name):
    texts = load_prompts(f"builtin:{name}").texts
    assert similar(texts, texts) == []


@pytest.mark.parametrize("name", builtin_names("prompts", "behaviours"))
def test_no_set_has_a_prompt_twice(name):
    counts = Counter(same(text) for text in load_prompts(f"builtin:{name}").texts)
    assert [text for text, n in counts.items() if n > 1] == []


@pytest.mark.parametrize("profiled", sorted({"general", "text"} | profiled_in_studies()))
def test_what_is_profiled_is_tested_nowhere(profiled):
    """A converter that has seen a test prompt would be measured on what it was fitted on."""
    texts = load_prompts(f"builtin:{profiled}").texts
    held_out = [name for name in builtin_names("prompts", "behaviours") if name.endswith(("-dev", "-test"))]
    assert {"questions-test", "harmful-test", "lookalikes-test", "general-dev"} <= set(held_out)
    for name in (*held_out, "drift"):
        others = load_prompts(f"builtin:{name}").texts
        assert not set(map(same, texts)) & set(map(same, others)), name
        assert similar(texts, others) == [], name


def test_the_development_prompts_are_of_the_kind_that_is_profiled():
    """What a donor refuses among everyday requests must show on prompts that settings are chosen on."""
    general, dev = (load_prompts(f"builtin:{name}").prompts for name in ("general", "general-dev"))
    assert [prompt.category for prompt in dev] == list(dict.fromkeys(prompt.category for prompt in general))
    questions, words = (
        [np.mean([kind(prompt.text) for prompt in one]) for one in (general, dev)]
        for kind in (lambda text: text.endswith("?"), lambda text: len(text.split()))
    )
    assert questions[0] == pytest.approx(questions[1], abs=0.15)
    assert words[0] == pytest.approx(words[1], rel=0.15)


@pytest.mark.parametrize("name", ["text", "drift", "numbered-list", "pirate"])
def test_passages_are_not_repeated(name):
    passages = [f"{prompt.text} {prompt.response}" for prompt in load_prompts(f"builtin:{name}")]
    assert similar(passages, passages) == []


@pytest.mark.parametrize(("first", "second"), DISJOINT)
def test_splits_do_not_overlap(first, second):
    texts, others = (load_prompts(f"builtin:{name}").texts for name in (first, second))
    assert similar(texts, others) == []


def test_held_out_passages_are_not_in_the_text_set():
    held_out, seen = ([one.response or one.text for one in load_prompts(f"builtin:{n}")] for n in ("drift", "text"))
    assert similar(held_out, seen) == []


@pytest.mark.parametrize("name", ["numbered-list", "pirate"])
def test_behaviour_examples_have_replies(name):
    assert all(prompt.response.strip() for prompt in load_prompts(f"builtin:{name}"))


def test_numbered_list_replies_are_numbered_lists():
    for prompt in load_prompts("builtin:numbered-list"):
        assert re.match(r"1\. .+\n2\. .+", prompt.response)


def test_questions_do_not_ask_for_the_form_they_measure():
    for name in ("questions-dev", "questions-test"):
        for text in load_prompts(f"builtin:{name}").texts:
            assert not re.search(r"\blists?\b|\bnumbered\b|\bpirate", text, re.IGNORECASE), text


@pytest.mark.parametrize("name", builtin_names("prompts", "behaviours"))
def test_every_built_in_set_loads(name):
    prompts = load_prompts(f"builtin:{name}")
    assert prompts.name == f"builtin:{name}"
    assert all(prompt.text == prompt.text.strip() for prompt in prompts)


def test_unknown_built_in_set():
    with pytest.raises(InputError, match=r"builtin:generic.* there are drift, "):
        load_prompts("builtin:generic")


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\n  two \r\nthree", [("one", ""), ("two", ""), ("three", "")]),
        ("a.txt", "\ufeffone\x0bstill one\n", [("one\x0bstill one", "")]),
        ("a.csv", "prompt,response\none,1\ntwo,\n", [("one", "1"), ("two", "")]),
        ("a.csv", 'id,question\n1,"one,\nstill"\n2,"two ""quoted"""\n', [("one,\nstill", ""), ('two "quoted"', "")]),
        ("a.csv", "prompt\none\u2028still one\ntwo\n", [("one\u2028still one", ""), ("two", "")]),
        ("a.jsonl", '{"prompt": "one", "response": "1"}\n\n"two"\n', [("one", "1"), ("two", "")]),
        ("a.jsonl", '{"instruction": "one", "input": "x", "output": "1"}\n', [("one\n\nx", "1")]),
        ("a.jsonl", '{"instruction": "one", "input": " ", "output": "1"}\n', [("one", "1")]),
        ("a.txt", "one\rtwo\r", [("one", ""), ("two", "")]),
        ("a.JSONL", '{"prompt": "one"}\n', [("one", "")]),
        ("a.Csv", "prompt\none\n", [("one", "")]),
        ("a.jsonl", '{"conversations": ["one", "1", "more"]}\n', [("one", "1")]),
        ("a.jsonl", '{"prompt": "one\u2028still\x85"}\n"zwei ü"', [("one\u2028still\x85", ""), ("zwei ü", "")]),
    ],
)  # fmt: skip
def test_files(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content.encode())
    prompts = load_prompts(path)
    assert [(prompt.text, prompt.response) for prompt in prompts] == expected
    assert prompts.name == str(path)


def test_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,goal\none,1\n")
    assert load_prompts(path).texts == ["one"]
    assert load_prompts(path, column="goal").texts == ["1"]
    with pytest.raises(InputError, match=r"line 2: no column text; the row has prompt, goal"):
        load_prompts(path, column="text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "one"}\n\n{"prompt": \n', "line 3: not valid JSON"),
        ("a.jsonl", '{"prompt": "one\u2028"}\n{"prompt": "two"}\n[1]\n', "line 3: expected an object .*, got list"),
        ("a.jsonl", '"one"\n{"prompt": ""}\n', "line 2: the prompt .* is empty"),
        ("a.jsonl", '"one"\n{"prompt": 7}\n', "line 2: the prompt .* not a text"),
        ("a.jsonl", '"one"\n{"promt": "two"}\n', "line 2: no column prompt / .*; the row has promt"),
        ("a.jsonl", '{"prompt": "one", "response": ["1"]}\n', "line 1: the response is list"),
        ("a.csv", 'prompt,response\n"one\nstill one",1\n,2\n', "line 4: the prompt .* is empty"),
        ("a.csv", "prompt,response\n", "no prompts"),
        ("a.csv", "prompt\ntea\nHello, how are you?\n", "line 3: more fields than the 1 columns; quote"),
        ("a.csv", "prompt,prompt\none,two\n", "two columns of one name among prompt, prompt"),
        ("a.csv", 'prompt\n"one\ntwo\n', "not valid CSV"),
        ("a.json", '[\n {"prompt": "one"}\n]', "a file of type '.json', expected .txt, .csv, .jsonl"),
        ("a.tsv", "prompt\tresponse\none\ttwo\n", "a file of type '.tsv'"),
        ("a.csv", f"prompt\n{'x' * 200_000}\n", "line 2: .*field larger"),
        ("a.txt", "\n \n", "no prompts"),
        ("a.txt", b"one\ntw\xff\n", "not UTF-8 text"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)


def test_a_missing_file():
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        load_prompts("nowhere.jsonl")


def test_limit(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\nthree\n")
    assert load_prompts(path, limit=2).texts == ["one", "two"]
    assert load_prompts(path, limit=9).texts == ["one", "two", "three"]
    with pytest.raises(InputError, match="limit=0"):
        load_prompts(path, limit=0)


# -- prompt sets ------------------------------------------------------------------------------------------------------


def test_the_hash_depends_on_content_and_order_only():
    one, two = Prompt("one", "1", "numbers"), Prompt("two", "2")
    first = PromptSet((one, two), "a").hash
    assert PromptSet((one._replace(category="other"), two), "b").hash == first
    others = [(two, one), (one,), (one, two, two), (one._replace(text="One"), two), (one._replace(response=""), two)]
    others.append((Prompt("one1", ""), two))
    assert len({PromptSet(prompts).hash for prompts in others} | {first}) == len(others) + 1


def test_slices_are_prompt_sets():
    prompts = as_prompts(["one", "two", "three"])
    assert prompts[1:].texts == ["two", "three"]
    assert prompts[1:].hash == as_prompts(["two", "three"]).hash
    assert as_prompts(prompts) is prompts


@pytest.mark.parametrize(("texts", "message"), [([], "no prompts"), (["one", " \n"], "prompt 2 is empty")])
def test_empty_sets_and_prompts(texts, message):
    with pytest.raises(InputError, match=message):
        as_prompts(texts)


def test_prompts_in_mixed_forms():
    written = (Prompt("Tea?"), Prompt("Make Tea.", "Yes.", "tea"), Prompt("Why Tea?!"), Prompt("So?"), Prompt("?"))
    mixed = mixed_forms(PromptSet(written))
    assert mixed.texts == ["Tea?", "Make Tea", "why tea", "So?", "?"]
    assert mixed.prompts[1][1:] == ("Yes.", "tea")
