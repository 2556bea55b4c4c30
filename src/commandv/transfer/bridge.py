"""The converters between two profiled models, fitted on demand, and the prompts that they are not fitted on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from typing import Any, TypeVar

import numpy as np
import threadpoolctl
import torch
from torch import Tensor

from commandv.errors import InputError
from commandv.profiles.profile import Profile, Rows, paired_rows
from commandv.transfer.convert import FITTERS, Converter, FactorStore, Fitter, Network, ReducedRank, Ridge
from commandv.transfer.match import LayerPair

HOLDOUT = 0.1  # share of the prompts that no converter sees, so that fidelity can be told

T = TypeVar("T")
U = TypeVar("U")


class Bridge:
    """The converters between two profiled models, fitted on demand."""

    def __init__(
        self,
        donor: Profile,
        recipient: Profile,
        fit: Fitter,
        read_rows: Rows,
        write_rows: Rows | None,
        holdout: float,
        shuffle: int | None,
        store: FactorStore | None,
    ) -> None:
        if not 0 <= holdout < 1:
            raise InputError(f"holdout={holdout}: expected a share from 0 up to, not including, 1")
        self.donor, self.recipient, self.fit = donor, recipient, fit
        self.holdout, self.shuffle, self.store = holdout, shuffle, store
        if write_rows is None:
            write_rows = "text" if all((one.keys[:, 1] >= 0).any() for one in (donor, recipient)) else "end"
        self.sides = {"read": read_rows, "write": write_rows}
        self._rows = {rows: paired_rows(donor, recipient, rows) for rows in {read_rows, write_rows}}

    def settings(self) -> dict[str, Any]:
        """Return what is needed to fit the same converters again, JSON-able."""
        known = asdict(self.fit)  # type: ignore[call-overload]
        options = {one.name: known[one.name] for one in fields(self.fit) if one.compare}  # type: ignore[arg-type]
        return {
            "fit": {"name": self.fit.name, **options},
            "rows": self.sides,
            "holdout": self.holdout,
            "shuffle": self.shuffle,
        }

    @classmethod
    def again(cls, donor: Profile, recipient: Profile, settings: dict[str, Any]) -> Bridge:
        """Return the bridge that `settings` describes."""
        options = dict(settings["fit"])
        kind = FITTERS[options.pop("name")]
        if kind is ReducedRank:
            options["ridge"] = Ridge(**options["ridge"])
        rows = settings["rows"]
        return cls(
            donor,
            recipient,
            kind(**options),
            rows["read"],
            rows["write"],
            settings["holdout"],
            settings["shuffle"],
            None,
        )

    def rows(self, side: str, pair: LayerPair, *, held_out: bool = False) -> tuple[Tensor, Tensor, np.ndarray]:
        """Return (donor rows, recipient rows, prompt numbers) of one side's fit, or of its held-out prompts."""
        i, j, prompts = self._rows[self.sides[side]]
        unseen = held_out_prompts(prompts, self.holdout)
        keep = unseen if held_out else ~unseen
        i, j, prompts = i[keep], j[keep], prompts[keep]
        if self.shuffle is not None and not held_out:
            i = np.random.default_rng(self.shuffle).permutation(i)
        donor, recipient = self.donor.layer(pair.donor), self.recipient.layer(pair.recipient)
        return taken(donor, i), taken(recipient, j), prompts

    def into(self, pair: LayerPair) -> Converter | Network:
        """Fit recipient -> donor, for reading."""
        donor, recipient, prompts = self.rows("read", pair)
        x = (self.recipient, pair.recipient, self.donor, self.sides["read"], self.holdout)
        y = (pair.donor, self.shuffle)
        return self.fit(recipient, donor, groups=prompts, store=self.store, key=(x, y))

    def back(self, pair: LayerPair) -> Converter | Network:
        """Fit donor -> recipient, for writing."""
        donor, recipient, prompts = self.rows("write", pair)
        x = (self.donor, pair.donor, self.recipient, self.sides["write"], self.holdout, self.shuffle)
        return self.fit(donor, recipient, groups=prompts, store=self.store, key=(x, pair.recipient))


def taken(rows: Tensor, index: np.ndarray) -> Tensor:
    """Return the rows at `index`; all of them in their order are the tensor itself, which may be mapped from disk."""
    whole = len(index) == len(rows) and bool((index == np.arange(len(rows))).all())
    return rows if whole else rows[torch.from_numpy(index)]


def held_out_prompts(prompts: np.ndarray, share: float) -> np.ndarray:
    """Mark a fixed share of the prompts, the same whichever rows or models are asked about; bool like `prompts`."""
    scattered = (prompts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return scattered.astype(np.float64) / float(1 << 24) < share


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
