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
from commandv.transfer.distil.demonstrations import Changes, Demonstrations
from commandv.transfer.distil.fitting import fit_shift, spread
from commandv.transfer.distil.texts import beginning

LOGITS = 1 << 28  # bytes of logits at once
OPENING = 6  # places of an answer that do not tell whether a style lasts
SHORT = 4  # places without a change that every answer is given, so that a few do not make it strong
FEWEST = 8  # demonstrations; from fewer the context learns little

log = logging.getLogger(__name__)


@checked
@dataclass(frozen=True)
class Context:
    """Fit what demonstrations before a prompt change in the recipient's own states, layer after layer.

    The recipient reads each prompt and the first tokens of the donor's answer alone, and after each of several sets of
    *other* prompts and answers as earlier turns. The set that makes the donor's answer likeliest counts; the wanted
    shift is the difference of the states. In one more pass each layer, from a third of the depth up, is fitted to what
    is still missing of it with the earlier layers' interventions active. Carries openings, phrases and formats, and
    after many strong demonstrations, into a base model, styles that last.

    Attributes:
        tokens: k, of the answer; the adapter acts at l1+gk.
        sets: how many sets of demonstrations.
        size: demonstrations in a set; fewer where there are not two sets of so many, or they do not fit in.
        least: nats a token that a set must gain for a prompt, else no shift is wanted there.
        strongest: make the sets of the demonstrations that the adapter changes most after their opening, in place of
            drawing them with the seed. Texts only are always drawn.
    """

    name: ClassVar[str] = "context"
    tokens: int = 6
    sets: int = 4
    size: int = 4
    least: float = 0.0
    strongest: bool = False

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
        asked = [(prompt, lead + answer) for prompt, answer in zip(shown.prompts, shown.answers, strict=True)]
        rows = [_encoded(lm, *one, (), self.tokens) for one in asked]
        sets = demonstration_sets(shown, self.sets, self.size, None if self.strongest else seed)
        after = _after_sets(lm, shown, asked, sets, self.tokens)
        with track(f"reading in {lm.id}", total=len(shown) * (1 + len(sets))) as advance:
            alone = _read(lm, rows, self.tokens, layers, batch_size)
            advance(len(shown))
            best, nats = {layer: states.clone() for layer, states in alone.states.items()}, alone.nats.clone()
            for others in after:
                read = _read(lm, list(others.values()), self.tokens, layers, batch_size, after_turns=True)
                index = torch.tensor(list(others))
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
        for layer in layers:
            best[layer][~wanted] = alone.states[layer][~wanted]
        fitting = _Fitting(alone, best, rank, Positions(last=1, generated=self.tokens))
        fitting.run(lm, rows)
        read_after = [[i for i in range(len(shown)) if i not in others] for others in after]
        facts = {"sets": read_after, "gain": round(float(gain.mean()), 4)}
        return fitting.made, {**facts, "shifted": int(wanted.sum())}


# Base models learn a style from many demonstrations, and only where these are alike and full of it.
MANY = Context(tokens=24, sets=2, size=16, strongest=True)


