"""Judges: phrase lists, a classifier and a guard trained here, a chat endpoint on this machine, kept judgments."""

from __future__ import annotations

import email.utils
import functools
import json
import math
import multiprocessing
import os
import runpy
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from commandv.errors import FormatError, InputError, JudgeError, ModelError
from commandv.evaluate import (
    GRADERS,
    JUDGES,
    ByText,
    Cached,
    Classifier,
    Endpoint,
    Guard,
    Judgment,
    Phrases,
    load_judge,
    refusal_phrases,
)
from commandv.prompts import Prompt

ROOT = Path(__file__).resolve().parent.parent


def asked(answers):
    return [Prompt(f"request {i}") for i in range(len(answers))]


# Phrase lists


@pytest.mark.parametrize(
    ("name", "answer", "found"),
    [
        ("gcg", "Well, I'm sorry.", True),
        ("gcg", "i'm sorry", False),  # as published: case matters
        ("gcg", "As an apple grower I know", True),  # and so it is
        ("arditi", "well, i CAN'T do it", True),
        ("arditi", "I won't do it", False),
        ("xstest", "  No, it is not.", True),
        ("xstest", "Well, no, it is not.", False),
        ("refusal", "I must decline.", True),
        ("refusal", "I can't wait", False),
    ],
)
def test_phrase_lists_match_as_published(name, answer, found):
    judge = load_judge(name)
    assert judge([Prompt("x")], [answer]) == [float(found)]
    assert (judge.name, judge.unit) == (name, "rate")


def test_phrase_lists_are_whole_and_name_their_sources():
    assert [len(refusal_phrases(name).phrases) for name in ("gcg", "arditi", "xstest")] == [10, 12, 21]
    lists = json.loads((ROOT / "src/commandv/data/judges/refusal-phrases.json").read_text("utf-8"))
    assert all("github.com" in entry["source"] for entry in lists.values())
    with pytest.raises(InputError, match="expected one of gcg"):
        refusal_phrases("other")


@pytest.mark.parametrize(("phrases", "match"), [((), "contains"), (("", "a"), "contains"), (("a",), "anywhere")])
def test_phrases_that_would_find_everything_or_nothing_are_refused(phrases, match):
    with pytest.raises(InputError, match="expected at least one"):
        Phrases("mine", phrases, match)


# The table


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        *((name, name) for name in (*GRADERS, "gcg", "arditi", "xstest")),
        ("classifier:a/b", "classifier:a/b"),
        ("classifier:a/b#REJECTION", "classifier:a/b#REJECTION"),
        ("guard:a/b", "guard:a/b"),
        ("endpoint:http://host:1/v1#small", "endpoint:http://host:1/v1#small"),
    ],
)
def test_every_spec_gives_its_judge(spec, name):
    judge = load_judge(spec)
    assert (judge.name, judge.unit) == (name, "rate")
    assert isinstance(judge, (ByText, Phrases, Cached))
    assert spec.partition(":")[0] in JUDGES


@pytest.mark.parametrize(
    "spec", ["", "other", "refusal:x", "guard", "guard:", "classifier:", "endpoint:http://host", "endpoint:host#m"]
)
def test_other_specs_are_refused(spec):
    with pytest.raises(InputError, match="expected"):
        load_judge(spec)


# Hand-labelled cases


@functools.cache
def benchmark():
    return runpy.run_path(str(ROOT / "benchmarks" / "judges.py"))


def test_the_committed_figures_are_reproduced():
    measured = benchmark()["measure"]()
    assert measured == json.loads((ROOT / "benchmarks/results/judges.json").read_text("utf-8"))
    assert benchmark()["page"](measured) == (ROOT / "docs/benchmarks/judges.md").read_text("utf-8")


def test_the_cases_are_many_and_on_both_halves():
    cases = [json.loads(line) for line in (ROOT / "tests/data/judged.jsonl").read_text("utf-8").splitlines()]
    assert len(cases) >= 220
    for grader in ("refusal", "numbered-list", "pirate"):
        for split in ("dev", "test"):
            for label in (0, 1):
                assert sum(c["split"] == split and c["labels"].get(grader) == label for c in cases) >= 8


# A classifier, trained here

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


# A guard, trained here


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


# An endpoint, served here


class Server(ThreadingHTTPServer):
    """Answers as the test says: `reply(body, number)` returns text, a status, or (status, headers, error code)."""

    daemon_threads = True

    def __init__(self, reply):
        self.reply, self.bodies, self.times, self.keys = reply, [], [], []
        self.running = self.most = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.keys.append(self.headers.get("Authorization"))
            server.running += 1
            server.most = max(server.most, server.running)
        reply = server.reply(body["messages"][0]["content"], number)
        with server.lock:
            server.running -= 1
        status, headers, content = 200, {}, None
        if isinstance(reply, str):
            message = {"role": "assistant", "content": reply}
            content = {"choices": [{"message": message}], "usage": {"prompt_tokens": 100, "completion_tokens": 2}}
        elif isinstance(reply, tuple):
            status, headers, code = reply
            content = {"error": {"message": "the answer was: SECRET", "code": code}}
        else:
            status, content = reply, {"error": {}}
        data = json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client did not wait

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        server = Server(reply)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def fair(content, _number=0):
    return "Refused." if '"answer": "no' in content else "answered"


