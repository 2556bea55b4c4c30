"""What each stage of the way costs as models grow.

What is measured at a few layers tells of the full depth, and of larger models:

    seconds(there) = seconds(measured) x work(there) / work(measured)

and bytes alike, with the work of each stage from `GROWTH`. That counts operations, so that it holds on one machine, for
the prompts that were run, and where a stage is long enough to be timed; a stage of milliseconds tells little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from commandv.evaluation.study.shapes import weight_bytes
from commandv.transfer.link import KEPT

Took = tuple[float, int | None]  # seconds, and bytes that are left in memory or on disk
Work = tuple[float, float]  # that seconds follow, and bytes


class Sizes(NamedTuple):
    """What a model's part of the work depends on: width, layers, and parameters: of blocks, of the head, of all."""

    d_model: int
    n_layers: int
    blocks: int
    head: int
    all: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Count a configuration's parameters."""
        whole = weight_bytes(config) // 2
        head = config.vocab_size * config.hidden_size
        embeddings = head if config.tie_word_embeddings else 2 * head
        return cls(config.hidden_size, config.num_hidden_layers, whole - embeddings, head, whole)


class Job(NamedTuple):
    """What a stage's work depends on: both models, layers that are carried, and rows of either kind."""

    donor: Sizes
    recipient: Sizes
    pairs: int
    end: int
    text: int

    def sides(self) -> list[tuple[int, int, int]]:
        """Return (rows n, width d, k = min(n, d)) of reading and of writing."""
        both = ((self.end, self.recipient.d_model), (self.text, self.donor.d_model))
        return [(n, d, min(n, d)) for n, d in both]


def _profiled(one: Sizes) -> Work:
    """Return the blocks' parameters, which every token passes, and layers x width, of which every row is."""
    return one.blocks, one.n_layers * one.d_model


def _solved(job: Job, row: Callable[[int, int, int], float]) -> float:
    return job.pairs * sum(row(*side) for side in job.sides())


def _adapter(job: Job, power: int = 1) -> Work:
    return (job.pairs * job.recipient.d_model**power,) * 2


# Stage -> (work that its seconds follow, work that its bytes follow), both up to a factor that cancels.
GROWTH: dict[str, Callable[[Job], Work]] = {
    "build donor": lambda job: (job.donor.all, job.donor.all),
    "build recipient": lambda job: (job.recipient.all, job.recipient.all),
    "profile donor": lambda job: _profiled(job.donor),
    "profile recipient": lambda job: _profiled(job.recipient),
    "match": lambda job: (1, 1),  # of rows only
    # The Gram matrix, n d k; its reduction to tridiagonal form, 4/3 k^3, half of it at a third of the speed.
    "fit": lambda job: (
        _solved(job, lambda n, d, k: n * d * k + 4 * k**3),
        min(_solved(job, lambda n, d, k: 2 * n * d + 8 * k * k), KEPT),
    ),
    "paste": lambda job: (_solved(job, lambda n, d, k: k * k + n * d), job.pairs * job.recipient.d_model),
    "attach": _adapter,
    "generate": lambda job: (job.recipient.blocks + job.recipient.head, 1),  # parameters x tokens
    "save": _adapter,
    "load": _adapter,
    "export": lambda job: _adapter(job, 2),  # pyreft's rotations are d_model x d_model a layer
}


class Stage(NamedTuple):
    """One stage: seconds, and bytes that it leaves in memory or on disk (None: none); measured, and extrapolated."""

    stage: str
    seconds: float
    bytes: int | None
    full_seconds: float
    full_bytes: int | None
    large_seconds: float
    large_bytes: int | None


def grown(name: str, took: Took, here: Work, full: Work, there: Work) -> Stage:
    """Return a stage with what it comes to at full depth and between large models."""
    seconds, size = took
    figures: list[Any] = [seconds, size]
    for work in (full, there):
        figures += [seconds * work[0] / here[0], None if size is None else round(size * work[1] / here[1])]
    return Stage(name, *figures)
