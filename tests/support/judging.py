"""Answers to judge, and a chat endpoint on this machine that says what a test wants."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from commandv.evaluation import Endpoint
from commandv.prompts.sets import Prompt


def asked(answers):
    return [Prompt(f"request {i}") for i in range(len(answers))]


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
