"""A real server on a free port of this machine, over a tiny model."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import openai

from commandv.serving.app import create_app
from commandv.serving.engine import Engine
from commandv.serving.listening import address, listen
from commandv.serving.server import Server

ASKED = [{"role": "user", "content": "How do I make a good cup of tea?"}]


class Served(NamedTuple):
    url: str
    engine: Engine

    def client(self, *, api_key: str = "none", max_retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=max_retries, timeout=30)


@contextlib.contextmanager
def serving(
    lm: Any, adapters: Any, *, max_rows: int = 8, max_waiting: int = 64, patience: float = 1.0, **options: Any
) -> Iterator[Served]:
    """Serve until the block ends."""
    with (
        listen("127.0.0.1", 0) as listening,
        Engine(lm, adapters, max_rows=max_rows, max_waiting=max_waiting) as engine,
    ):
        app = create_app(engine, **options)
        server = Server(app, engine.close, patience=patience)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield Served(address(listening), engine)
        finally:
            server.should_exit = True
            thread.join(10)


def until(true: Any, seconds: float = 10.0) -> bool:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


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
