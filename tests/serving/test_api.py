from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

import commandv as cv
import tiny
from commandv.errors import InputError
from commandv.models.encoding import encode
from commandv.serving.app import create_app
from commandv.serving.engine import Engine
from commandv.serving.listening import listen
from places import ROOT
from served import serving, until

ASKED = [{"role": "user", "content": "How do I make a good cup of tea?"}]


@pytest.fixture(scope="module")
def lm():
    return tiny.tiny_lm(chat=True)


@pytest.fixture
def own():
    """A model for a server of the test's own: while it runs, its engine alone uses it."""
    return tiny.tiny_lm(chat=True)


@pytest.fixture(scope="module")
def known(lm):
    return {"pirate": tiny.random_adapter(lm, (1, 2)), "list": tiny.random_adapter(lm, (2,), "all", seed=3, size=0.3)}


@pytest.fixture(scope="module")
def alone(lm, known):
    """What the library says to ASKED by itself, made before a server uses the model."""
    prompt = [ASKED[0]["content"]]
    texts = {"base": cv.generate(lm, prompt, max_new_tokens=8)[0]}
    with cv.attach(lm, known["pirate"], scale=0.6), cv.attach(lm, known["list"]):
        texts["base+pirate@0.6+list"] = cv.generate(lm, prompt, max_new_tokens=8)[0]
    assert len(set(texts.values())) == 2
    return texts


@pytest.fixture(scope="module")
def served(lm, known, alone):
    with serving(lm, known) as one:
        yield one


@pytest.fixture(scope="module")
def client(served):
    return served.client()


def chat(client, model="base", **more):
    return client.chat.completions.create(model=model, messages=ASKED, **{"max_tokens": 8, "temperature": 0, **more})


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:
        return response.read().decode()


