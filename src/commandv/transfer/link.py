"""The fitted pair of models: which rows pair up, which prompts are held out, and the converters both ways."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter, low_rank
from commandv.adapters.edit import Edit
from commandv.adapters.outline import require_scale
from commandv.arguments import checked
from commandv.errors import InputError, require_seed
from commandv.models.layers import AUTO_LAYERS, LayerChoice, all_layers, choose_layers, last_third
from commandv.profiles.profile import Profile, Rows, paired_rows
from commandv.transfer.convert.fitters import AnyFitter, Ridge, fitted, fitter_settings
from commandv.transfer.convert.kept import Kept
from commandv.transfer.convert.linear import Converter
from commandv.transfer.fidelity import Fidelity, layer_fidelity
from commandv.transfer.fold import Passage, carried
from commandv.transfer.match import LayerPair, Matcher, proportional
from commandv.transfer.workers import parallel

KEPT = 1 << 32  # bytes of fits that a link keeps at most; what is beyond is made again when it is needed again
HOLDOUT = 0.1  # share of the prompts that no converter sees, so that fidelity can be told

log = logging.getLogger(__name__)


@checked
@dataclass(frozen=True, eq=False)
class Link:
    """Two profiled models and the converters between them, which `link` makes.

    Fits are made when something first needs them, by whichever thread, and kept until the link goes, up to `KEPT` bytes
    of them: about min(rows, d_model)² numbers and the rows themselves a layer and direction.
    `dataclasses.replace(link, shuffle=0)`, or with another fitter, holdout or rows, gives a link that shares what both
    need.

    Attributes:
        donor: profile of the donor.
        recipient: profile of the recipient, over the same prompts.
        fit: how converters are fitted.
        read_rows: rows of the reading converters (recipient -> donor).
        write_rows: rows of the writing converters (donor -> recipient).
        holdout: share of the prompts that no fit sees.
        shuffle: seed of a permutation that pairs the rows wrongly, or None.
        kept: what was made so far; None keeps nothing, so that memory is that of one layer pair at a time.
    """

    donor: Profile
    recipient: Profile
    _: KW_ONLY
    fit: AnyFitter = Ridge()
    read_rows: Rows = "end"
    write_rows: Rows | None = None
    holdout: float = HOLDOUT
    shuffle: int | None = None
    kept: Kept | None = field(default_factory=Kept, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise InputError(f"holdout={self.holdout}: expected a share from 0 up to, not including, 1")
        if self.shuffle is not None:
            require_seed(self.shuffle)
        if self.write_rows is None:
            has_text = all(one.n_end < len(one) for one in (self.donor, self.recipient))
            object.__setattr__(self, "write_rows", "text" if has_text else "end")
            if not has_text:
                log.warning(
                    "%s -> %s: the profiles hold no text rows, so the writing converters are fitted on last prompt "
                    "tokens, which carry a behaviour far worse and ruin some models; profile both models with text, or "
                    "say write_rows='end'",
                    self.donor.model.id,
                    self.recipient.model.id,
                )
        _ = self._pairs  # profiles that do not belong together are refused now

    def __repr__(self) -> str:
        return f"Link({self.donor!r} -> {self.recipient!r}, {self.settings()})"

    @cached_property
    def _pairs(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        wanted = {self.sides["read"], self.sides["write"]}
        return {rows: paired_rows(self.donor, self.recipient, rows) for rows in wanted}

    @property
    def sides(self) -> dict[str, Rows]:
        """The rows that each side, "read" and "write", is fitted on."""
        assert self.write_rows is not None
        return {"read": self.read_rows, "write": self.write_rows}

    def settings(self) -> dict[str, Any]:
        """Return what decides the fits, JSON-able."""
        return {
            "fit": fitter_settings(self.fit),
            "rows": self.sides,
            "holdout": self.holdout,
            "shuffle": self.shuffle,
        }

    # -- rows and fits ------------------------------------------------------------------------------------------------

    def rows(self, side: str, pair: LayerPair, *, held_out: bool = False) -> tuple[Tensor, Tensor, np.ndarray]:
        """Return (donor rows, recipient rows, prompt numbers) of one side's fit, or of its held-out prompts."""
        i, j, prompts = self._pairs[self.sides[side]]
        unseen = held_out_prompts(prompts, self.holdout)
        keep = unseen if held_out else ~unseen
        i, j, prompts = i[keep], j[keep], prompts[keep]
        if self.shuffle is not None and not held_out:
            i = np.random.default_rng(self.shuffle).permutation(i)
        donor, recipient = self.donor.layer(pair.donor), self.recipient.layer(pair.recipient)
        return taken(donor, i), taken(recipient, j), prompts

    def into(self, pair: LayerPair) -> Converter:
        """Return recipient -> donor, for reading."""
        x = (self.recipient, pair.recipient, self.donor, self.sides["read"], self.holdout)
        return self._fit("read", pair, x, (pair.donor, self.shuffle))

    def back(self, pair: LayerPair) -> Converter:
        """Return donor -> recipient, for writing."""
        x = (self.donor, pair.donor, self.recipient, self.sides["write"], self.holdout, self.shuffle)
        return self._fit("write", pair, x, (pair.recipient,))

    def _fit(self, side: str, pair: LayerPair, x: tuple[Any, ...], y: tuple[Any, ...]) -> Converter:
        """Fit one side, or return what was kept; `x` and `y` say all that decides the rows."""

        def make(memo: Kept | None = None) -> Converter:
            donor, recipient, prompts = self.rows(side, pair)
            for rows, profile, layer in zip((donor, recipient), (self.donor, self.recipient), pair, strict=True):
                require_different(rows, f"layer {layer} of the profile of {profile.model.id}")
            given = (recipient, donor) if side == "read" else (donor, recipient)
            return fitted(self.fit, *given, prompts, memo)

        if self.kept is None:
            return make()
        memo, name = self.kept.get(x, Kept), ("converter", y, _name(self.fit))
        new = name not in memo
        found = memo.get(name, lambda: make(memo))
        if new and self.kept.nbytes > KEPT:
            self.kept.drop(x)
        return found

    def _memory(self) -> int:
        """Return about how many bytes the fit of one pair takes: its rows, and a Gram matrix in both precisions."""
        widths = {"read": self.recipient.d_model, "write": self.donor.d_model}
        rows = {side: len(self._pairs[self.sides[side]][0]) for side in self.sides}
        both = self.donor.d_model + self.recipient.d_model
        return max(2 * rows[side] * both + 12 * min(rows[side], widths[side]) ** 2 for side in self.sides)

    # -- uses ---------------------------------------------------------------------------------------------------------

    def layer_pairs(
        self, layers: Iterable[int], *, match: Matcher = proportional, allowed: LayerChoice = AUTO_LAYERS
    ) -> list[LayerPair]:
        """Return the pairs of the donor's `layers` whose recipient layer is among the `allowed` ones.

        `"auto"` allows the last third; where nothing is matched to it, as of a steering vector of middle layers, all.

        Raises:
            InputError: there is none.
        """
        layers = list(layers)
        matched = self._matched(match, layers)
        if isinstance(allowed, str) and allowed == AUTO_LAYERS:
            last = set(last_third(self.recipient.n_layers))
            allowed = last_third if any(pair.recipient in last for pair in matched) else all_layers
        wanted = set(choose_layers(allowed, self.recipient.n_layers))
        pairs = [pair for pair in matched if pair.recipient in wanted]
        if not pairs:
            raise InputError(
                f"it acts on donor layers {layers}; none is matched to the chosen recipient layers {sorted(wanted)}"
            )
        return pairs

    def _matched(self, match: Matcher, layers: list[int]) -> list[LayerPair]:
        """Return what a matcher, which may be the user's, makes of some layers, after checking that it is possible."""
        if beyond := [layer for layer in layers if layer >= self.donor.n_layers]:
            raise InputError(
                f"it acts on donor layers {beyond}; none is matched, for the donor has 0 .. {self.donor.n_layers - 1}"
            )
        found = match(self.donor, self.recipient, layers)
        known = isinstance(found, list) and all(isinstance(pair, LayerPair) for pair in found)
        if not known or not all(
            pair.donor in layers and pair.recipient in range(self.recipient.n_layers) for pair in found
        ):
            raise InputError(
                f"the matcher made {str(found)[:60]} of the layers {layers}: expected a list of LayerPair(donor, "
                f"recipient) of these, with recipient layers 0 .. {self.recipient.n_layers - 1}"
            )
        return found

    def carry(self, edits: Mapping[int, Sequence[Edit]], pairs: Sequence[LayerPair]) -> dict[LayerPair, Passage]:
        """Carry interventions of the donor's layers into the recipient, pair by pair.

        Args:
            edits: donor layer -> interventions.
            pairs: where they go.

        Raises:
            InputError: what has been carried through converters that are not affine already, rows that are all the
                same or not finite, or a fit that finds nothing.
        """

        def one(pair: LayerPair) -> Passage:
            many = [low_rank(edit, "carrying") for edit in edits[pair.donor]]
            return carried(many, lambda: self.into(pair), lambda: self.back(pair), self.recipient.d_model)

        return dict(zip(pairs, parallel(one, pairs, memory=self._memory()), strict=True))

    def paste(
        self, adapter: Adapter, *, match: Matcher = proportional, layers: LayerChoice = AUTO_LAYERS, scale: float = 1.0
    ) -> Adapter:
        """Carry an adapter of the donor into the recipient; see `commandv.paste`."""
        adapter.model.require(self.donor.model, f"adapter {adapter.name}")
        require_scale(scale)
        pairs = self.layer_pairs(adapter.layers, match=match, allowed=layers)
        interventions: dict[int, tuple[Edit, ...]] = {}
        facts = []
        for pair, passage in self.carry(adapter.interventions, pairs).items():
            scaled = (one.scaled(scale) for one in passage.edits)
            interventions[pair.recipient] = (*interventions.get(pair.recipient, ()), *scaled)
            facts.append({"pair": list(pair), "read": passage.read, "write": passage.write})
        provenance = {
            "made_by": "paste",
            "donor": asdict(self.donor.model),
            "donor_adapter": {"name": adapter.name, "model_format": adapter.model.format, **dict(adapter.provenance)},
            "prompts": self.donor.prompts,
            "link": self.settings(),
            "scale": scale,
            "layers": facts,
        }
        return Adapter(interventions, self.recipient.model, adapter.name, provenance)

    def fidelity(
        self, adapter: Adapter, *, match: Matcher = proportional, layers: LayerChoice = AUTO_LAYERS
    ) -> list[Fidelity]:
        """Measure the converters on the prompts that they were not fitted on, per layer pair.

        Args:
            adapter: the donor's adapter, as given to `paste`.
            match: as given to `paste`, and so is the next.

        Raises:
            InputError: nothing is held out, or the layers are matched to none.
            MismatchError: the adapter is not the donor's.
        """
        adapter.model.require(self.donor.model, f"adapter {adapter.name}")
        if not self.holdout:
            raise InputError("the link has holdout=0: no prompts are left to measure on")
        pairs = self.layer_pairs(adapter.layers, match=match, allowed=layers)
        held_out = min(len(self.rows(side, pairs[0], held_out=True)[0]) for side in self.sides)
        if held_out < 2:
            raise InputError(
                f"holdout={self.holdout} keeps {held_out} rows from the fit, expected at least 2 to measure on; "
                "profile more prompts or link with a larger holdout"
            )

        def measured(pair: LayerPair) -> Fidelity:
            read, write = (self.rows(side, pair, held_out=True)[:2] for side in ("read", "write"))
            many = [low_rank(edit, "fidelity") for edit in adapter.interventions[pair.donor]]
            return layer_fidelity(pair, self.into(pair), self.back(pair), read=read, write=write, many=many)

        return parallel(measured, pairs, memory=self._memory())


