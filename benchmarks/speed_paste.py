"""The parts of `speed.py` that paste: profiles to paste between, the methods, their times, memory and accuracy."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import commandv as cv
from commandv.models.identity import ModelRef
from commandv.profiles.profile import END, Profile, load_profile, save_profile
from commandv.transfer.convert.fitters import Pinv, Ridge
from commandv.transfer.fold import fold
from commandv.transfer.match import explicit
from commandv.transfer.workers import parallel

RANK = 8
DECAY = 0.35  # of the spectrum: the i-th singular value falls as i^-DECAY
OUTLIERS = {3: 30.0, 17: 100.0, 40: 200.0}  # dimension -> times the median scale
PUBLISHED = ("published", "published, one core per pair")
PASTES: dict[str, Any] = {"exact": Pinv(exact=True), "ridge": Ridge(), "ridge gcv": Ridge(select="gcv")}


@dataclass(frozen=True)
class Cell:
    """One shape: `n` rows, `pairs` layers of a donor and a recipient; what it should reach."""

    n: int
    donor: int
    recipient: int
    targets: dict[str, float | None]
    pairs: int = 16
    turns: int = 3
    published_pairs: int = 16
    seed: int = field(default=0, kw_only=True)

    def quick(self) -> Cell:
        return replace(self, pairs=4, turns=1, published_pairs=min(2, self.published_pairs))


CELLS = {
    "N 1030, 3072 <-> 4096": Cell(
        1030, 4096, 3072, {"exact": 14, "ridge": 8, "second": 80}, turns=3, published_pairs=4
    ),
    "N 5000, 2048 <-> 2048": Cell(5000, 2048, 2048, {"exact": 7, "ridge": 8, "second": 80}, turns=2, published_pairs=2),
}


# -- profiles ---------------------------------------------------------------------------------------------------------


def write_profiles(cell: Cell, folder: Path) -> None:
    """Write two bf16 profiles that share part of what they hold.

    Singular values fall by a power law, the mean holds about half of the second moment and some dimensions are far
    larger than the rest; condition numbers are from 1e4 to 1e5. Layers differ by their dimensions' order.
    """
    generator = torch.Generator().manual_seed(cell.seed)
    k = min(cell.n, cell.donor, cell.recipient)
    spectrum = torch.arange(1, k + 1) ** -DECAY
    shared = torch.randn(cell.n, k, generator=generator)
    keys = np.stack([np.arange(cell.n), np.full(cell.n, END)], 1)
    for name, d in (("donor", cell.donor), ("recipient", cell.recipient)):
        own = torch.randn(cell.n, k, generator=generator)
        base = ((0.8 * shared + 0.6 * own) * spectrum) @ torch.randn(k, d, generator=generator)
        base /= base.std()
        layers = {}
        for layer in range(cell.pairs):
            rows = base[:, torch.randperm(d, generator=generator)] + 2 * torch.randn(d, generator=generator)
            for dimension, size in OUTLIERS.items():
                rows[:, dimension] *= size
            layers[layer] = rows.bfloat16()
        save_profile(Profile(layers, keys, ModelRef(name, "0", d, cell.pairs, "plain"), "synthetic"), folder / name)


def open_profiles(folder: Path) -> tuple[Profile, Profile]:
    return load_profile(folder / "donor"), load_profile(folder / "recipient")


def random_adapter(donor: Profile, seed: int) -> cv.Adapter:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    d = donor.d_model
    many = {layer: (cv.Intervention(normal(RANK, d) / d**0.5, normal(RANK), normal(RANK, d)),)
            for layer in range(donor.n_layers)}  # fmt: skip
    return cv.Adapter(many, donor.model, "random")


# -- methods ----------------------------------------------------------------------------------------------------------


def where(donor: Profile) -> dict[str, Any]:
    return {"match": explicit({layer: layer for layer in range(donor.n_layers)}), "layers": "all_layers"}


def paste(fit: Any, donor: Profile, recipient: Profile) -> cv.Adapter:
    return cv.paste(
        random_adapter(donor, 0), donor, recipient, fit=fit, read_rows="end", write_rows="end", holdout=0,
        **where(donor),
    )  # fmt: skip


def linked(fit: Any, donor: Profile, recipient: Profile) -> cv.Link:
    """Return a link that one adapter has gone through."""
    link = cv.link(donor, recipient, fit=fit, read_rows="end", write_rows="end", holdout=0)
    link.paste(random_adapter(donor, 0), **where(donor))
    return link


def published(folder: Path, pairs: int, over_layers: Callable[..., list[Any]]) -> list[Any]:
    """float32 pseudo-inverses both ways, converters materialised and kept, training loss computed."""
    donor, recipient = open_profiles(folder)

    def convert(layer: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        x, y = recipient.layer(layer).float(), donor.layer(layer).float()
        into, back = torch.linalg.pinv(x) @ y, torch.linalg.pinv(y) @ x
        loss = (x @ into - y).square().mean() + (y @ back - x).square().mean()
        return into, back, float(loss)

    return over_layers(convert, range(pairs))


def two_syrks(cell: Cell) -> Callable[[], Any]:
    """The products that any direct method needs, from float64 arrays that are in memory already."""
    generator = np.random.default_rng(cell.seed)
    x, y = (generator.standard_normal((cell.n, d)) for d in (cell.recipient, cell.donor))

    def multiply(_: int) -> None:
        for one in (x, y):
            _ = one @ one.T if cell.n <= one.shape[1] else one.T @ one

    return lambda: parallel(multiply, range(cell.pairs))


def methods(cell: Cell, folder: Path) -> dict[str, Callable[[], Any]]:
    profiles = open_profiles(folder)
    found: dict[str, Callable[[], Any]] = {
        PUBLISHED[0]: lambda: published(folder, cell.published_pairs, lambda *given: list(map(*given))),
        PUBLISHED[1]: lambda: published(folder, cell.published_pairs, parallel),
        "two SYRKs": two_syrks(cell),
    }
    for name, fit in PASTES.items():
        found[name] = lambda fit=fit: paste(fit, *open_profiles(folder))
    for name in ("exact", "ridge"):
        link = linked(PASTES[name], *profiles)
        found[f"second, {name}"] = lambda link=link: link.paste(random_adapter(link.donor, 1), **where(link.donor))
    return found


# -- measuring --------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def times(cell: Cell, folder: Path) -> dict[str, Any]:
    """Time every method in turn; speed-ups and costs are ratios within a turn."""
    found = methods(cell, folder)
    taken: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(cell.turns):
        # Back and forth, so that no method always follows the same one.
        for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
            scale = cell.pairs / cell.published_pairs if name in PUBLISHED else 1
            taken[name].append(scale * seconds(found[name]))
    # All cores on one pair suffer more than we do when another job wants a core; they must not be measured by that.
    baseline = [min(both) for both in zip(*(taken[name] for name in PUBLISHED), strict=True)]
    pasted = paste(PASTES["exact"], *open_profiles(folder))
    tensors = [t for many in pasted.interventions.values() for one in many for t in (one.read, one.bias, one.write)]
    return {
        "pairs": cell.pairs,
        "turns": cell.turns,
        "published_pairs": cell.published_pairs,
        "seconds": {name: spread(values) for name, values in taken.items()},
        "speedup": {name: over(baseline, taken[name]) for name in found if name not in PUBLISHED},
        "over_bound": {name: over(taken[name], taken["two SYRKs"]) for name in PASTES},
        "retained_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "converter_bytes": 2 * 4 * cell.donor * cell.recipient * cell.pairs,
    }


def over(above: list[float], below: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def peak_memory(cell: Cell, folder: Path, method: str) -> int:
    """Return the most memory that a paste takes beyond what was there with the profiles open, sampled every 5 ms."""
    profiles = open_profiles(folder)
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        paste(PASTES[method], *profiles)
    finally:
        done.set()
        watcher.join()
    return peak - before


def accuracy() -> dict[str, dict[str, float]]:
    """Relative error of the exact fold's action on new states, by condition number, N 300, 512 <-> 640.

    "solved" in the float64 of the solver; "stored" after rounding to the float32 of adapters, whose read directions
    grow with the condition number and cancel where states have next to nothing.
    """
    n, d_x, d_y = 300, 512, 640
    errors = {}
    torch.set_num_threads(1)
    for condition in (1e2, 1e3, 1e4, 1e5):
        generator = torch.Generator().manual_seed(int(condition))

        def normal(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def rows(d: int, condition: float = condition, normal: Callable[..., torch.Tensor] = normal) -> torch.Tensor:
            u, v = torch.linalg.qr(normal(n, n)).Q, torch.linalg.qr(normal(d, n)).Q
            return u * torch.logspace(0, -float(np.log10(condition)), n, dtype=torch.float64) @ v.T

        x, y = rows(d_x), rows(d_y)
        one = cv.Intervention(normal(RANK, d_y).float(), normal(RANK).float(), normal(RANK, d_y).float())
        fit = Pinv(exact=True)
        into, back = fit(x, y), fit(y, x)
        read, shift = into.pull(one.read)
        write = back.push(one.write)
        stored = fold(one, read, shift, write)
        states = normal(64, n) @ x / n**0.5
        a, b = (torch.linalg.pinv(first, rtol=1e-12) @ second for first, second in ((x, y), (y, x)))
        expected = act(states @ a, one.read, one.bias, one.write) @ b
        got = {
            "solved": act(states, read, one.bias + shift, write),
            "stored": act(states, stored.read, stored.bias, stored.write),
        }
        errors[f"{condition:g}"] = {name: float((one - expected).norm() / expected.norm()) for name, one in got.items()}
    return errors


def act(h: torch.Tensor, read: torch.Tensor, bias: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
    return (h @ read.double().T + bias.double()) @ write.double()
