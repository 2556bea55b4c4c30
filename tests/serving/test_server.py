"""The server itself: its key, its queue, clients that leave, its end, what it counts, and its page."""

from __future__ import annotations

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
from commandv.serving.app import create_app
from commandv.serving.engine import Engine
from commandv.serving.listening import listen
from places import ROOT
from served import ASKED, chat, get, post, serving, until


@pytest.fixture
def own():
    """A model for a server of the test's own: while it runs, its engine alone uses it."""
    return tiny.tiny_lm(chat=True)


def test_a_server_that_stops_ends_what_it_streams_with_an_error(own):
    with pytest.raises(openai.APIError, match="closed before the answer was complete"):  # noqa: PT012
        with serving(own, {}, patience=0) as served:
            pieces = iter(chat(served.client(), stream=True, max_tokens=400))
            next(pieces)
        list(pieces)


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


def test_metrics_count_what_happened(own):
    known = {name: tiny.random_adapter(own, (2,), "all", size=0.3) for name in ("pirate", "list")}
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


def test_the_page_loads_nothing_from_elsewhere(own):
    with serving(own, {}) as served, urllib.request.urlopen(served.url, timeout=10) as response:
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