def post(served, body, path="/v1/chat/completions", **headers):
    """Send bytes as they are; returns status, headers and the parsed body."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
    headers = {"Content-Type": "application/json", **headers}
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
    response = connection.getresponse()
    return response.status, response.headers, json.loads(response.read() or b"null")


# -- what clients get ---------------------------------------------------------------


@pytest.mark.parametrize("model", ["base", "base+pirate@0.6+list"])
def test_the_models_name_picks_the_behaviour(client, alone, model, lm):
    answer = chat(client, model)
    assert answer.choices[0].message.content == alone[model]
    assert answer.model == model
    assert answer.choices[0].finish_reason == "length"
    prompt = len(encode(lm, ASKED[0]["content"]).ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        prompt,
        8,
        prompt + 8,
    )


@pytest.mark.parametrize("model", ["base", "base+pirate@0.6+list"])
def test_streams_hold_the_same_text_and_the_usage_if_wanted(client, alone, model):
    pieces = list(chat(client, model, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.choices[0].delta.content or "" for one in pieces if one.choices) == alone[model]
    assert len([one for one in pieces if one.choices]) > 3
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage.completion_tokens == 8
    assert all(one.usage is None for one in chat(client, model, stream=True))


def test_completions_take_texts_and_tokens(client, lm):
    text = "The quick brown fox"
    ids = list(lm.tokenizer(text).input_ids)
    answers = client.completions.create(model="base", prompt=[text, "Read the book."], max_tokens=6, temperature=0)
    same = client.completions.create(model="base", prompt=ids, max_tokens=6, temperature=0)
    assert [one.index for one in answers.choices] == [0, 1]
    assert answers.choices[0].text == same.choices[0].text != answers.choices[1].text
    assert answers.usage.prompt_tokens == len(ids) + len(lm.tokenizer("Read the book.").input_ids)
    streamed = client.completions.create(model="base", prompt=text, max_tokens=6, temperature=0, stream=True)
    assert "".join(one.choices[0].text for one in streamed) == same.choices[0].text


def test_several_answers_differ_and_come_again_with_their_seed(client):
    first, again = (
        [one.message.content for one in chat(client, n=3, temperature=1.5, seed=7).choices] for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == 3


def test_log_probabilities_are_those_of_the_model(client, lm):
    told = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(told) == 8
    for one in told:
        assert one.logprob == max(other.logprob for other in one.top_logprobs) <= 0
        assert len(one.top_logprobs) == 3
    streamed = [one.choices[0].logprobs for one in chat(client, logprobs=True, stream=True) if one.choices]
    assert [entry.logprob for one in streamed if one for entry in one.content] == pytest.approx(
        [one.logprob for one in told]
    )
    text = client.completions.create(model="base", prompt="The cat", max_tokens=4, temperature=0, logprobs=2).choices[0]
    assert "".join(text.logprobs.tokens) == text.text
    assert text.logprobs.text_offset[0] == 0
    assert all(1 <= len(one) <= 2 for one in text.logprobs.top_logprobs)  # halves of characters look alike


def test_stop_strings_end_the_answer(client, alone):
    stop = alone["base"][4:6]
    answer = chat(client, stop=[stop, "never said"]).choices[0]
    assert answer.message.content == alone["base"].split(stop)[0]
    assert answer.finish_reason == "stop"


def test_models_are_listed_and_looked_up(client):
    assert [one.id for one in client.models.list()] == ["base", "base+pirate", "base+list"]
    assert client.models.retrieve("base+list@0.5").id == "base+list@0.5"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("base+liszt")


def test_many_clients_with_different_behaviours_share_the_server(client, alone):
    found: list[tuple[str, str]] = []

    def ask(i):
        name = list(alone)[i % 2]
        found.append((name, chat(client, name).choices[0].message.content))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(found) == sorted((name, text) for name, text in list(alone.items()) * 12)


def test_the_plain_format_takes_turns_and_no_system_prompt():
    lm = tiny.tiny_lm()
    expected = cv.generate(lm, ["And then?"], turns=[("Hi", "Hello")], max_new_tokens=6)
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "And then?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    with serving(lm, {}) as one:
        ask = one.client().chat.completions.create
        assert (
            ask(model="base", messages=messages, max_tokens=6, temperature=0).choices[0].message.content == expected[0]
        )
        parts = "".join(
            piece.choices[0].delta.content or ""
            for piece in ask(model="base", messages=messages, max_tokens=6, temperature=0, stream=True)
        )
        assert parts == expected[0]
        with pytest.raises(openai.BadRequestError, match="plain format"):
            ask(model="base", messages=[{"role": "system", "content": "Be brief."}, *messages])


# -- what is refused ----------------------------------------------------------------


def test_an_unknown_behaviour_is_not_found_and_told_the_near_one(client):
    with pytest.raises(openai.NotFoundError, match=r"did you mean base\+pirate\?") as caught:
        chat(client, "base+pirat")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n: "),
        ({"n": 99}, "n: "),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "at most 1024"),
        ({"max_tokens": 500}, "the context of tiny-llama is 512"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "at most 4"),
        ({"stop": ""}, "empty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"logit_bias": {"5": 100}}, "logit_bias is not supported"),
        ({"extra_body": {"tempurature": 1}}, "tempurature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "empty prompt"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a b c d e f" * 400}]}, "the context of tiny-llama is 512"),
        ({"model": "base+pirate+pirate"}, "twice"),
        ({"model": "base+pirate@much"}, "expected a number"),
        ({"model": "base+pirate@1e300"}, "expected a number"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_is_said(client, more, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "base", "messages": ASKED, "max_tokens": 4, **more})
    assert words in str(caught.value)
    assert caught.value.type == "invalid_request_error"


def test_settings_that_change_nothing_are_taken(client, alone):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0, "user": "me", "response_format": {"type": "text"}}
    assert chat(client, **neutral).choices[0].message.content == alone["base"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b"[1]", 400), (b"\xff\xfe", 400), (b'{"model": "base"}', 400), (b"x" * 3000, 413)],
)
def test_bodies_that_are_no_request(own, body, status):
    with serving(own, {}, max_body=2000) as served:
        found, _, answer = post(served, body)
        assert found == status
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        chunked = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
        chunked.request("POST", "/v1/completions", iter([b" " * 1500] * 2), {"Content-Type": "application/json"})
        assert chunked.getresponse().status == 413


def test_half_of_a_surrogate_pair_is_no_text(served):
    half = "\ud83d"
    for path, body in (
        ("chat/completions", {"messages": [{"role": "user", "content": half}]}),
        ("completions", {"prompt": half}),
    ):
        status, _, answer = post(served, {"model": "base", **body}, f"/v1/{path}")
        assert (status, "surrogate" in answer["error"]["message"]) == (400, True)


def test_a_seed_may_be_any_whole_number(client):
    one, same = (chat(client, n=2, temperature=1.5, seed=seed).choices for seed in (-1, 2**32 - 1))
    assert [a.message.content for a in one] == [b.message.content for b in same]
    assert one[0].message.content != one[1].message.content


def test_a_request_that_a_web_page_could_send_unasked_is_refused(served):
    body = {"model": "base", "messages": ASKED, "max_tokens": 1}
    assert post(served, body)[0] == 200
    assert post(served, body, **{"Content-Type": "text/plain"})[0] == 400


def test_what_is_wrong_with_a_body_is_said(served):
    assert "not JSON" in post(served, b'{"model": "base",')[2]["error"]["message"]
    body = {"model": "base", "messages": ASKED, "max_tokens": 1}
    assert (
        "Content-Type: application/json" in post(served, body, **{"Content-Type": "text/plain"})[2]["error"]["message"]
    )
    assert "/v1" in post(served, body, "/chat/completions")[2]["error"]["message"]


def test_a_server_that_stops_ends_what_it_streams_with_an_error(own):
    with pytest.raises(openai.APIError, match="closed before the answer was complete"):  # noqa: PT012
        with serving(own, {}, patience=0) as served:
            pieces = iter(chat(served.client(), stream=True, max_tokens=400))
            next(pieces)
        list(pieces)


def test_unknown_paths_and_methods_answer_in_the_same_form(served):
    assert post(served, {}, "/v1/embeddings")[2]["error"]["type"] == "not_found_error"
    status, _, answer = post(served, {}, "/v1/models")
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")


def test_the_key_is_asked_for(own):
    with serving(own, {}, api_key="s3cret-ü") as served:
        for wrong in ("no", "s3cret", ""):
            assert post(served, {"model": "base", "messages": ASKED}, Authorization=f"Bearer {wrong}")[0] == 401
        with pytest.raises(openai.AuthenticationError, match="API key"):
            served.client(api_key="no").models.list()
        sent = {"Authorization": "Bearer s3cret-ü".encode()}
        assert post(served, {"model": "base", "messages": ASKED, "max_tokens": 1}, **sent)[0] == 200
        assert json.loads(get(f"{served.url}/health"))["status"] == "ok"


@pytest.mark.parametrize("key", ["", "  ", "\udcff"])
def test_a_key_that_everybody_has_or_nobody_can_send_is_refused(own, key):
    with Engine(own, {}) as engine, pytest.raises(InputError, match="api_key"):
        create_app(engine, api_key=key)


# -- load, clients that leave, the end ----------------------------------------------


def test_a_full_queue_says_when_to_come_again(own):
    with serving(own, {}, max_rows=1, max_waiting=0) as served:
        stream = chat(served.client(), stream=True, max_tokens=400)
        pieces = iter(stream)  # kept: the stream is closed with it
        next(pieces)
        status, headers, answer = post(served, {"model": "base", "messages": ASKED, "max_tokens": 1})
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert int(headers["Retry-After"]) >= 1
        with pytest.raises(openai.RateLimitError):
            chat(served.client())
        stream.close()
        assert until(lambda: served.engine.n_running == 0)
        assert chat(served.client(max_retries=2)).choices[0].message.content


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(own, stream):
    with serving(own, {}, max_rows=2) as served:
        host, port = served.url.removeprefix("http://").split(":")
        body = json.dumps({"model": "base", "messages": ASKED, "max_tokens": 450, "temperature": 0, "stream": stream})
        with socket.create_connection((host, int(port))) as gone:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            gone.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            assert until(lambda: served.engine.n_running == 1)
        begun = time.monotonic()
        assert until(lambda: served.engine.n_running == 0, 5)
        assert "commandv_cancelled_total 1.0" in get(f"{served.url}/metrics")
        assert time.monotonic() - begun < 5


def test_a_model_that_fails_in_mid_stream_says_so_in_the_stream(own, monkeypatch):
    forward, failing = own.model.forward, threading.Event()

    def fail(*args, **given):
        if failing.is_set():
            failing.clear()
            raise RuntimeError("a device failed")
        return forward(*args, **given)

    monkeypatch.setattr(own.model, "forward", fail)
    with serving(own, {}) as served:
        pieces = iter(chat(served.client(), stream=True, max_tokens=400))
        next(pieces), next(pieces)
        failing.set()
        with pytest.raises(openai.APIError, match="a device failed"):
            list(pieces)
        failing.set()
        with pytest.raises(openai.InternalServerError, match="a device failed"):
            chat(served.client())
        assert chat(served.client()).choices[0].message.content


def test_a_stopped_engine_is_not_healthy(own):
    with serving(own, {}) as served:
        served.engine.close()
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(f"{served.url}/health")
        with pytest.raises(openai.InternalServerError, match="not running"):
            chat(served.client())


def test_two_servers_on_one_port():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is taken"):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match="check --host"):
        listen("192.0.2.1", 0)
    with pytest.raises(InputError, match="expected 0 to 65535"):
        listen("127.0.0.1", 70000)


def test_metrics_count_what_happened(own, known):
    with serving(own, known) as served:
        chat(served.client(), "base+pirate@0.3")
        chat(served.client(), "base+pirate@0.7+list", stream=True).close()
        with pytest.raises(openai.NotFoundError):
            chat(served.client(), "base+made-up")
        page = get(f"{served.url}/metrics")
    assert 'commandv_behaviours_total{adapter="pirate"} 2.0' in page
    assert 'commandv_behaviours_total{adapter="list"} 1.0' in page
    assert 'commandv_responses_total{path="/v1/chat/completions",status="404"} 1.0' in page
    assert "commandv_answer_seconds_count" in page
    assert "made-up" not in page


# -- the page -----------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere(served):
    with urllib.request.urlopen(served.url, timeout=10) as response:
        page, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "//" not in page.replace("// ", "").replace("http://www.w3.org", "")
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_page_on_serving_runs(own, monkeypatch, capsys):
    """A tiny model stands in for the page's, and this test's server for the one it says to start."""
    adapters = {"list": tiny.random_adapter(own, (2,), "all"), "pirate": tiny.random_adapter(own, (1,))}
    monkeypatch.setattr(cv, "load_model", lambda _name: tiny.tiny_lm(chat=True))
    monkeypatch.setattr(cv, "load_adapter", lambda _name: adapters["list"])
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    client, library = re.findall(r"```python\n(.*?)```", page, re.S)
    with serving(own, adapters) as served:
        exec(client.replace("http://127.0.0.1:8000", served.url), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("base")] == [
        "base",
        "base+list",
        "base+pirate@0.6+list",
    ]
    exec(library, {})
    assert capsys.readouterr().out.strip()
