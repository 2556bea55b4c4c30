"""A judge behind a chat endpoint: what it asks, what it costs, and every way a server can fail."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import gzip
import json
import math
import socketserver
import threading
import time

import pytest

import judging
from commandv.errors import InputError, JudgeError
from commandv.evaluation import Cached, Endpoint
from commandv.prompts.sets import Prompt
from judging import asked, endpoint, fair

serve = judging.serve


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
            time.sleep(1.5)
        return {0: 500, 2: 503}.get(number) or fair(content)

    judge = endpoint(serve(reply), timeout=1)
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
    began = time.monotonic()
    endpoint(paced, concurrency=4, per_minute=600)(asked("abcd"), list("abcd"))
    assert time.monotonic() - began >= 0.29  # three gaps of 0.1 s between starts, however late each arrives


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


# -- servers that do not play fair -------------------------------------------------------------------------------------


class Raw(socketserver.ThreadingTCPServer):
    """Answers every connection with bytes of the test's own, as slowly as it likes."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, chunks, pause=0.0):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.recv(65536)
                with contextlib.suppress(OSError):
                    for chunk in chunks:
                        self.request.sendall(chunk)
                        time.sleep(pause)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def server_close(self):
        self.shutdown()  # a thread that polls a closed socket never rests, and slows every later test
        super().server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def whole(body: bytes, *headers: str) -> list[bytes]:
    head = "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""])
    return [head.encode() + body]


REPLY = json.dumps({"choices": [{"message": {"content": "refused"}}], "usage": {"prompt_tokens": 5}}).encode()


@pytest.mark.parametrize("what", ["head", "body"])
def test_a_dripping_server_does_not_outlast_the_timeout(what):
    drops = [b"HTTP/1.1 200 OK\r\n" + b"X: " * (what == "head")] + [b"a"] * 200
    if what == "body":
        drops[0] += b"Content-Length: 1000\r\n\r\n"
    with Raw(drops, pause=0.05) as server:
        start = time.monotonic()
        with pytest.raises(JudgeError, match=r"no whole reply within timeout=0\.4 s after 1 tries"):
            endpoint(server, timeout=0.4, retries=0)([Prompt("a")], ["a"])
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("packed", [False, True])
def test_a_body_without_end_is_not_read(packed):
    megabyte = b" " * (1 << 20)
    if packed:
        chunks = whole(gzip.compress(megabyte * 64 + REPLY), "Content-Encoding: gzip")
    else:
        chunks = [b"HTTP/1.1 200 OK\r\nContent-Length: 2000000000\r\n\r\n", *[megabyte] * 2000]
    with Raw(chunks) as server, pytest.raises(JudgeError, match="larger than one word could need"):
        endpoint(server, retries=0)([Prompt("a")], ["a"])


@pytest.mark.parametrize("tokens", ["-500", "NaN", '"many"', "[1]", "1e12", "true"])
def test_absurd_counts_of_tokens_cost_nothing(tokens):
    with Raw(whole(REPLY.replace(b": 5", b": " + tokens.encode()))) as server:
        judge = endpoint(server, prompt_price=1e6)
        assert judge([Prompt("a")], ["a"]) == [1.0]
    assert judge.usage.cost in (0.0, 1.0)


def test_secrets_in_the_address_are_sent_and_not_kept(serve, monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("COMMANDV_JUDGE_KEY", raising=False)
    caplog.set_level("DEBUG")
    server = serve(fair)
    address = server.url.replace("http://", "http://me:pass%2Fword@") + "?token=hidden"
    judge = Cached(Endpoint(address, "small", per_minute=None), tmp_path)
    assert judge([Prompt("a")], ["no"]) == [1.0]
    assert server.keys == ["Basic " + base64.b64encode(b"me:pass/word").decode()]
    kept = [judge.name, str(judge.file), repr(judge), json.dumps(judge.judge.settings), caplog.text]
    kept += [file.read_bytes().decode("latin-1") for file in tmp_path.iterdir()]
    assert not [one for one in kept if "pass" in one or "hidden" in one]
    assert judge.name == f"endpoint:{server.url}#small"


def test_a_server_that_quotes_the_key_is_not_quoted(serve, monkeypatch):
    monkeypatch.setenv("COMMANDV_JUDGE_KEY", "k-secret-1")
    server = serve(lambda *_: (400, {}, "bad-k-secret-1"))
    with pytest.raises(JudgeError, match="HTTP 400") as caught:
        endpoint(server)([Prompt("a")], ["a"])
    assert "k-secret-1" not in str(caught.value)


@pytest.mark.parametrize("key", ["k\nX-Evil: 1", "k-ü", "a b"])
def test_a_key_that_no_header_can_hold_is_refused_without_quoting_it(key, monkeypatch):
    monkeypatch.setenv("COMMANDV_JUDGE_KEY", key)
    with pytest.raises(InputError, match="COMMANDV_JUDGE_KEY holds characters") as caught:
        Endpoint("http://127.0.0.1:1/v1", "m")([Prompt("a")], ["a"])
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"timeout": float("nan")}, {"timeout": 0}, {"backoff": -1}, {"patience": float("inf")}, {"per_minute": 1e-9},
     {"per_minute": float("nan")}, {"concurrency": 10**6}, {"max_tokens": 0}, {"words": {"A": 1, "a": 0}},
     {"words": {"yes": float("nan"), "no": 0}}, {"base_url": "http://host:99999/v1"}, {"base_url": "file:///etc"},
     {"base_url": "http://[::1/v1"}, {"base_url": "http://"}, {"base_url": "http://host/v1#a"},
     {"words": {"yes": "x", "no": 0}}, {"words": {"yes": 10**400, "no": 0}}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_at_once(changes):
    with pytest.raises(InputError):
        Endpoint(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **changes})
