"""Pasting: carry a donor's adapter into a recipient by folding it through fitted converters.

With into(h) = h A + a (recipient -> donor) and back(d) = d B (donor -> recipient, differences), an intervention
act(h Rᵀ + b) W of the donor becomes act(h (R Aᵀ)ᵀ + b + R a) (W B), the same form in the recipient's space. Only the
2 · rank right-hand sides that matter are solved; no converter is formed or applied when the model runs. Converters that
are not affine do not fold: the intervention is wrapped in them (`commandv.carried`).

Source: arXiv 2506.19140, section 3, equations 3 to 5; folding, regularisation and separate rows are ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import threadpoolctl
import torch
from torch import Tensor

from commandv.adapter import ACTIVATIONS, Adapter, Intervention
from commandv.carried import Carried
from commandv.convert import FITTERS, Converter, FactorStore, Fitter, Network, ReducedRank, Ridge
from commandv.errors import InputError, MismatchError
from commandv.match import LayerChoice, LayerPair, Matcher, choose_layers, last_third, proportional
from commandv.profiles import Profile, Rows, paired_rows

HOLDOUT = 0.1  # share of the prompts that no converter sees, so that fidelity can be told


T = TypeVar("T")
U = TypeVar("U")


def paste(
    adapter: Adapter,
    donor: Profile,
    recipient: Profile,
    *,
    fit: Fitter = Ridge(),
    match: Matcher = proportional,
    layers: LayerChoice | str | Iterable[int] = last_third,
    scale: float = 1.0,
    read_rows: Rows = "end",
    write_rows: Rows | None = None,
    holdout: float = HOLDOUT,
    shuffle: int | None = None,
    store: FactorStore | None = None,
) -> Adapter:
    """Carry an adapter of the donor into the recipient.

    Several donor layers that meet in one recipient layer add up there.

    Args:
        adapter: the donor's adapter.
        donor: profile of the model the adapter is for.
        recipient: profile of the model to carry it into, over the same prompts.
        fit: how converters are fitted; `Pinv()` is the published way.
        match: which donor layer goes where.
        layers: recipient layers on which the pasted adapter may act; the default is the last third, where layers
            disturb each other least.
        scale: factor on the result's deltas.
        read_rows: rows for the reading converter (recipient -> donor).
        write_rows: rows for the writing converter (donor -> recipient); None takes text rows where both profiles
            have them, else last-token rows.
        holdout: share of the prompts kept from every fit, so that `fidelity` can be told on them.
        shuffle: a control: pair the rows wrongly, by a permutation with this seed.
        store: keeps factorisations for the next adapter over the same `Profile` objects.

    Returns:
        An adapter of the recipient.

    Raises:
        MismatchError: the adapter is not the donor profile's, or the profiles are of different prompts.
        InputError: too few shared rows, an empty layer choice, or rows that are not finite.
    """
    adapter.model.require(donor.model, f"adapter {adapter.name}")
    if not np.isfinite(scale):
        raise InputError(f"scale={scale}: expected a finite number")
    allowed = set(choose_layers(layers, recipient.n_layers))
    pairs = [pair for pair in match(donor, recipient, adapter.layers) if pair.recipient in allowed]
    if not pairs:
        raise InputError(
            f"adapter {adapter.name} acts on donor layers {adapter.layers}; none is matched to the chosen recipient "
            f"layers {sorted(allowed)}"
        )
    bridge = Bridge(donor, recipient, fit, read_rows, write_rows, holdout, shuffle, store)

    def carry(pair: LayerPair) -> tuple[tuple[Intervention, ...], dict[str, Any]]:
        carried, read_facts, write_facts = _carried(bridge, pair, adapter.interventions[pair.donor], scale)
        return carried, {"pair": list(pair), "read": read_facts, "write": write_facts}

    interventions: dict[int, tuple[Intervention, ...]] = {}
    facts = []
    for pair, (carried, fact) in zip(pairs, parallel(carry, pairs), strict=True):
        interventions[pair.recipient] = (*interventions.get(pair.recipient, ()), *carried)
        facts.append(fact)
    provenance = {
        "made_by": "paste",
        "donor": asdict(donor.model),
        "donor_adapter": {"name": adapter.name, **dict(adapter.provenance)},
        "prompts": donor.prompts,
        "link": bridge.settings(),
        "scale": scale,
        "layers": facts,
    }
    return Adapter(interventions, recipient.model, adapter.name, provenance, donor=adapter)


def _carried(
    bridge: Bridge, pair: LayerPair, many: tuple[Intervention, ...], scale: float
) -> tuple[tuple[Intervention, ...], dict[str, Any], dict[str, Any]]:
    """Return one layer's interventions in the recipient, and what the fits of reading and writing chose.

    Where nothing is read, as in a steering vector, an affine converter for reading is not fitted.
    """
    if not any(one.read.any() for one in many):
        back = bridge.back(pair)
        if not isinstance(back, Network):
            d_model = bridge.recipient.d_model
            constant = (fold(one, torch.zeros(one.rank, d_model), 0.0, scale * back.push(one.write)) for one in many)
            return tuple(constant), {}, back.facts
    into = bridge.into(pair)
    if isinstance(into, Network):
        back = bridge.back(pair)
        return _wrapped(many, into, back, scale), into.facts, back.facts
    pulled, read_facts = [into.pull(one.read) for one in many], into.facts
    del into  # frees its factorisation before the next is made
    back = bridge.back(pair)
    if isinstance(back, Network):
        return _wrapped(many, bridge.into(pair), back, scale), read_facts, back.facts
    folded = tuple(
        fold(one, read, shift, scale * back.push(one.write)) for one, (read, shift) in zip(many, pulled, strict=True)
    )
    return folded, read_facts, back.facts


def _wrapped(
    many: tuple[Intervention, ...], into: Converter | Network, back: Converter | Network, scale: float
) -> tuple[Carried, ...]:
    """Return interventions that do not fold, because a converter is not affine."""
    d_donor = many[0].d_model
    reads = Network.of(into, d_donor)
    writes = Network.of(back, reads.d_x)
    return tuple(Carried(one, reads, writes, scale) for one in many)


def fold(one: Intervention, read: Tensor, shift: Tensor | float, write: Tensor) -> Intervention:
    """Return the recipient's intervention with R' = R Aᵀ (`read`), b' = b + R a (`shift`) and W' = W B (`write`)."""
    return replace(one, read=read.float(), bias=(one.bias.double() + shift).float(), write=write.float())


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


# -- controls ---------------------------------------------------------------------------------------------------------


def random_like(adapter: Adapter, seed: int) -> Adapter:
    """Return a control that reads the same and writes as much, in random directions.

    All that is written at a layer is turned by one random rotation, so that on every state the layer's delta has
    exactly the norm of the original's.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(n: int) -> Tensor:
        drawn = torch.linalg.qr(torch.randn(adapter.d_model, n, generator=generator, dtype=torch.float64))
        return drawn.Q * drawn.R.diagonal().sign()  # LAPACK's own signs favour half of the space

    def turn(many: tuple[Intervention, ...]) -> tuple[Intervention, ...]:
        if any(isinstance(one, Carried) for one in many):  # what it writes spans no few directions
            whole = uniform(adapter.d_model)
            return tuple(one.turned(whole) for one in many)
        writes = torch.cat([one.write for one in many]).double()
        shape = torch.linalg.qr(writes.T).R  # writes = shapeᵀ · orthonormal rows
        turned = (shape.T @ uniform(len(shape)).T).float().split([one.rank for one in many])
        return tuple(replace(one, write=write) for one, write in zip(many, turned, strict=True))

    interventions = {layer: turn(many) for layer, many in adapter.interventions.items()}
    return replace(adapter, interventions=interventions, name=f"random of the norm of {adapter.name}", donor=None)


