"""The server: OpenAI's chat completions, completions and models over an engine, health, metrics and a page."""

from __future__ import annotations

import asyncio
import functools
import hmac
import importlib.resources
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from commandv.errors import CommandVError, InputError
from commandv.models.encoding import opening
from commandv.models.lm import LM
from commandv.models.sampling import Sampling
from commandv.prompts.sets import is_text, require_text
from commandv.serving.answering import Answering, Kind, Stream
from commandv.serving.behaviours import BASE, UnknownBehaviour, behaviour_name, parse_behaviour
from commandv.serving.conversation import conversation_ids, plain_stops
from commandv.serving.engine import Engine
from commandv.serving.metrics import Metrics
from commandv.serving.requests import QueueFull, Request as Wanted, TooLong
from commandv.serving.wire import Asked, ChatAsked, TextAsked, error_body

MOST_TOKENS = 1024  # of an answer, unless the server says otherwise
MOST_BODY = 1 << 20  # bytes of a request
_DRAINED, _PATIENCE = 1 << 26, 10.0  # bytes and seconds of a request that is refused, until its client hears of it
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def create_app(
    engine: Engine, *, api_key: str | None = None, max_tokens: int = MOST_TOKENS, max_body: int = MOST_BODY
) -> FastAPI:
    """Return the server over a running engine.

    Args:
        engine: what answers.
        api_key: what clients must send to `/v1/...`; None asks for nothing.
        max_tokens: longest answer that a client may ask for, and gets when a chat request does not say.
        max_body: bytes of the longest request.
    """
    if api_key is not None and not (is_text(api_key) and api_key.strip()):
        raise InputError("api_key: expected a text that is not empty; leave it out to let everybody in")
    app = FastAPI(title="commandv", docs_url=None, redoc_url=None)  # their pages load from elsewhere
    metrics = Metrics(engine)
    routes = _Routes(engine, metrics, max_tokens)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"])
    app.add_api_route("/v1/completions", routes.text, methods=["POST"])
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", routes.model, methods=["GET"])
    app.add_api_route("/health", routes.health, methods=["GET"], response_class=JSONResponse)
    app.add_api_route("/metrics", routes.metrics_page, methods=["GET"], response_class=Response)
    app.add_api_route("/", page, methods=["GET"], response_class=HTMLResponse)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(CommandVError, functools.partial(_failed, engine))
    app.add_middleware(_Gate, api_key=api_key, max_body=max_body, metrics=metrics)
    return app


async def page() -> HTMLResponse:
    """Return the page."""
    text = importlib.resources.files("commandv.serving").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})


class _Routes:
    def __init__(self, engine: Engine, metrics: Metrics, max_tokens: int) -> None:
        self.engine, self.metrics, self.max_tokens = engine, metrics, max_tokens
        self.started = int(time.time())
        self._tokenizing = anyio.CapacityLimiter(1)

    async def chat(self, asked: ChatAsked, request: Request) -> Response:
        behaviour_of(asked, self.engine)
        ids = await self._tokenized(conversation_ids, self.engine.lm, [one.said() for one in asked.messages])
        return await self._answer(asked, Kind.CHAT, [ids], plain_stops(self.engine.lm), request)

    async def text(self, asked: TextAsked, request: Request) -> Response:
        behaviour_of(asked, self.engine)
        prompts = [await self._tokenized(_text_ids, self.engine.lm, one) for one in asked.prompts()]
        return await self._answer(asked, Kind.TEXT, prompts, (), request)

    async def models(self) -> dict[str, Any]:
        names = [BASE, *(f"{BASE}+{name}" for name in self.engine.adapters)]
        return {"object": "list", "data": [self._described(name) for name in names]}

    async def model(self, name: str) -> dict[str, Any]:
        return self._described(behaviour_name(parse_behaviour(name, self.engine.adapters)))

    async def health(self) -> JSONResponse:
        engine = self.engine
        state = {"status": "ok" if engine.alive else "stopped", "model": engine.lm.id}
        return JSONResponse(
            {**state, "running": engine.n_running, "waiting": engine.n_waiting}, 200 if engine.alive else 503
        )

    async def metrics_page(self) -> Response:
        body, kind = self.metrics.page()
        return Response(body, headers={"Content-Type": kind})

    def _described(self, name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": self.started, "owned_by": "commandv", "root": self.engine.lm.id
        }  # fmt: skip

    async def _tokenized(self, make: Callable[..., tuple[int, ...]], *given: Any) -> tuple[int, ...]:
        return await anyio.to_thread.run_sync(functools.partial(make, *given), limiter=self._tokenizing)

    async def _answer(
        self, asked: ChatAsked | TextAsked, kind: Kind, prompts: list[tuple[int, ...]], stops: tuple[str, ...],
        request: Request,
    ) -> Response:  # fmt: skip
        behaviour = behaviour_of(asked, self.engine)
        wanted = [
            Wanted(
                ids, behaviour, self._limit(asked.limit, len(ids)), _sampling(asked, i), (*asked.stops, *stops),
                strip=kind is Kind.CHAT and not self.engine.lm.chat, logprobs=asked.n_logprobs, stream=asked.stream,
            )
            for ids in prompts
            for i in range(asked.n)
        ]  # fmt: skip
        answering = Answering(self.engine, wanted, asked.n, kind, asked.model, self.metrics)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return Stream(answering, usage=usage)
        whole = await _unless_gone(answering.whole(), request)
        if whole is None:
            answering.cancel()
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(whole)

    def _limit(self, asked: int | None, n_prompt: int) -> int:
        if asked is not None and asked > self.max_tokens:
            raise InputError(f"max_tokens={asked}: this server gives at most {self.max_tokens}; ask for fewer")
        context = self.engine.lm.context_length
        left = self.max_tokens if context is None else max(1, context - n_prompt)  # the engine says what is too long
        return asked or min(self.max_tokens, left)


