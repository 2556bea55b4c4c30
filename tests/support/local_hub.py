"""A small Hugging Face hub on 127.0.0.1: what `huggingface_hub` asks for in uploads and downloads."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

TOKEN = "hf_local"
LARGE = (".safetensors", ".bin", ".gguf", ".pt", ".npy", ".npz")


@dataclass
class Repo:
    """Commits in order, each a name and files; branches and tags lead to commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        oid = hashlib.sha1(repr((len(self.commits), content)).encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        return oid

    def at(self, revision: str = "main") -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


class Hub:
    """What the hub holds, what it was asked, and what it is told to do wrong.

    Attributes:
        repos: (type, name) -> repository.
        asked: method and path of every request, in order.
        wrong: (method, pattern of a path) -> status, headers and body to answer; `half` instead sends half of a file,
            `other` a file with other content, each so often.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.asked: list[str] = []
        self.wrong: dict[tuple[str, str], Any] = {}
        self.times: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.url = ""

    def repo(self, name: str, kind: str = "model", **how: Any) -> Repo:
        return self.repos.setdefault((kind, name), Repo(**how))

    def turn(self, what: str) -> bool:
        left = self.times.get(what, 0)
        self.times[what] = left - 1
        return left > 0


def _entry(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "sha256": hashlib.sha256(data).hexdigest(),
                     "size": len(data), "pointerSize": 130}} if name.endswith(LARGE) else {}  # fmt: skip
    return {"oid": blob, "blobId": blob, "size": len(data), **large}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, status: int = 200, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        for (method, pattern), answer in self.hub.wrong.items():
            if method == self.command and re.search(pattern, path):
                return self._answer(*answer)
        signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command in ("POST", "PUT") and not signed and not path.startswith("/lfs/"):
            return self._error(401, "", "Invalid username or password.")
        for pattern, handle in _ROUTES:
            if match := re.fullmatch(pattern, path):
                return handle(self, body, signed, **match.groupdict())
        return self._error(404, "", f"no route for {path}")

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _found(self, kind: str | None, name: str, revision: str | None, signed: bool) -> tuple[Repo, str] | None:
        repo = self.hub.repos.get((kind or "model", name))
        if repo is None or (repo.private and not signed):
            self._error(401 if not signed else 404, "RepoNotFound", "Repository not found")
            return None
        commit = repo.at(revision or "main")
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit

    def create(self, body: bytes, signed: bool) -> None:
        asked = json.loads(body)
        key = (asked.get("type", "model"), f"{asked['organization']}/{asked['name']}")
        url = f"{self.hub.url}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"
        if key in self.hub.repos:
            return self._answer(409, {"error": "You already created this repository", "url": url})
        repo = self.hub.repo(key[1], key[0], private=asked.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._answer(200, {"url": url})

    def info(self, _body: bytes, signed: bool, kind: str, name: str, revision: str | None = None) -> None:
        if found := self._found(kind, name, revision, signed):
            repo, commit = found
            siblings = [{"rfilename": one, **_entry(one, data)} for one, data in repo.commits[commit].items()]
            card = repo.commits[commit].get("README.md", b"").decode()
            about = {"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []}
            if license := re.search(r"^license: (.+)$", card, re.M):
                about["cardData"] = {"license": license[1]}
            self._answer(200, about)

    def tree(self, _body: bytes, signed: bool, kind: str, name: str, revision: str) -> None:
        if found := self._found(kind, name, revision, signed):
            files = found[0].commits[found[1]].items()
            self._answer(200, [{"type": "file", "path": one, **_entry(one, data)} for one, data in files])

    def validate(self, _body: bytes, _signed: bool) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, _signed: bool, kind: str, name: str, revision: str) -> None:
        files = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False, "oid": None}
            for one in json.loads(body)["files"]
        ]  # fmt: skip
        self._answer(200, {"files": files})

    def batch(self, body: bytes, _signed: bool, name: str, kind: str | None = None) -> None:
        objects = [
            {"oid": one["oid"], "size": one["size"]}
            if one["oid"] in self.hub.blobs
            else {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, _signed: bool, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "", "not what was announced")
        self.hub.blobs[oid] = body
        return self._answer(200, {})

    def commit(self, body: bytes, signed: bool, kind: str, name: str, revision: str) -> None:
        if not (found := self._found(kind, name, revision, signed)):
            return
        repo, parent = found
        files = dict(repo.commits[parent])
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header" and value.get("parentCommit", parent) != parent:
                return self._error(412, "", "A commit has happened since")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files, revision)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, _body: bytes, signed: bool, name: str, revision: str, file: str, kind: str | None = None) -> None:
        if not (found := self._found("dataset" if kind else "model", name, revision, signed)):
            return
        repo, commit = found
        if repo.gated:
            return self._error(403, "GatedRepo", f"Access to {name} is restricted")
        if file not in repo.commits[commit]:
            return self._error(404, "EntryNotFound", "Entry not found")
        data = repo.commits[commit][file]
        entry = _entry(file, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            return self._answer(206, data[int(start[1]) :], headers)
        if self.command == "GET" and self.hub.turn("half"):
            return self._answer(200, data[: len(data) // 2], headers)
        if self.command == "GET" and self.hub.turn("other"):
            return self._answer(200, bytes(len(data)), headers)
        return self._answer(200, data, headers)


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>model|dataset)s/{_NAME}"
_ROUTES = (
    ("/api/repos/create", _Handler.create),
    ("/api/validate-yaml", _Handler.validate),
    (rf"{_API}/tree/(?P<revision>.+)", _Handler.tree),
    (rf"{_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"{_API}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"{_API}/revision/(?P<revision>.+)", _Handler.info),
    (_API, _Handler.info),
    (rf"(?P<kind>/datasets)?/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.put),
    (rf"(?P<kind>/datasets)?/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
)


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path_factory) -> Iterator[Hub]:
    """A hub of the test's own, at which `huggingface_hub` looks, signed in, with a cache of its own."""
    constants = huggingface_hub.constants
    with serving() as one:
        monkeypatch.setattr(constants, "ENDPOINT", one.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", one.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield one
