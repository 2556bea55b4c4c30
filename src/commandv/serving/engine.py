"""One model answering many requests in one batch, which they join and leave as they come and end.

The loop is our own. transformers has continuous batching (`ContinuousBatchingManager`), which does not fit here: it
puts the tokens of all requests into one row, whose places a hook cannot tell apart by request; its shared blocks are
found by tokens alone, so that a prefix run with one behaviour would serve another; it switches the model's attention
implementation for everybody who holds the model; and without flash attention, as on CPUs, each token is compared with
those of all requests. Here a request is a row: hooks know rows (`commandv.serving.mixture`), and nothing is shared
between requests, neither prefixes nor anything else.

One thread runs the model. Each of its turns drops the rows whose client went away, reads the prompts that wait, as
many tokens as `PREFILL`, and takes one step with all rows. What a request is told does not depend on the others in its
batch, up to rounding.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.errors import InputError, ModelError
from commandv.models.encoding import Batch, model_inputs, pad
from commandv.models.live import attach_change, attached
from commandv.models.lm import LM
from commandv.models.running import own_pass
from commandv.models.sampling import choose
from commandv.models.template import stop_tokens
from commandv.serving.behaviours import behaviour_name, require_names
from commandv.serving.logprobs import tell
from commandv.serving.mixture import Mixture, Row
from commandv.serving.requests import Answer, Finish, Piece, QueueFull, Request, TooLong
from commandv.serving.rows import join, keep, require_rows
from commandv.serving.text import Transcript

log = logging.getLogger(__name__)

PREFILL = 2048  # prompt tokens that are read between two steps; with more of them, streams would stutter
_PADDED = 1.2  # prompts that are read together are padded to so many times their tokens at most,
_SMALL = 256  # unless they are fewer tokens than make a pass worth its while


class _Running:
    """A row."""

    def __init__(self, lm: LM, answer: Answer) -> None:
        self.answer, self.request = answer, answer.request
        self.transcript = Transcript(lm.tokenizer, self.request.stop, self.request.strip)
        self.draws = self.request.sampling.random()
        self.begun = time.monotonic()
        self.token, self.n = -1, 0  # the last token generated, and how many


class Engine:
    """Answers requests with one model and adapters by name; use it as a context manager.

    While it runs, its thread alone uses the model.

    Args:
        lm: the model; nothing may be attached to it.
        adapters: by name, for its behaviours.
        max_rows: most requests in a batch.
        max_waiting: most requests that wait for a row.

    Raises:
        InputError: a name that no model name can hold, or something is attached already.
        MismatchError: an adapter of another model.
        ModelError: requests cannot share a batch of this model.
    """

    def __init__(self, lm: LM, adapters: Mapping[str, Adapter], *, max_rows: int = 64, max_waiting: int = 256) -> None:
        if max_rows < 1 or max_waiting < 0:
            raise InputError(f"max_rows={max_rows}, max_waiting={max_waiting}: expected 1 or more, and 0 or more")
        require_names(adapters)
        if attached(lm):
            raise InputError(f"{lm!r}: something is attached already; detach it, and give it to the engine by a name")
        for one in adapters.values():
            attach(lm, one).detach()  # says what does not fit
        self.lm, self.adapters = lm, dict(adapters)
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._mixture = Mixture(self.adapters)
        self._stops = frozenset(stop_tokens(lm))
        self._waiting: deque[Answer] = deque()
        self._rows: list[_Running] = []
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._state = threading.Condition()
        self._closing = False
        self.error: Exception | None = None  # what ended the thread
        self.n_running = 0
        self.seconds = 1.0  # that an answer takes, of late
        with torch.inference_mode(), own_pass(lm):
            require_rows(lm, getattr(self._pass(pad(lm, [[0, 0]]), None), "past_key_values", None))
        self._thread = threading.Thread(target=self._run, name="commandv-engine", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """True while it answers."""
        return self._thread.is_alive() and not self._closing

    def submit(self, *requests: Request, listener: Callable[[int, Piece], None] | None = None) -> list[Answer]:
        """Queue requests, all or none.

        Args:
            requests: what is asked.
            listener: called by the engine's thread with a request's number and each piece; must not block. Default:
                pieces wait for whoever iterates over the answers.

        Raises:
            InputError: a prompt that is empty, or too long for the context together with its answer.
            QueueFull: too many wait already.
            ModelError: the engine does not run.
        """
        for one in requests:
            self._check(one)
        with self._state:
            if not self.alive:
                raise ModelError("the engine is not running" + (f": {self.error}" if self.error else ""))
            if len(self._waiting) + len(requests) > self.max_waiting + self.max_rows - len(self._rows):
                raise QueueFull(
                    f"{len(self._waiting)} requests wait already, and at most {self.max_waiting} may; try again later"
                )
            answers = [
                Answer(one, None if listener is None else _numbered(listener, i), self._wake)
                for i, one in enumerate(requests)
            ]
            self._waiting.extend(answers)
            self._state.notify()
        return answers

    def _wake(self) -> None:
        """Have the engine look for what was cancelled."""
        with self._state:
            self._state.notify()

    def close(self) -> None:
        """End every answer with an error, and the thread; harmless when done before."""
        with self._state:
            self._closing = True
            self._state.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _check(self, request: Request) -> None:
        limit = self.lm.context_length
        if not request.ids:
            raise InputError("an empty prompt; give it a text")
        if request.max_tokens < 1:
            raise InputError(f"max_tokens={request.max_tokens}: expected 1 or more")
        if limit is not None and len(request.ids) + request.max_tokens > limit:
            raise TooLong(
                f"a prompt of {len(request.ids)} tokens and {request.max_tokens} new ones make "
                f"{len(request.ids) + request.max_tokens}, the context of {self.lm.id} is {limit}; shorten it or ask "
                "for fewer"
            )
        for name, scale in request.behaviour:
            if abs(scale) > 1:
                self.adapters[name].scaled(scale)  # says so where the deltas overflow

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: Exception = ModelError("the engine was closed before the answer was complete")
        try:
            with attach_change(self.lm, self._mixture), torch.inference_mode(), own_pass(self.lm):
                while self._turn():
                    pass
        except Exception as unexpected:
            self.error = error = unexpected
            raise
        finally:
            with self._state:
                self._closing = True
                left = [*(row.answer for row in self._rows), *self._waiting]
                self._rows, self._cache, self._mask = [], None, None
                self._waiting.clear()
            for one in left:
                one.tell(Piece("", error=error))

    def _turn(self) -> bool:
        """Go one step on; False when closing."""
        with self._state:
            while not (self._waiting or self._rows or self._closing):
                self.n_running = 0
                self._state.wait()
            if self._closing:
                return False
            self._waiting = deque(one for one in self._waiting if not one.cancelled)
            joining = self._next()
        self._leave([i for i, row in enumerate(self._rows) if row.answer.cancelled])
        for group in _alike(joining):
            self._prefill([_Running(self.lm, one) for one in group])
        self.n_running = len(self._rows)
        if self._rows:
            self._decode()
        return True

    def _next(self) -> list[Answer]:
        """Take those whose turn it is, as many as there are rows, and as their prompts fit into `PREFILL`."""
        free, left = self.max_rows - len(self._rows), PREFILL
        taken: list[Answer] = []
        while self._waiting and len(taken) < free and (not taken or len(self._waiting[0].request.ids) <= left):
            taken.append(self._waiting.popleft())
            left -= len(taken[-1].request.ids)
        return taken

    def _prefill(self, new: list[_Running]) -> None:
        batch = pad(self.lm, [row.request.ids for row in new])
        try:
            self._mixture.prepare([Row(row.request.behaviour, 0) for row in new], batch.attention_mask)
            out = self._pass(batch, None)
            mask = join(self._cache, self._mask, out.past_key_values, batch.attention_mask)
        except RuntimeError as error:  # out of memory, mostly; the others go on
            _fail(new, error)
            return
        self._mask = mask
        self._cache = out.past_key_values
        self._rows += new
        self._choose(out.logits, list(range(len(self._rows) - len(new), len(self._rows))))

    def _decode(self) -> None:
        assert self._mask is not None
        mask = torch.cat([self._mask, self._mask.new_ones(len(self._rows), 1)], 1)
        tokens = torch.tensor([[row.token] for row in self._rows], device=self.lm.device)
        try:
            self._mixture.prepare([Row(row.request.behaviour, row.n - 1) for row in self._rows])
            out = self._pass(Batch(tokens, mask, mask.sum(1, keepdim=True) - 1), self._cache)
        except RuntimeError as error:
            _fail(self._rows, error)
            self._rows, self._cache, self._mask = [], None, None
            return
        self._mask = mask
        self._choose(out.logits, list(range(len(self._rows))))

    def _pass(self, batch: Batch, past: Any) -> Any:
        return self.lm.model(**model_inputs(self.lm.model, batch, keep=1, use_cache=True, past=past))

    def _choose(self, logits: Tensor, places: list[int]) -> None:
        """Give the rows at some places their next tokens, tell them, and let those leave that are done."""
        rows = [self._rows[i] for i in places]
        last = logits[:, -1].float()
        finite = torch.isfinite(last.amax(-1)).tolist()
        tokens = choose(last, [row.request.sampling for row in rows], [row.draws for row in rows])
        done = []
        for i, row, token, fine, scores in zip(places, rows, tokens, finite, last, strict=True):
            row.token, row.n = token, row.n + 1
            if not fine:
                row.answer.tell(Piece("", error=_not_finite(self.lm, row.request)))
                done.append(i)
            elif self._went_on(row, scores):
                done.append(i)
        self._leave(done)

    def _went_on(self, row: _Running, scores: Tensor) -> bool:
        """Tell a row's client of its new token; True when it was the last one."""
        request, transcript = row.request, row.transcript
        ended = row.token in self._stops
        if not ended:
            told = None if request.logprobs is None else tell(scores, row.token, request.logprobs)
            transcript.add(row.token, told)
        ended = ended or transcript.stopped
        if ended or row.n >= request.max_tokens:
            text, entries = transcript.end()
            finish: Finish = "stop" if ended or transcript.stopped else "length"
            row.answer.tell(Piece(text, tuple(entries), row.n, finish))
            self.seconds += (time.monotonic() - row.begun - self.seconds) / 16
            return True
        if request.stream:
            text, entries = transcript.take()
            if text or entries:
                row.answer.tell(Piece(text, tuple(entries), row.n))
        return False

    def _leave(self, places: list[int]) -> None:
        if not places:
            return
        stay = [i for i in range(len(self._rows)) if i not in set(places)]
        self._rows = [self._rows[i] for i in stay]
        if stay:
            assert self._mask is not None
            self._mask = keep(self._cache, self._mask, stay)
        else:
            self._cache = self._mask = None


def _alike(answers: list[Answer]) -> list[list[Answer]]:
    """Return requests in groups whose prompts are of similar length."""
    groups: list[list[Answer]] = []
    total = 0  # tokens of the last group
    for one in sorted(answers, key=lambda one: len(one.request.ids)):
        n = len(one.request.ids)
        if groups and (total < _SMALL or n * (len(groups[-1]) + 1) <= _PADDED * (total + n)):
            groups[-1].append(one)
            total += n
        else:
            groups.append([one])
            total = n
    return groups


def _numbered(listener: Callable[[int, Piece], None], i: int) -> Callable[[Piece], None]:
    return lambda piece: listener(i, piece)


def _fail(rows: list[_Running], error: Exception) -> None:
    log.error("a pass over %d requests failed: %s", len(rows), error)
    for row in rows:
        row.answer.tell(Piece("", error=error))


def _not_finite(lm: LM, request: Request) -> ModelError:
    return ModelError(
        f"{lm.id}: NaN or infinity in the answer of {behaviour_name(request.behaviour)}; ask for smaller scales, or "
        "load the model with dtype='float32' or 'bfloat16'"
    )
