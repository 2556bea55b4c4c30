"""Running the server: one address, one model, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

_PATIENCE = 10.0  # seconds that answers under way have to end when the server is told to stop
_MARGIN = 20  # more that their clients have to hear that they are ended


class Server(uvicorn.Server):
    """uvicorn's server, in which the answers that are not complete in time are ended and not torn off.

    Args:
        app: what is served.
        end: ends every answer with an error; may block for the length of a step of the model.
        patience: seconds that answers under way have when the server is told to stop.
    """

    def __init__(self, app: FastAPI, end: Callable[[], None], *, patience: float = _PATIENCE) -> None:
        wait = int(patience) + _MARGIN
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=wait, lifespan="off")
        )
        self._end, self._patience = end, patience

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and wait for those under way."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._patience, lambda: loop.run_in_executor(None, self._end))
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def run(app: FastAPI, listening: socket.socket, end: Callable[[], None]) -> None:
    """Serve until interrupted or terminated; answers under way have some seconds before `end` ends them."""
    with _stopped_cleanly(), contextlib.suppress(KeyboardInterrupt):
        Server(app, end).run(sockets=[listening])


@contextlib.contextmanager
def _stopped_cleanly() -> Iterator[None]:
    """Have SIGTERM, which uvicorn raises once more after it has shut down, end as an interrupt does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