# -- fidelity ---------------------------------------------------------------------------------------------------------


class Fidelity(NamedTuple):
    """How well one layer pair's converters work on prompts they have not seen; 1 is perfect, 0 as good as the mean.

    Attributes:
        donor: donor layer.
        recipient: recipient layer.
        n: held-out rows of the reading side.
        read_r2: standardised R² of the reading converter (recipient -> donor), averaged over dimensions.
        write_r2: the same of the writing converter (donor -> recipient).
        read_cosine: mean cosine of centred, standardised rows, predicted against true.
        write_cosine: the same of the writing converter.
        cycle_error: ||back(into(x)) - x||² / ||x||² of centred, standardised recipient rows; says little alone.
        adapter_read_r2: R² of exactly what the adapter reads, h Rᵀ.
        adapter_write_r2: R² along exactly the directions it writes, h W'ᵀ; through a writing converter that is not
            affine, along the mean over held-out states of what a step of typical length along each direction becomes.
    """

    donor: int
    recipient: int
    n: int
    read_r2: float
    write_r2: float
    read_cosine: float
    write_cosine: float
    cycle_error: float
    adapter_read_r2: float
    adapter_write_r2: float


def fidelity(
    pasted: Adapter, donor: Profile, recipient: Profile, *, donor_adapter: Adapter | None = None
) -> list[Fidelity]:
    """Measure a pasted adapter's converters on the prompts that they were not fitted on, per layer pair.

    Args:
        pasted: a result of `paste`.
        donor: the profiles it was pasted with.
        recipient: likewise.
        donor_adapter: the adapter that was pasted; needed for one that was loaded from disk.

    Raises:
        InputError: not a pasted adapter, nothing held out, or the donor's adapter is not at hand.
        MismatchError: other profiles than those it was pasted with.
    """
    original = donor_adapter or pasted.donor
    if pasted.provenance.get("made_by") != "paste" or original is None:
        raise InputError("fidelity is told of a pasted adapter; after loading one, give donor_adapter= as well")
    original.model.require(donor.model, f"the donor's adapter {original.name}")
    pasted.model.require(recipient.model, f"pasted adapter {pasted.name}")
    if donor.prompts != pasted.provenance["prompts"]:
        raise MismatchError(
            f"{pasted.name} was pasted with profiles of prompts {pasted.provenance['prompts']}, got {donor.prompts}; "
            "profile the same prompt sets again"
        )
    bridge = Bridge.again(donor, recipient, pasted.provenance["link"])
    if not bridge.holdout:
        raise InputError("the adapter was pasted with holdout=0: no prompts are left to measure on")
    pairs = [LayerPair(*fact["pair"]) for fact in pasted.provenance["layers"]]
    held_out = min(len(bridge.rows(side, pairs[0], held_out=True)[0]) for side in bridge.sides)
    if held_out < 2:
        raise InputError(
            f"holdout={bridge.holdout} keeps {held_out} rows from the fit, expected at least 2 to measure on; "
            "profile more prompts or paste with a larger holdout"
        )

    def measure(pair: LayerPair) -> Fidelity:
        into, back = bridge.into(pair), bridge.back(pair)
        y, x = (one.double() for one in bridge.rows("read", pair, held_out=True)[:2])
        y_text, x_text = (one.double() for one in bridge.rows("write", pair, held_out=True)[:2])
        read, write = into(x), back(y_text)
        cycled, keep = back(read), varying(x)
        centred = ((x - x.mean(0)) / x.std(0))[:, keep]
        error = ((cycled - cycled.mean(0)) / x.std(0))[:, keep] - centred
        many = original.interventions[pair.donor]
        reads = torch.cat([one.read for one in many]).double()
        into_directions = torch.cat([written(back, one, y_text) for one in many]).T
        return Fidelity(
            pair.donor,
            pair.recipient,
            len(x),
            r2(read, y),
            r2(write, x_text),
            cosine(read, y),
            cosine(write, x_text),
            float(error.square().sum() / centred.square().sum()),
            r2(read @ reads.T, y @ reads.T),
            r2(write @ into_directions, x_text @ into_directions),
        )

    return parallel(measure, pairs)


