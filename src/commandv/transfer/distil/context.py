"""Context distillation: the shift of a recipient's own states under a few demonstrations, as a native adapter."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from commandv.adapters.adapter import Intervention
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.models.encoding import Batch, Encoded, Turns, encode, last_logits, pad_replies, run_blocks
from commandv.models.generation import batches
from commandv.models.live import attach_change, reading
from commandv.models.lm import LM
from commandv.models.passes import Edit, Pass
from commandv.models.prefix import shared_prefix
from commandv.positions import Positions
from commandv.progress import track
from commandv.transfer.distil.demonstrations import Demonstrations
from commandv.transfer.distil.fitting import fit_shift, spread
from commandv.transfer.distil.texts import beginning

log = logging.getLogger(__name__)


@checked
@dataclass(frozen=True)
class Context:
    """Fit what demonstrations before a prompt change in the recipient's own states, layer after layer.

    The recipient reads each prompt and the first tokens of the donor's answer alone, and after each of several sets of
    *other* prompts and answers as earlier turns. The set that makes the donor's answer likeliest counts; the wanted
    shift is the difference of the states. In one more pass each layer, from a third of the depth up, is fitted to what
    is still missing of it with the earlier layers' interventions active. Carries openings, phrases and formats.

    Attributes:
        tokens: k, of the answer; the adapter acts at l1+gk.
        sets: how many sets of demonstrations.
        size: demonstrations in a set.
        least: nats a token that a set must gain for a prompt, else no shift is wanted there.
    """

    name: ClassVar[str] = "context"
    tokens: int = 6
    sets: int = 4
    size: int = 4
    least: float = 0.0

    def __post_init__(self) -> None:
        if min(self.tokens, self.size) < 1 or self.sets < 2:
            raise InputError(f"{self}: expected 1 token and 1 demonstration or more, and 2 sets or more")

    def __call__(
        self, lm: LM, shown: Demonstrations, *, rank: int, seed: int, batch_size: int
    ) -> tuple[dict[int, tuple[Intervention, ...]], dict[str, Any]]:
        """Return interventions by layer, and facts of the fit; see `commandv.transfer.distil.distil`."""
        if lm.recurrent:
            raise InputError(f"{lm.id} is a recurrent model, into which contexts cannot be fitted in one pass yet")
        layers = range(lm.n_layers // 3, lm.n_layers)
        lead = beginning(lm, shown.prompts)
        answers = [lead + one for one in shown.answers]
        sets = demonstration_sets(len(shown), self.sets, self.size, seed)
        everyone = range(len(shown))
        with track(f"reading in {lm.id}", total=len(shown) * (1 + len(sets))) as advance:
            alone = _read(lm, shown.prompts, answers, everyone, (), self.tokens, layers, batch_size)
            advance(len(shown))
            best, nats = {layer: rows.clone() for layer, rows in alone.states.items()}, alone.nats.clone()
            for members in sets:
                turns = [(shown.prompts[i], shown.answers[i]) for i in members]
                others = [i for i in everyone if i not in members]  # never a prompt's own answer before it
                read = _read(lm, shown.prompts, answers, others, turns, self.tokens, layers, batch_size)
                index = torch.tensor(others)
                better = read.nats < nats[index]
                nats[index[better]] = read.nats[better]
                for layer in layers:
                    best[layer][index[better]] = read.states[layer][better]
                advance(len(shown))
        gain = alone.nats - nats
        wanted = gain > self.least
        if not wanted.any():
            raise InputError(
                f"demonstrations before a prompt make no answer of {shown.name} likelier to {lm.id} by more than "
                f"{self.least:g} nats a token; give other answers, or use by='vocabulary'"
            )
        shifts = {layer: (best[layer] - alone.states[layer]) * wanted[:, None, None] for layer in layers}
        fitting = _Fitting(alone, shifts, rank, Positions(last=1, generated=self.tokens))
        fitting.run(lm, [_encoded(lm, *one, (), self.tokens) for one in zip(shown.prompts, answers, strict=True)])
        facts = {"sets": [list(map(int, one)) for one in sets], "gain": round(float(gain.mean()), 4)}
        return fitting.made, {**facts, "shifted": int(wanted.sum())}


def demonstration_sets(n: int, sets: int, size: int, seed: int) -> list[list[int]]:
    """Draw sets of demonstrations among n, disjoint as far as they go; a prompt in one is asked after the others only.

    Raises:
        InputError: too few for two sets, so that some prompt would have none of others.
    """
    if n < 2 * size:
        raise InputError(
            f"{n} demonstrations, expected at least {2 * size}: two sets of {size}, as a prompt's own answer never "
            f"stands before it; demonstrate with more prompts, or use by=Context(size={max(1, n // 2)})"
        )
    order = np.random.default_rng(seed).permutation(n)
    return [order[i * size : (i + 1) * size].tolist() for i in range(min(sets, n // size))]


class _Rows(NamedTuple):
    """States at the last prompt token and the first answer tokens, {layer: [n, k + 1, d]}, which of them are real
    [n, k + 1], and the mean nats of the answers' first tokens [n]."""

    states: dict[int, Tensor]
    real: Tensor
    nats: Tensor


