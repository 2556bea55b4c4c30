"""The text of a request as its tokens come: whole characters, stop strings never sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from commandv.serving.logprobs import Told


class Transcript:
    """What a request has said.

    Args:
        tokenizer: the model's.
        stops: texts before which it ends.
        strip: leave out white space around it, as plain-format answers do.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], strip: bool) -> None:
        self._tokenizer, self._stops, self._strip = tokenizer, stops, strip
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._raw, self._sent = "", 0  # of the text; characters of `_raw` that were given out
        self._told: list[tuple[int, Told]] = []  # not given out yet, with the places in `_raw` where they start
        self._longest = max(map(len, stops), default=0)
        self.stopped = False

    def add(self, token: int, told: Told | None = None) -> None:
        """Go on with a token that is no end."""
        if told is not None:
            self._told.append((len(self._raw), told))
        self._ids.append(token)
        before = len(self._raw)
        self._raw += self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._cut(before)

    def take(self) -> tuple[str, list[Told]]:
        """Return what may be sent by now and was not yet: what may begin a stop string waits."""
        held = max((_begun(stop, self._raw) for stop in self._stops), default=0)
        end = min(self._end(), len(self._raw) - held)
        return self._give(end), self._tell(lambda place: place < self._sent)

    def end(self) -> tuple[str, list[Told]]:
        """Return the rest, when no more tokens come."""
        if not self.stopped:
            before = len(self._raw)
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            if whole.startswith(self._raw[: self._sent]):  # half a character at the end, which the stream keeps back
                self._raw = whole
            self._cut(before)
        return self._give(self._end()), self._tell(lambda _: True)

    def _cut(self, before: int) -> None:
        """Cut at the stop string that was complete first; what came before place `before` has been looked through."""
        start = max(0, before - self._longest + 1)
        found = [(place + len(one), place) for one in self._stops if (place := self._raw.find(one, start)) >= 0]
        if found:
            self._raw, self.stopped = self._raw[: min(found)[1]], True
            self._told = [(place, told) for place, told in self._told if place < len(self._raw)]

    def _end(self) -> int:
        return len(self._raw.rstrip()) if self._strip else len(self._raw)

    def _give(self, end: int) -> str:
        if self._strip and not self._sent:
            self._sent = min(end, len(self._raw) - len(self._raw.lstrip()))
        text = self._raw[self._sent : end]
        self._sent = max(self._sent, end)
        return text

    def _tell(self, due: Callable[[int], bool]) -> list[Told]:
        n = sum(due(place) for place, _ in self._told)
        told, self._told = self._told[:n], self._told[n:]
        return [one for _, one in told]


def _begun(stop: str, text: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