def written(back: Converter | Network, one: Intervention, states: Tensor) -> Tensor:
    """Return the directions [rank, d_y] that an intervention writes through a converter; lengths do not matter.

    Through a map that is not affine, W_k becomes the mean over states y of back(y + c_k W_k) - back(y), with c_k the
    root mean square over these states of act(y Rᵀ + b)_k, which is how far the intervention steps.

    Args:
        back: donor -> recipient.
        one: the donor's intervention.
        states: of the donor, [n, d_x] float64.
    """
    if not isinstance(back, Network):
        return back.push(one.write.double())
    coefficients = ACTIVATIONS[one.activation](states @ one.read.double().T + one.bias.double())
    steps = coefficients.square().mean(0).sqrt()[:, None] * one.write.double()
    before = back(states)
    return torch.stack([(back(states + step) - before).mean(0) for step in steps])


def varying(true: Tensor) -> Tensor:
    """Mark the columns of rows [n, d] that vary; the others have no scale to measure an error by."""
    variance = true.var(0, correction=0)
    return variance > 1e-12 * variance.max()


def r2(predicted: Tensor, true: Tensor) -> float:
    """Standardised R²: 1 - mean over varying dimensions of squared error over variance; rows [n, d]; NaN if none."""
    keep = varying(true)
    error, variance = (predicted - true).square().mean(0)[keep], true.var(0, correction=0)[keep]
    return float(1 - (error / variance).mean()) if keep.any() else float("nan")


def cosine(predicted: Tensor, true: Tensor) -> float:
    """Mean cosine of rows [n, d] after centring by the true mean and dividing by the true standard deviation."""
    keep = varying(true)
    mean, scale = true.mean(0), true.std(0)
    a, b = (((rows - mean) / scale)[:, keep] for rows in (predicted, true))
    return float(torch.nn.functional.cosine_similarity(a, b).mean())
