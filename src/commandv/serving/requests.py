"""What an engine is asked, and what it tells."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from commandv.errors import CommandVError, InputError
from commandv.models.sampling import Sampling
from commandv.serving.behaviours import Behaviour
from commandv.serving.logprobs import Told

Finish = Literal["stop", "length"]


class TooLong(InputError):
    """A prompt that does not fit into the context together with its answer."""


class QueueFull(CommandVError, RuntimeError):
    """As many requests wait as may."""


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked of an engine."""

    ids: tuple[int, ...]  # the prompt's tokens
    behaviour: Behaviour = ()  # what is attached for this request
    max_tokens: int = 64  # longest answer
    sampling: Sampling = field(default_factory=Sampling)  # how tokens are chosen
    stop: tuple[str, ...] = ()  # texts before which the answer ends
    strip: bool = False  # leave out white space around the answer
    # alternatives told for each token, 0 for the chosen one only; None for no log-probabilities
    logprobs: int | None = None
    stream: bool = True  # tell the answer in pieces, not at its end


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of an answer."""

    text: str  # what it adds
    told: tuple[Told, ...] = ()  # log-probabilities of the tokens that it adds, where they were asked for
    n_tokens: int = 0  # tokens generated so far, a final end token included
    finish: Finish | None = None  # why the answer is complete; None while it is not
    error: Exception | None = None  # what ended it instead

    @property
    def last(self) -> bool:
        """True when nothing follows."""
        return self.finish is not None or self.error is not None


class Answer:
    """An answer under way: an iterator over its pieces; `cancel()` frees its row."""

    def __init__(self, request: Request, listener: Callable[[Piece], None] | None, wake: Callable[[], None]) -> None:
        self.request, self._wake = request, wake
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.tell = listener or self._pieces.put
        self.cancelled = False

    def cancel(self) -> None:
        """Stop it; nothing more is told. Harmless when it has ended."""
        self.cancelled = True
        self._wake()

    def __iter__(self) -> Iterator[Piece]:
        """Yield pieces up to the last one.

        Raises:
            CommandVError: what ended the answer.
        """
        while not (piece := self._pieces.get()).last:
            yield piece
        if piece.error is not None:
            raise piece.error
        yield piece

    def text(self) -> str:
        """Wait for the whole answer and return it."""
        return "".join(piece.text for piece in self)