def behaviour_of(asked: Asked, engine: Engine) -> Any:
    """Return the behaviour that a request names."""
    return parse_behaviour(asked.model, engine.adapters)


def _sampling(asked: Asked, i: int) -> Sampling:
    return Sampling(asked.temperature, asked.top_p, None if asked.seed is None else (asked.seed + i) % (1 << 32))


def _text_ids(lm: LM, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        require_text(prompt)
        return tuple(lm.tokenizer(prompt).input_ids) if prompt else tuple(opening(lm))
    known = lm.model.get_input_embeddings().weight.shape[0]
    if not all(0 <= one < known for one in prompt):
        raise InputError(f"prompt: tokens outside 0 .. {known - 1}; the model has no embeddings for them")
    return tuple(prompt)


async def _unless_gone(work: Awaitable[dict[str, Any]], request: Request) -> dict[str, Any] | None:
    """Return a result, or None as soon as the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for one in tasks:
            one.cancel()


# -- what goes wrong --------------------------------------------------------------------------------------------------


def _error(status: int, message: str, headers: dict[str, str] | None = None, **more: str | None) -> JSONResponse:
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse(error_body(message, kind, **more), status, headers)


async def _malformed(request: Request, error: Any) -> JSONResponse:
    first, *others = error.errors()
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return _error(400, f"the body is not JSON: {reason} at character {first['loc'][-1]}")
    where = ".".join(str(one) for one in first["loc"] if one != "body")
    if not where and "json" not in request.headers.get("content-type", ""):
        return _error(400, "expected a JSON object, sent with the header Content-Type: application/json")
    more = f" (and {len(others)} more)" if others else ""
    return _error(400, f"{where or 'body'}: {first['msg']}{more}", param=where or None)


async def _refused(request: Request, error: Any) -> JSONResponse:
    said = str(error.detail)
    if error.status_code == 404:
        said = f"no page {request.url.path}; clients are given the address with /v1 at its end"
    return _error(error.status_code, said, error.headers)


async def _failed(engine: Engine, _request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, QueueFull):
        wait = max(1, math.ceil(engine.seconds * engine.n_waiting / engine.max_rows))
        return _error(429, str(error), {"Retry-After": str(min(wait, 60))}, code="queue_full")
    if isinstance(error, UnknownBehaviour):
        return _error(404, str(error), param="model", code="model_not_found")
    if isinstance(error, InputError):
        code = "context_length_exceeded" if isinstance(error, TooLong) else None
        return _error(400, str(error), code=code)
    return _error(500 if engine.alive else 503, str(error))


async def _drain(receive: Receive) -> None:
    """Read on what is refused: a client that is still sending would break off before it reads why."""
    left = _DRAINED
    with anyio.move_on_after(_PATIENCE):
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                return


class _Gate:
    """Lets in what has the key and is not too long, and counts what goes out."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body: int, metrics: Metrics) -> None:
        self.app, self.api_key, self.max_body, self.metrics = app, api_key, max_body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self.metrics.responses.labels(path, str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            if (b"expect", b"100-continue") not in scope["headers"]:  # else it has not begun to send
                await _drain(receive)
            await refusal(scope, receive, counted)
            return
        n_read = 0

        async def bounded() -> Message:
            nonlocal n_read
            message = await receive()
            n_read += len(message.get("body", b""))
            if n_read > self.max_body:
                if message.get("more_body"):
                    await _drain(receive)
                raise HTTPException(413, self._too_long)
            return message

        await self.app(scope, bounded, counted)

    @property
    def _too_long(self) -> str:
        return f"a request of more than {self.max_body} bytes; send less"

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if self.api_key is not None and scope["path"].startswith("/v1/"):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self.api_key.encode()):
                return _error(401, "wrong or missing API key; send it as Authorization: Bearer KEY",
                              {"WWW-Authenticate": "Bearer"}, code="invalid_api_key")  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            return _error(413, self._too_long, {"Connection": "close"})
        return None
