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


def parallel(work: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """Map over items with one single-threaded worker per core: faster than threaded linear algebra at these sizes."""
    workers = min(os.cpu_count() or 1, len(items))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with (
            threadpoolctl.threadpool_limits(1),
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)