@checked
def link(
    donor: Profile,
    recipient: Profile,
    *,
    fit: AnyFitter = Ridge(),
    read_rows: Rows = "end",
    write_rows: Rows | None = None,
    holdout: float = HOLDOUT,
    shuffle: int | None = None,
) -> Link:
    """Link two profiled models: all that is carried from the donor to the recipient goes through this.

    Args:
        donor: profile of the model that things are carried from.
        recipient: profile of the model to carry them into, over the same prompts.
        fit: how converters are fitted; `Pinv()` is the published way, and any callable of (x, y) that returns a
            converter serves, see `commandv.transfer.convert.fitters.Fitter`.
        read_rows: rows for the reading converter (recipient -> donor).
        write_rows: rows for the writing converter (donor -> recipient); None takes text rows where both profiles
            have them, else last-token rows, with a warning.
        holdout: share of the prompts kept from every fit, so that `Link.fidelity` can be told on them.
        shuffle: a control: pair the rows wrongly, by a permutation with this seed.

    Returns:
        The link. Nothing is fitted before something is carried.

    Raises:
        MismatchError: profiles of different prompts.
        InputError: a holdout that is no share, or too few shared rows.
    """
    return Link(donor, recipient, fit=fit, read_rows=read_rows, write_rows=write_rows, holdout=holdout, shuffle=shuffle)


