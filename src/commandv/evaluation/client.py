"""Requests to a judge's endpoint: one deadline each, bounded replies, a pace, and nothing secret in logs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import logging
import math
import threading
import time
import zlib
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

MOST_REPLY = 1 << 20  # bytes of a reply, of which one word is wanted


class Response(NamedTuple):
    """A reply; `cut` where it went on beyond `MOST_REPLY` bytes."""

    status: int
    retry_after: str
    body: bytes
    cut: bool


class Client:
    """Sends questions from any thread, each with one deadline; an event loop in a thread of its own enforces it."""

    def __init__(self, client: httpx2.AsyncClient, address: str, timeout: float) -> None:
        self._client, self._address, self._timeout = client, address, timeout
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def post(self, body: dict[str, Any]) -> Response:
        """Send a question and return the reply.

        Raises:
            TimeoutError: it is not there, whole, when the time is over.
            httpx2.HTTPError: the connection failed.
            zlib.error: the reply is packed, and damaged.
        """
        return self._run(self._post(body))

    async def _post(self, body: dict[str, Any]) -> Response:
        async with asyncio.timeout(self._timeout), self._client.stream("POST", self._address, json=body) as response:
            read = bytearray()
            async for chunk in response.aiter_raw():
                read += chunk
                if len(read) > MOST_REPLY:
                    break
            whole = bytes(read)
            if response.headers.get("content-encoding", "identity") != "identity":  # not asked for; it may be a bomb
                whole = zlib.decompressobj(wbits=47).decompress(whole, MOST_REPLY + 1)
            retry_after = response.headers.get("retry-after", "")
            return Response(response.status_code, retry_after, whole, len(whole) > MOST_REPLY)


class Pace:
    """Gives every request its turn: evenly spaced, and none while the server wants quiet."""

    def __init__(self, per_minute: float | None, stop: threading.Event) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._stop = stop
        self._lock = threading.Lock()

    def wait(self) -> bool:
        """Sleep until it is this request's turn; False when asked to stop."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap
        return self.sleep(turn - time.monotonic())

    def sleep(self, seconds: float) -> bool:
        """Sleep; False when asked to stop meanwhile."""
        return not self._stop.wait(max(seconds, 0.0))

    def hold(self, seconds: float) -> None:
        """Let no further request start for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def retry_after_seconds(value: str) -> float | None:
    """Return the seconds that a Retry-After header asks for (a number or a date), None without one."""
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        date = email.utils.parsedate_to_datetime(value)
        return max((date - datetime.datetime.now(date.tzinfo)).total_seconds(), 0.0)
    return None


def without_query(record: logging.LogRecord) -> bool:
    """Keep what an address's query says out of the client's log."""
    if isinstance(record.args, tuple):
        record.args = tuple(str(one).partition("?")[0] if "://" in str(one) else one for one in record.args)
    return True
