"""A request on its way from the engine to its client, whole or in pieces."""

from __future__ import annotations

import asyncio
import enum
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from commandv.errors import CommandVError, ModelError
from commandv.serving.engine import Engine
from commandv.serving.logprobs import Told
from commandv.serving.metrics import Metrics
from commandv.serving.requests import Piece, Request
from commandv.serving.wire import chat_logprobs, error_body, text_logprobs, usage


class Kind(enum.Enum):
    """Which of OpenAI's forms an answer takes: its id's beginning, and the names of objects, whole and in pieces."""

    CHAT = ("chatcmpl", "chat.completion", "chat.completion.chunk")
    TEXT = ("cmpl", "text_completion", "text_completion")


class Answering:
    """The answers to one request, submitted; made in the event loop's thread.

    Args:
        engine: what answers.
        wanted: one for each choice; choices of one prompt follow each other.
        n: choices of each prompt.
        kind: the form.
        model: the model's name as the client gave it.
        metrics: where it is counted.

    Raises:
        CommandVError: see `Engine.submit`.
    """

    def __init__(
        self, engine: Engine, wanted: Sequence[Request], n: int, kind: Kind, model: str, metrics: Metrics
    ) -> None:
        self.engine, self.wanted, self.kind, self.metrics = engine, wanted, kind, metrics
        loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._begun = time.monotonic()

        def listen(i: int, piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._pieces.put_nowait, (i, piece))

        self._answers = engine.submit(*wanted, listener=listen)
        self._n_prompt, self._n_answer = sum(len(one.ids) for one in wanted[::n]), [0] * len(wanted)
        self._lengths = [0] * len(wanted)  # characters so far, for offsets
        self._open = len(wanted)
        self._head = {"id": f"{kind.value[0]}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        metrics.asked(wanted[0].behaviour, self._n_prompt, len(wanted))

    def cancel(self) -> None:
        """Free the rows; harmless when the answers are complete."""
        if self._open:
            self.metrics.cancelled.inc()
        for one in self._answers:
            one.cancel()

    async def _events(self) -> AsyncIterator[tuple[int, Piece]]:
        first = True
        while self._open:
            i, piece = await self._pieces.get()
            if piece.error is not None:
                self.cancel()
                self._open = 0
                known = isinstance(piece.error, CommandVError)
                raise piece.error if known else ModelError(f"the model failed: {piece.error}")
            if first and piece.text and self.wanted[i].stream:
                self.metrics.first.observe(time.monotonic() - self._begun)
                first = False
            self._n_answer[i] = piece.n_tokens
            if piece.last:
                self._open -= 1
                self.metrics.answer_tokens.inc(piece.n_tokens)
                self.metrics.whole.observe(time.monotonic() - self._begun)
            yield i, piece

    async def whole(self) -> dict[str, Any]:
        """Return the complete answers.

        Raises:
            CommandVError: what ended one of them.
        """
        texts, told, finish = [""] * len(self.wanted), [list[Told]() for _ in self.wanted], [""] * len(self.wanted)
        async for i, piece in self._events():
            texts[i] += piece.text
            told[i] += piece.told
            finish[i] = piece.finish or ""
        choices = []
        for i, text in enumerate(texts):
            logprobs = self._logprobs(i, told[i], text)
            body = {"message": {"role": "assistant", "content": text}} if self.kind is Kind.CHAT else {"text": text}
            choices.append({"index": i, **body, "logprobs": logprobs, "finish_reason": finish[i]})
        return {**self._head, "object": self.kind.value[1], "choices": choices, "usage": self._usage()}

    async def pieces(self, *, with_usage: bool) -> AsyncIterator[str]:
        """Yield the answers as server-sent events; an error is the last event."""
        more = {"usage": None} if with_usage else {}
        if self.kind is Kind.CHAT:
            for i in range(len(self.wanted)):
                opened = {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield self._event([{**opened, "logprobs": None}], more)
        try:
            async for i, piece in self._events():
                logprobs = self._logprobs(i, piece.told, piece.text)
                body: dict[str, Any] = {"text": piece.text}
                if self.kind is Kind.CHAT:
                    body = {"delta": {"content": piece.text} if piece.text or not piece.last else {}}
                yield self._event([{"index": i, **body, "logprobs": logprobs, "finish_reason": piece.finish}], more)
        except CommandVError as error:
            yield f"data: {json.dumps(error_body(str(error), 'server_error'))}\n\n"
        else:
            if with_usage:
                yield self._event([], {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        body = {**self._head, "object": self.kind.value[2], "choices": choices, **more}
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def _logprobs(self, i: int, told: Sequence[Told], text: str) -> dict[str, Any] | None:
        start = self._lengths[i]
        self._lengths[i] += len(text)
        if self.wanted[i].logprobs is None:
            return None
        tokenizer = self.engine.lm.tokenizer
        return chat_logprobs(tokenizer, told) if self.kind is Kind.CHAT else text_logprobs(tokenizer, told, start)

    def _usage(self) -> dict[str, int]:
        return usage(self._n_prompt, sum(self._n_answer))


class Stream(StreamingResponse):
    """Answers as server-sent events; a client that goes away frees the rows, whether or not it has read anything."""

    def __init__(self, answering: Answering, *, usage: bool) -> None:
        super().__init__(
            answering.pieces(with_usage=usage), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.cancel()