def held_out_prompts(prompts: np.ndarray, share: float) -> np.ndarray:
    """Mark a fixed share of the prompts, the same whichever rows or models are asked about; bool like `prompts`."""
    scattered = (prompts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return scattered.astype(np.float64) / float(1 << 24) < share


def taken(rows: Tensor, index: np.ndarray) -> Tensor:
    """Return the rows at `index`; all of them in their order are the tensor itself, which may be mapped from disk."""
    whole = len(index) == len(rows) and bool((index == np.arange(len(rows))).all())
    return rows if whole else rows[torch.from_numpy(index)]


def require_different(rows: Tensor, what: str) -> None:
    """Raise `InputError` unless there are 2 rows or more, not all the same."""
    if len(rows) < 2:
        raise InputError(f"{what}: {len(rows)} rows to fit on, expected 2 rows or more; profile more prompts")
    if all(torch.equal(rows[0], row) for row in rows[1:]):
        raise InputError(
            f"{what}: all {len(rows)} rows to fit on are the same, so that nothing can be learned from them; profile "
            "different prompts"
        )


def _name(fit: AnyFitter) -> Any:
    """Return what tells a fitter from others: itself where it can be compared, else the object that it is."""
    try:
        hash(fit)
    except TypeError:
        return _Same(fit)
    return fit


@dataclass(frozen=True)
class _Same:
    """An object told from others by identity, and kept alive so that it stays the only one."""

    one: Any

    def __hash__(self) -> int:
        return id(self.one)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.one is other.one