def endpoint(server, **settings):
    return Endpoint(server.url, "small", **{"per_minute": None, "backoff": 0.01, **settings})


def test_an_endpoint_judges_and_counts_its_cost(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "k-1")
    server = serve(fair)
    judge = endpoint(server, api_key="MY_KEY", prompt_price=2.0, completion_price=10.0)
    answers = ['no "way"', "yes", "no", "yes, { } and \n more"]
    assert judge(asked(answers), answers) == [1.0, 0.0, 1.0, 0.0]
    assert judge.unit == "rate"
    assert (judge.usage.requests, judge.usage.prompt_tokens, judge.usage.completion_tokens) == (4, 400, 8)
    assert judge.usage.cost == pytest.approx((400 * 2 + 8 * 10) / 1e6)
    assert set(server.keys) == {"Bearer k-1"}
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("small", 0, 16)
    assert "Reply with one word: refused or answered." in body["messages"][0]["content"]
    assert "k-1" not in repr(judge) + json.dumps(judge.settings)


def test_no_key_is_sent_without_its_variable(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    monkeypatch.delenv("COMMANDV_JUDGE_KEY", raising=False)
    server = serve(fair)
    assert endpoint(server)([Prompt("a")], ["no"]) == [1.0]
    assert server.keys == [None]


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(serve, as_date):
    wait = email.utils.formatdate(time.time() + 2.2, usegmt=True) if as_date else "0.4"
    server = serve(lambda content, number: (429, {"Retry-After": wait}, "") if number == 0 else fair(content))
    judge = endpoint(server, concurrency=1)
    assert judge(asked("ab"), ["no", "yes"]) == [1.0, 0.0]
    assert server.times[1] - server.times[0] >= (0.9 if as_date else 0.39)
    assert (judge.usage.requests, judge.usage.retries) == (3, 1)


def test_a_server_that_wants_too_long_a_pause_is_given_up(serve):
    judge = endpoint(serve(lambda *_: (429, {"Retry-After": "9999"}, "")))
    with pytest.raises(JudgeError, match=r"HTTP 429, to be tried again in 9999 s \(patience=300\) after 1 tries"):
        judge([Prompt("a")], ["a"])


def test_errors_and_timeouts_are_tried_again(serve):
    def reply(content, number):
        if number == 1:
            time.sleep(0.6)
        return {0: 500, 2: 503}.get(number) or fair(content)

    judge = endpoint(serve(reply), timeout=0.3)
    assert judge([Prompt("a")], ["no"]) == [1.0]
    assert (judge.usage.requests, judge.usage.retries) == (4, 3)


def test_nonsense_is_no_judgment_and_is_counted(serve, caplog):
    words = iter(["Perhaps", "", "not refused", "REFUSED, for sure"])
    judge = endpoint(serve(lambda *_: next(words)), concurrency=1)
    found = judge(asked("abcd"), list("abcd"))
    assert [math.isnan(label) for label in found] == [True, True, True, False]
    assert found[3] == 1.0
    assert judge.usage.nonsense == 3
    assert "no judgment on 3 of 4 answers" in caplog.text


def test_a_filtered_answer_has_no_judgment(serve):
    server = serve(lambda content, _: (400, {}, "content_filter") if '"no' in content else "answered")
    found = endpoint(server)(asked("ab"), ["no", "yes"])
    assert math.isnan(found[0])
    assert found[1] == 0.0


@pytest.mark.parametrize(
    ("status", "message"), [(401, "invalid_code; put a valid key into the environment"), (404, "check the address")]
)
def test_a_refused_request_is_not_repeated(serve, status, message):
    server = serve(lambda *_: (status, {}, "invalid_code"))
    with pytest.raises(JudgeError, match=message) as caught:
        endpoint(server, concurrency=1)(asked("abc"), list("abc"))
    assert len(server.bodies) == 1
    assert caught.value.judged == 0
    assert "SECRET" not in str(caught.value)  # the server's message may quote what was judged


def test_requests_keep_to_the_limits(serve):
    def slow(content, _):
        time.sleep(0.05)
        return fair(content)

    server = serve(slow)
    endpoint(server, concurrency=2)(asked("abcdef"), list("abcdef"))
    assert server.most <= 2
    paced = serve(fair)
    endpoint(paced, concurrency=4, per_minute=600)(asked("abcd"), list("abcd"))
    assert paced.times[-1] - paced.times[0] >= 0.29  # three gaps of 0.1 s


@pytest.mark.parametrize(
    "settings",
    [
        {"words": {"one": 1}},
        {"words": {"two words": 1, "b": 0}},
        {"concurrency": 0},
        {"retries": -1},
        {"per_minute": 0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match="expected"):
        Endpoint("http://host", "m", **settings)


def test_words_with_other_labels_are_points(serve):
    judge = endpoint(serve(lambda *_: "3"), words={"1": 1, "3": 3}, instruction="How good is the answer?")
    assert judge([Prompt("a")], ["a"]) == [3.0]
    assert judge.unit == "points"


# Kept judgments


def test_a_kept_judgment_is_not_asked_for_again(serve):
    server = serve(lambda content, _: "hm" if "odd" in content else fair(content))
    answers = ["no", "yes", "odd", "no"]
    prompts = [Prompt("the same")] * 4
    first = Cached(endpoint(server))(prompts, answers)
    assert len(server.bodies) == 3  # equal answers are asked about once
    again = Cached(endpoint(server, concurrency=1, retries=0))(prompts, answers)
    assert len(server.bodies) == 3
    assert again[:2] == first[:2] == [1.0, 0.0]
    assert math.isnan(again[2])
    assert math.isnan(first[2])
    Cached(endpoint(server, instruction="Something else?"))(prompts, answers)
    assert len(server.bodies) == 6


def test_the_judged_text_is_not_stored(serve, cache):
    server = serve(lambda content, _: "wickedness itself" if "evil" in content else fair(content))
    Cached(endpoint(server))([Prompt("deed")] * 2, ["no wickedness", "evil"])
    stored = b"".join(file.read_bytes() for file in cache.rglob("*") if file.is_file())
    assert b"refused" in stored
    assert not any(word in stored for word in (b"wickedness", b"evil", b"deed"))


def test_a_run_goes_on_after_a_failure(serve):
    broken = True

    def reply(content, number):
        return 500 if broken and number >= 3 else fair(content)

    server = serve(reply)
    judge = Cached(endpoint(server, concurrency=1, retries=1))
    answers = ["no", "yes", "no 2", "yes 2", "no 3", "yes 3"]
    with pytest.raises(JudgeError, match=r"HTTP 500 after 2 tries\. 3 of 6 answers are judged and kept") as caught:
        judge(asked(answers), answers)
    assert caught.value.judged == 3
    broken = False
    before = len(server.bodies)
    assert judge(asked(answers), answers) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert len(server.bodies) - before == 3


def test_without_a_cache_the_error_says_so(serve):
    server = serve(lambda content, number: fair(content) if number < 1 else 500)
    with pytest.raises(JudgeError, match=r"1 of 3 answers were judged; Cached"):
        endpoint(server, concurrency=1, retries=0)(asked("abc"), list("abc"))


class Steady:
    """Judges one answer at a time; calls `then` after each one that is kept."""

    name, unit, settings = "steady", "rate", {"kind": "steady"}

    def __init__(self, then=lambda place: None):
        self.then, self.asked = then, 0

    def judgments(self, prompts, answers):
        for place in range(len(answers)):
            self.asked += 1
            yield [Judgment(place, 1.0, "yes")]
            self.then(place)


def in_processes(*targets):
    processes = [multiprocessing.get_context("fork").Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


def test_a_killed_run_keeps_what_was_judged():
    answers = [str(i) for i in range(10)]

    def kill(place):
        if place == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_processes(lambda: Cached(Steady(kill))(asked(answers), answers)) == [-signal.SIGKILL]
    judge = Steady()
    assert Cached(judge)(asked(answers), answers) == [1.0] * 10
    assert judge.asked == 4


def test_two_processes_may_share_a_file():
    answers = [str(i) for i in range(100)]

    def run():
        assert Cached(Steady(lambda _: time.sleep(0.001)))(asked(answers), answers) == [1.0] * 100

    assert in_processes(run, run) == [0, 0]
    judge = Steady()
    assert Cached(judge)(asked(answers), answers) == [1.0] * 100
    assert judge.asked == 0


def test_a_damaged_file_is_an_error_that_names_it(serve):
    judge = Cached(endpoint(serve(fair)))
    judge.file.parent.mkdir(parents=True)
    judge.file.write_bytes(b"not a database, but long enough to look like one" * 40)
    with pytest.raises(FormatError, match="not a file of judgments"):
        judge(asked("a"), ["a"])


def test_a_classifier_is_kept_too_and_loaded_only_when_needed(classifier, monkeypatch):
    judge = load_judge(f"classifier:{classifier}#REFUSAL")
    assert judge(asked("ab"), ["no tea no", "yes tea yes"]) == [1.0, 0.0]
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", None)
    fresh = load_judge(f"classifier:{classifier}#REFUSAL")
    assert fresh(asked("ab"), ["no tea no", "yes tea yes"]) == [1.0, 0.0]
