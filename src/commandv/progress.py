"""Progress of long work: a bar with ETA on a terminal and in notebooks that have ipywidgets, log lines otherwise."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

Report: TypeAlias = Callable[[int], None]  # tells that so many further steps are done


def unreported(_steps: int) -> None:
    """Tell nobody."""


LOG_EVERY = 15.0  # seconds between log lines when there is no terminal

_bar = threading.Lock()  # one terminal has room for one bar; work beside it logs


@contextlib.contextmanager
def track(title: str, total: int) -> Iterator[Report]:
    """Yield a function that advances the progress of `title` by so many of `total` steps."""
    console = Console(stderr=True)
    notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None  # rich draws with it
    if (console.is_terminal or notebook) and _bar.acquire(blocking=False):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        try:
            with Progress(*columns, console=console, transient=True) as progress:
                task = progress.add_task(title, total=total)
                yield lambda steps: progress.advance(task, steps)
        finally:
            _bar.release()
        return
    started = last = time.monotonic()
    done = 0

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= LOG_EVERY and done:
            last = now
            left = (now - started) / done * (total - done)
            log.info("%s: %d of %d, about %.0f s left", title, done, total, left)

    yield advance