def _encoded(lm: LM, prompt: str, answer: str, turns: Turns, tokens: int) -> Encoded:
    """Return a prompt after earlier turns with the first tokens of its answer."""
    try:
        one = encode(lm, prompt, answer, turns=turns)
    except InputError as error:
        limit = lm.context_length
        if not turns or limit is None:
            raise
        raise InputError(
            f"{len(turns)} demonstrations before a prompt do not fit into {lm.id}: {error}. Use smaller sets, "
            f"by=Context(size={max(1, len(turns) // 2)}), shorter answers, or by='vocabulary'"
        ) from error
    stop = one.n_prompt + tokens
    return Encoded(one.ids[:stop], one.n_prompt, one.text_ends[:stop])


def _read(
    lm: LM, prompts: Sequence[str], answers: Sequence[str], index: Sequence[int], turns: Turns, tokens: int,
    layers: range, batch_size: int,
) -> _Rows:  # fmt: skip
    rows = [_encoded(lm, prompts[i], answers[i], turns, tokens) for i in index]
    n, states = len(rows), dict[int, Tensor]()
    real = torch.tensor([[i <= len(one.ids) - one.n_prompt for i in range(tokens + 1)] for one in rows])
    nats = torch.zeros(n)
    kept: dict[int, Tensor] = {}
    with torch.inference_mode():
        prefix = shared_prefix(lm, [one.ids for one in rows], [one.n_prompt for one in rows])
        for members in batches([one.n_prompt for one in rows], batch_size):
            batch, n_prompt = pad_replies(lm, [rows[i] for i in members], shared=prefix.length)
            width = batch.input_ids.shape[1] - n_prompt + 1
            readers = {layer: functools.partial(_keep, kept, layer, width) for layer in layers}
            with reading(lm, readers):
                logits = last_logits(lm, prefix.rest(batch), width, prefix.past(len(members))).float()
            replies = batch.input_ids[:, n_prompt:]
            log_p = (logits[:, :-1].gather(2, replies[:, :, None])[:, :, 0] - logits[:, :-1].logsumexp(-1)).cpu()
            given = real[members, 1:width].float()
            nats[members] = -(log_p * given).sum(1) / given.sum(1)
            for layer in layers:
                states.setdefault(layer, torch.zeros(n, tokens + 1, lm.d_model))[members, :width] = kept[layer]
    return _Rows(states, real, nats)


def _keep(kept: dict[int, Tensor], layer: int, width: int, h: Tensor) -> None:
    kept[layer] = h[:, -width:].float().cpu()


class _Fitting:
    """A change of a live model that fits each layer's intervention when a pass comes by, and lets it act."""

    name = "a fit in one pass"

    def __init__(self, alone: _Rows, shifts: Mapping[int, Tensor], rank: int, positions: Positions) -> None:
        self.alone, self.shifts, self.rank, self._positions = alone, shifts, rank, positions
        self.made: dict[int, tuple[Intervention, ...]] = {}
        self._columns = 0

    @property
    def layers(self) -> list[int]:
        """The layers that are fitted."""
        return sorted(self.shifts)

    @property
    def positions(self) -> set[Positions]:
        """Where the interventions will act."""
        return {self._positions}

    def edits(self, run: Pass) -> dict[int, Edit]:
        """Return what fits and changes each layer."""
        return {layer: functools.partial(self._edit, layer) for layer in self.layers}

    def run(self, lm: LM, rows: Sequence[Encoded]) -> None:
        """Fit all layers in one pass over all rows."""
        with torch.inference_mode():
            prefix = shared_prefix(lm, [one.ids for one in rows], [one.n_prompt for one in rows])
            batch, n_prompt = pad_replies(lm, rows, shared=prefix.length)
            self._columns = batch.input_ids.shape[1] - n_prompt + 1
            past = prefix.past(len(rows))
            with attach_change(lm, self), track(f"fitting in {lm.id}", total=len(self.shifts)) as advance:
                self._advance = advance
                run_blocks(lm, Batch(*prefix.rest(batch)), past)

    def _edit(self, layer: int, h: Tensor) -> Tensor:
        here = h[:, -self._columns :].float()
        prompts, columns = self.alone.real[:, : self._columns].nonzero(as_tuple=True)
        x, base = here.cpu()[prompts, columns], self.alone.states[layer][prompts, columns]
        missing = self.shifts[layer][prompts, columns] - (x - base)
        one = fit_shift(x, missing, prompts.numpy(), unit=spread(base), rank=self.rank, positions=self._positions)
        self.made[layer] = (one,)
        self._advance(1)
        changed = (here + one.to(h.device).delta(here)).to(h.dtype)
        return torch.cat([h[:, : -self._columns], changed], 1)
