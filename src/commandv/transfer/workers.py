"""Work over many layer pairs at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import threadpoolctl
import torch

T = TypeVar("T")
U = TypeVar("U")
MEMORY = 1 << 30  # bytes that the workers together may take


def parallel(work: Callable[[T], U], items: Sequence[T], *, memory: int = 0) -> list[U]:
    """Map over items with a worker for each thread that torch may use: faster than threaded linear algebra here.

    Args:
        work: what to do with one.
        items: all of them.
        memory: bytes that one takes; where all cores together would take more than `MEMORY`, fewer workers share them.
    """
    threads = torch.get_num_threads()
    cores = min(os.cpu_count() or 1, threads)
    workers = max(1, min(cores, len(items), MEMORY // max(1, memory)))
    each = max(1, cores // workers) if workers < len(items) else 1
    try:
        torch.set_num_threads(each)
        with (
            threadpoolctl.threadpool_limits(each),
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,)) as pool,
        ):
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)