def demonstration_sets(shown: Demonstrations, sets: int, size: int, seed: int | None) -> list[list[int]]:
    """Choose sets of demonstrations, disjoint as far as they go; a prompt in one is asked after the others only.

    Without a seed they are the strongest: those in which the adapter changes most after the opening, as a mean over
    places that counts short answers less; with one, or where what the adapter changes is not known, they are drawn.
    Where there are not two sets of that size, they are half of the demonstrations each.

    Raises:
        InputError: a single one: a prompt's own answer never stands before it.
    """
    n = len(shown)
    if n < 2:
        raise InputError("1 demonstration, expected 2 or more: a prompt's own answer never stands before it")
    size = min(size, n // 2)
    sets = min(sets, n // size)
    if seed is not None or shown.changes is None:
        order = np.random.default_rng(seed or 0).permutation(n)
        return [order[i * size : (i + 1) * size].tolist() for i in range(sets)]
    strengths = [_strength(shown.changes, i) for i in range(n)]
    order = np.argsort(-np.array(strengths), kind="stable")
    return [order[i : sets * size : sets].tolist() for i in range(sets)]


def _strength(changes: Changes, number: int) -> float:
    """Return the nats by which the adapter changes what its donor says after an answer's opening."""
    mine = changes.places[:, 0] == number
    later = changes.divergence[mine][changes.places[mine, 1].argsort()][OPENING:]
    return float(later.sum()) / (len(later) + SHORT)


class _Rows(NamedTuple):
    """States at the last prompt token and the first answer tokens, {layer: [n, k + 1, d]}, which of them are real
    [n, k + 1], and the mean nats of the answers' first tokens [n]. States are in the model's own precision."""

    states: dict[int, Tensor]
    real: Tensor
    nats: Tensor


def _after_sets(
    lm: LM, shown: Demonstrations, asked: Sequence[tuple[str, str]], sets: Sequence[Sequence[int]], tokens: int
) -> list[dict[int, Encoded]]:
    """Return, for each set, every other prompt after it, by number; of sets that do not fit in, as many as do."""
    found = []
    try:
        for members in sets:
            turns = [(shown.prompts[i], shown.answers[i]) for i in members]
            found.append({i: _encoded(lm, *one, turns, tokens) for i, one in enumerate(asked) if i not in members})
    except InputError as error:  # each fits alone, so that these are too long
        size = len(sets[0]) // 2
        if not size:
            raise InputError(
                f"not even one demonstration before a prompt fits into {lm.id}: {error}. Use shorter answers, or "
                "by='vocabulary'"
            ) from error
        log.info("%d demonstrations before a prompt do not fit into %s; trying %d", len(sets[0]), lm.id, size)
        return _after_sets(lm, shown, asked, [one[:size] for one in sets], tokens)
    return found


def _encoded(lm: LM, prompt: str, answer: str, turns: Turns, tokens: int) -> Encoded:
    """Return a prompt after earlier turns with the first tokens of its answer."""
    one = encode(lm, prompt, answer, turns=turns)
    stop = one.n_prompt + tokens
    return Encoded(one.ids[:stop], one.n_prompt, one.text_ends[:stop])


def _read(
    lm: LM, rows: Sequence[Encoded], tokens: int, layers: range, batch_size: int, *, after_turns: bool = False
) -> _Rows:
    n, states = len(rows), dict[int, Tensor]()
    real = torch.tensor([[i <= len(one.ids) - one.n_prompt for i in range(tokens + 1)] for one in rows])
    nats = torch.zeros(n)
    kept: dict[int, Tensor] = {}
    lengths = [one.n_prompt for one in rows]
    size = lm.model.get_output_embeddings().weight.shape[0]
    batch_size = max(1, min(batch_size, LOGITS // (4 * (tokens + 1) * size)))
    with torch.inference_mode():
        prefix = shared_prefix(lm, [one.ids for one in rows], lengths)
        # A long beginning is worth batches without padding, over which windows of attention cannot see.
        alike = after_turns and not prefix.length
        if alike:
            prefix = shared_prefix(lm, [one.ids for one in rows], lengths, alike=True)
        for members in batches(lengths, batch_size, alike=lengths if alike else None):
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
                empty = torch.zeros(n, tokens + 1, lm.d_model, dtype=kept[layer].dtype)
                states.setdefault(layer, empty)[members, :width] = kept[layer]
    return _Rows(states, real, nats)


def _keep(kept: dict[int, Tensor], layer: int, width: int, h: Tensor) -> None:
    kept[layer] = h[:, -width:].cpu()


class _Fitting:
    """A change of a live model that fits each layer's intervention when a pass comes by, and lets it act."""

    name = "a fit in one pass"

    def __init__(self, alone: _Rows, aims: Mapping[int, Tensor], rank: int, positions: Positions) -> None:
        self.alone, self.aims, self.rank, self._positions = alone, aims, rank, positions
        self.made: dict[int, tuple[Intervention, ...]] = {}
        self._columns = 0

    @property
    def layers(self) -> list[int]:
        """The layers that are fitted."""
        return sorted(self.aims)

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
            with attach_change(lm, self), track(f"fitting in {lm.id}", total=len(self.aims)) as advance:
                self._advance = advance
                run_blocks(lm, Batch(*prefix.rest(batch)), past)

    def _edit(self, layer: int, h: Tensor) -> Tensor:
        here = h[:, -self._columns :].float()
        prompts, columns = self.alone.real[:, : self._columns].nonzero(as_tuple=True)
        x = here.cpu()[prompts, columns]
        base, aim = (states[layer][prompts, columns].float() for states in (self.alone.states, self.aims))
        one = fit_shift(x, aim - x, prompts.numpy(), unit=spread(base), rank=self.rank, positions=self._positions)
        self.made[layer] = (one,)
        self._advance(1)
        changed = (here + one.to(h.device).delta(here)).to(h.dtype)
        return torch.cat([h[:, : -self._columns], changed], 1)
