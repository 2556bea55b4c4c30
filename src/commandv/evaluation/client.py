"""Requests to a judge's endpoint: one deadline each, bounded replies, a pace, and nothing secret in logs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import logging
import math
import queue
import random
import time
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from commandv.errors import InputError, JudgeError
from commandv.evaluation.judgments import Judgment
from commandv.prompts.sets import Prompt

if TYPE_CHECKING:
    from commandv.evaluation.endpoint import Endpoint

MOST_REPLY = 1 << 20  # bytes of a reply, of which one word is wanted


class Response(NamedTuple):
    """A reply; its body is of more than `MOST_REPLY` bytes where it went on beyond these."""

    status: int
    retry_after: str
    body: bytes


class Round:
    """One call's requests: so many at a time, evenly spaced, each with one deadline; what comes goes to `found`."""

    def __init__(self, judge: Endpoint, prompts: Sequence[Prompt], answers: Sequence[str], key: str) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise InputError(f"{judge.name} needs the httpx2 package: pip install 'commandv[judge]'") from error
        self.http: Any = httpx2
        self.judge, self.prompts, self.answers = judge, prompts, answers
        self.headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
        self.found: queue.SimpleQueue[Judgment | BaseException | None] = queue.SimpleQueue()  # None ends it
        self.stop = asyncio.Event()
        self._gate = asyncio.Semaphore(judge.concurrency)
        self._next = 0.0  # when the next request may start

    async def all(self) -> None:
        """Ask about every answer, or until one fails."""
        logging.getLogger("httpx2").addFilter(_without_query)
        auth, timeout = self.judge.access["auth"], self.judge.timeout
        async with self.http.AsyncClient(headers=self.headers, auth=auth, timeout=timeout) as client:
            asking = (self._one(client, place) for place in range(len(self.answers)))
            for problem in await asyncio.gather(*asking, return_exceptions=True):
                if problem is not None:
                    self.found.put(problem)
        self.found.put(None)

    async def _one(self, client: Any, place: int) -> None:
        async with self._gate:
            if self.stop.is_set():
                return
            try:
                reply = await self._ask(client, self.judge.question(self.prompts[place], self.answers[place]))
            except BaseException:
                self.stop.set()  # at once, before another question takes its place
                raise
            if reply is not None:
                self.found.put(self.judge.judgment(place, reply))

    async def _ask(self, client: Any, body: dict[str, Any]) -> str | None:
        """Return the reply's text, None when asked to stop."""
        judge = self.judge
        for attempt in range(judge.retries + 1):
            if not await self._turn():
                return None
            judge.usage.requests += 1
            judge.usage.retries += attempt > 0
            wait = None
            try:
                response = await self._post(client, body)
            except TimeoutError:
                problem = f"no whole reply within timeout={judge.timeout:g} s"
            except (self.http.HTTPError, zlib.error) as error:
                problem = type(error).__name__
            except (self.http.InvalidURL, UnicodeError) as error:
                raise JudgeError(f"judge {judge.name}: {type(error).__name__}; check the address") from None
            else:
                if response.status == 200:
                    return judge.reply(response)
                if response.status not in (408, 409, 425, 429) and response.status < 500:
                    return judge.refused(response)
                problem, wait = f"HTTP {response.status}", _retry_after_seconds(response.retry_after)
            if wait is not None and wait > judge.patience:
                problem += f", to be tried again in {wait:.0f} s (patience={judge.patience:.0f})"
                break
            if wait is not None:
                self._next = max(self._next, time.monotonic() + wait)  # for all requests
            elif attempt < judge.retries:
                await self._sleep(random.uniform(0.5, 1.0) * min(judge.backoff * 2**attempt, 60.0))
        raise JudgeError(f"judge {judge.name}: {problem} after {attempt + 1} tries")

    async def _post(self, client: Any, body: dict[str, Any]) -> Response:
        url = self.judge.access["url"]
        async with asyncio.timeout(self.judge.timeout), client.stream("POST", url, json=body) as response:
            read = bytearray()
            async for chunk in response.aiter_raw():
                read += chunk
                if len(read) > MOST_REPLY:
                    break
            whole = bytes(read)
            if response.headers.get("content-encoding", "identity") != "identity":  # not asked for; it may be a bomb
                whole = zlib.decompressobj(wbits=47).decompress(whole, MOST_REPLY + 1)
            return Response(response.status_code, response.headers.get("retry-after", ""), whole)

    async def _turn(self) -> bool:
        """Wait until it is this request's turn; False when asked to stop."""
        start = max(self._next, time.monotonic())
        self._next = start + (60.0 / self.judge.per_minute if self.judge.per_minute else 0.0)
        return await self._sleep(start - time.monotonic())

    async def _sleep(self, seconds: float) -> bool:
        """Sleep; False when asked to stop meanwhile."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), max(seconds, 0.0))
        return not self.stop.is_set()


def _retry_after_seconds(value: str) -> float | None:
    """Return the seconds that a Retry-After header asks for (a number or a date), None without one."""
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        date = email.utils.parsedate_to_datetime(value)
        return max((date - datetime.datetime.now(date.tzinfo)).total_seconds(), 0.0)
    return None


def _without_query(record: logging.LogRecord) -> bool:
    """Keep what an address's query says out of the client's log."""
    if isinstance(record.args, tuple):
        record.args = tuple(str(one).partition("?")[0] if "://" in str(one) else one for one in record.args)
    return True
