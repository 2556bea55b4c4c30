"""Rounds of ridge regression at the last block towards wanted next-token distributions, without backpropagation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from commandv.adapters.adapter import Intervention
from commandv.positions import Positions
from commandv.progress import track
from commandv.transfer.convert.kept import Kept
from commandv.transfer.distil.fitting import fit_shift, spread
from commandv.transfer.distil.head import Head

LOGITS = 1 << 28  # bytes of logits at once
LIKELY = 64  # tokens of the present distribution by which a step's length is found
BETTER = 0.995  # of the held-out divergence: a round that leaves more of it is the last, and is left out
LONGEST = 64.0  # root mean squares of a step's logits


class Wanted(NamedTuple):
    """Distributions q wanted at n states, as far as the rounds need them.

    Attributes:
        mean: E_q[W], [n, d_model].
        entropy: of q in nats, [n].
        tokens: likely ones [n, t]; a repeated one stands for none.
    """

    mean: Tensor
    entropy: Tensor
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Where the recipient predicts a token of the answers.

    Attributes:
        states: the last block's output, [n, d_model].
        groups: prompt numbers, [n].
        held_out: places of prompts on which nothing is fitted, bool [n].
        ends: characters of the answer that stand before, [n].
        columns: tokens of the answer that stand before, [n].
        tokens: the token that follows in the answer, [n]; -1 after a last one that was cut off.
    """

    states: Tensor
    groups: Tensor
    held_out: Tensor
    ends: Tensor
    columns: Tensor
    tokens: Tensor

    def at(self, index: Tensor) -> Places:
        """Return some of the places."""
        parts = (self.states, self.groups, self.held_out, self.ends, self.columns, self.tokens)
        return Places(*(one[index] for one in parts))


class _Present(NamedTuple):
    """Where the rounds are: KL(q || p) [n], E_p[W] [n, d], log-normaliser [n], likely tokens [n, LIKELY]."""

    divergence: Tensor
    mean: Tensor
    normaliser: Tensor
    likely: Tensor


def descend(
    head: Head, here: Places, wanted: Wanted, *, rank: int, rounds: int, positions: Positions
) -> tuple[Intervention, list[float]]:
    """Move the last block's output so that KL(q || p) falls, round by round.

    A round regresses the gradient at each state, times the variance of each dimension, on the state before any round
    (one factorisation for all), keeps `rank` directions, and goes as far along it as the divergence falls on the likely
    tokens. It ends when prompts that are held out gain no more.

    Returns:
        One intervention that adds up the rounds, and the mean held-out divergence after each, before any at index 0.
    """
    fit = ~here.held_out
    groups, unit, kept = here.groups[fit].numpy().astype(np.int64), spread(here.states[fit]), Kept()
    moved, parts, told = torch.zeros_like(here.states), list[Intervention](), list[float]()
    with track("rounds at the last block", total=rounds) as advance:
        for number in range(rounds + 1):
            now = _present(head, here.states + moved, wanted)
            told.append(round(float(now.divergence[here.held_out].mean()), 5))
            if number and told[-1] > BETTER * told[-2]:
                parts.pop()
                told.pop()
                break
            if number == rounds:
                break
            gradient = head.backward(here.states + moved, wanted.mean - now.mean)
            one = fit_shift(
                here.states[fit], (gradient * unit * unit)[fit], groups, unit=unit, rank=rank, positions=positions,
                kept=kept,
            )  # fmt: skip
            step = one.delta(here.states)
            length = _length(
                head,
                (here.states + moved)[fit],
                step[fit],
                Wanted(*(one[fit] for one in wanted)),
                _Present(*(one[fit] for one in now)),
            )
            parts.append(one.scaled(length))
            moved = moved + length * step
            advance(1)
    if not parts:
        return Intervention(
            torch.zeros(1, len(unit)), torch.zeros(1), torch.zeros(1, len(unit)), positions=positions
        ), told
    return parts[0].joined(parts[1:]), told


def chunks(n: int, vocabulary: int) -> list[slice]:
    """Return the rows in parts whose logits fit into `LOGITS` bytes."""
    size = max(1, LOGITS // (4 * vocabulary))
    return [slice(a, min(a + size, n)) for a in range(0, n, size)]


def _present(head: Head, states: Tensor, wanted: Wanted) -> _Present:
    """Run all states through the vocabulary once; logits are linear in y = norm(h): E_q[log p] = y · E_q[W] - log Z."""
    parts = []
    for rows in chunks(len(states), len(head.weight)):
        y = head.normed(states[rows])
        logits = head.logits(y)
        normaliser = logits.logsumexp(1)
        divergence = normaliser - (y * wanted.mean[rows]).sum(1) - wanted.entropy[rows]
        likely = logits.topk(min(LIKELY, logits.shape[1]), 1).indices
        mean = head.mean(logits.sub_(normaliser[:, None]).exp_())
        parts.append(_Present(divergence, mean, normaliser, likely))
    return _Present(*(torch.cat(many) for many in zip(*parts, strict=True)))


def _length(head: Head, states: Tensor, step: Tensor, wanted: Wanted, now: _Present) -> float:
    """Return how far to go: the minimum along the step of mean KL(q || p), which is convex in the logits.

    Likely tokens of p and q count each; all others move together, by their mean.
    """
    change = head.forward(states, step)
    aim = (change * wanted.mean).sum(1)
    log_p, moves = [], []
    for rows in chunks(len(states), (LIKELY + wanted.tokens.shape[1]) * states.shape[1]):
        tokens = torch.cat([now.likely[rows], wanted.tokens[rows]], 1)
        first = tokens[:, :, None] == tokens[:, None, :]
        repeated = (first.tril(-1)).any(2)
        vectors = head.rows(tokens)
        p = torch.einsum("ntd,nd->nt", vectors, head.normed(states[rows])) - now.normaliser[rows, None]
        p = p.masked_fill(repeated, -torch.inf)
        move = torch.einsum("ntd,nd->nt", vectors, change[rows])
        rest = (1 - p.exp().sum(1)).clamp(min=1e-6)
        mean = ((change[rows] * now.mean[rows]).sum(1) - (p.exp() * move).sum(1)) / rest
        log_p.append(torch.cat([p, rest.log()[:, None]], 1))
        moves.append(torch.cat([move, mean.clamp(move.min(1).values, move.max(1).values)[:, None]], 1))
    start, towards = torch.cat(log_p), torch.cat(moves)
    scale = float(towards[start.isfinite()].pow(2).mean().sqrt())
    if scale <= 0:
        return 0.0
    low, high = 0.0, LONGEST / scale
    for _ in range(40):  # bisection of the derivative
        middle = (low + high) / 2
        slope = ((start + middle * towards).softmax(1) * towards).sum(1) - aim
        low, high = (middle, high) if float(slope.mean()) < 0 else (low, middle)
    return low
