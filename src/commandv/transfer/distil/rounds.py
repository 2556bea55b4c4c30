"""Rounds of ridge regression at the last block towards wanted next-token distributions, without backpropagation."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

LOGITS = 1 << 27  # bytes of logits at once
LIKELY = 48  # tokens of a state that count by themselves
BETTER = 0.99  # of the held-out divergence: a round that leaves more of it is the last, and is left out
COST = 0.1  # nats that a shift of one standard deviation in one dimension costs, times two
SEARCHED = 256  # states on which a step's length is chosen
LENGTHS = tuple(2.0 ** (k / 2) for k in range(-14, 5))  # of a step, in standard deviations of the states


class Wanted(NamedTuple):
    """Distributions q wanted at n states over the tokens of `Words`."""

    mean: Tensor  # E_q of the head's rows, [n, d_model]
    rest: Tensor  # q of the rest, [n]
    entropy: Tensor  # of q in nats, [n]
    tokens: Tensor  # those that count at each state, as columns [n, t]
    q: Tensor  # of these, [n, t]


@dataclass(frozen=True, eq=False)
class Words:
    """The tokens that count at n given states, and all others together as one more, the rest.

    Some thousand in place of the whole vocabulary, through which the states pass once. The rest's logit is
    y · (mean row) + level, with the level that gives it its mass at the given states.
    """

    head: Head  # with the rows of these tokens, and the mean row of all as the last, [m + 1, d_model]
    columns: Tensor  # of each token of the vocabulary, m for the rest, [V]
    level: Tensor  # of the rest, [n]

    @classmethod
    def at(cls, head: Head, states: Tensor, named: Tensor) -> Words:
        """Take the likeliest tokens at each state, and those named (-1 names none)."""
        normaliser, likely = [], []
        for rows in chunks(len(states), len(head.weight)):
            logits = head.logits(head.normed(states[rows]))
            normaliser.append(logits.logsumexp(1))
            likely.append(logits.topk(min(LIKELY, logits.shape[1]), 1).indices)
        tokens = torch.cat([torch.cat(likely).flatten(), named[named >= 0]]).unique()
        mean = head.weight.float().mean(0, keepdim=True)
        rows_of = head.weight[tokens.to(head.weight.device)].float()
        small = replace(head, weight=torch.cat([rows_of, mean]))
        columns = torch.full((len(head.weight),), len(tokens))
        columns[tokens] = torch.arange(len(tokens))
        z, levels = torch.cat(normaliser), []
        for rows in chunks(len(states), len(tokens)):
            logits = small.logits(small.normed(states[rows]))
            left = 1 - (logits[:, :-1] - z[rows, None]).exp().sum(1)
            levels.append(left.clamp(min=1e-6).log() + z[rows] - logits[:, -1])
        return cls(small, columns, torch.cat(levels))

    def log_p(self, states: Tensor, rows: slice | Tensor) -> Tensor:
        """Return log-probabilities [.., m + 1] at the states of some of the places."""
        logits = self.head.logits(self.head.normed(states))
        logits[:, -1] += self.level[rows]
        return logits.log_softmax(1)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the recipient predicts a token of the answers."""

    states: Tensor  # the last block's output, [n, d_model]
    groups: Tensor  # prompt numbers, [n]
    held_out: Tensor  # places of prompts on which nothing is fitted, bool [n]
    ends: Tensor  # characters of the answer that stand before, [n]
    columns: Tensor  # tokens of the answer that stand before, [n]
    tokens: Tensor  # the token that follows in the answer, [n]; -1 after a last one that was cut off

    def at(self, index: Tensor) -> Places:
        """Return some of the places."""
        parts = (self.states, self.groups, self.held_out, self.ends, self.columns, self.tokens)
        return Places(*(one[index] for one in parts))


def descend(
    words: Words, here: Places, wanted: Wanted, *, rank: int, rounds: int, positions: Positions
) -> tuple[Intervention, list[float]]:
    """Move the last block's output so that KL(q || p) falls, round by round.

    A round regresses shifts of the states on the states before any round (one factorisation for all), keeps `rank`
    directions, and goes as far along them as the divergence falls. The shifts are the better of two: a damped Newton
    step of each state's own, cut where it is longer than the mean (else few decide all), and the gradient times the
    variance of each dimension. It ends when prompts that are held out gain no more.

    Returns:
        One intervention that adds up the rounds, and the mean held-out divergence after each, before any at index 0.
    """
    fit = ~here.held_out
    groups, unit, kept = here.groups[fit].numpy().astype(np.int64), spread(here.states[fit]), Kept()
    few = fit.nonzero()[:, 0]
    few = few[torch.linspace(0, len(few) - 1, min(SEARCHED, len(few))).long()]
    moved, parts, told = torch.zeros_like(here.states), list[Intervention](), list[float]()
    with track("rounds at the last block", total=rounds) as advance:
        for number in range(rounds + 1):
            divergence, shifts = _shifts(words, here.states + moved, wanted, unit, last=number == rounds)
            told.append(round(float(divergence[here.held_out].mean()), 5))
            if number and told[-1] > BETTER * told[-2]:
                parts.pop()
                told.pop()
                break
            if number == rounds:
                break
            tried = []
            for shift in shifts:
                one = fit_shift(
                    here.states[fit], shift[fit], groups, unit=unit, rank=rank, positions=positions, kept=kept
                )
                left, length = _length(words, here.states + moved, one.delta(here.states), wanted, few)
                tried.append((left, one.scaled(length)))
            best = min(tried, key=lambda one: one[0])[1]
            parts.append(best)
            moved = moved + best.delta(here.states)
            advance(1)
    if not parts:
        nothing = torch.zeros(1, len(unit))
        return Intervention(nothing, torch.zeros(1), nothing, positions=positions), told
    return parts[0].joined(parts[1:]), told


def chunks(n: int, vocabulary: int) -> list[slice]:
    """Return the rows in parts whose logits fit into `LOGITS` bytes."""
    size = max(1, LOGITS // (4 * vocabulary))
    return [slice(a, min(a + size, n)) for a in range(0, n, size)]


def _divergence(log_p: Tensor, y: Tensor, words: Words, wanted: Wanted, rows: slice | Tensor) -> Tensor:
    """Return KL(q || p); logits are linear in y, so E_q[log p] needs E_q of the rows alone."""
    column = 0
    normaliser = y @ words.head.weight[column].float().cpu() - log_p[:, column]
    cross = (y * wanted.mean[rows]).sum(1) + wanted.rest[rows] * words.level[rows] - normaliser
    return -cross - wanted.entropy[rows]


def _shifts(
    words: Words, states: Tensor, wanted: Wanted, unit: Tensor, *, last: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return KL(q || p) [n], and two shifts of each state that lower it, [n, d_model] each.

    The first is the δ that makes KL(q || p) + COST/2 |δ / unit|² least, to second order and with the curvature of the
    tokens that count; the second is the gradient in units, times -1.
    """
    divergence, newton, slopes = [], [], []
    for rows in chunks(len(states), max(len(words.head.weight), LIKELY * states.shape[1])):
        h, tokens = states[rows], wanted.tokens[rows]
        log_p = words.log_p(h, rows)
        divergence.append(_divergence(log_p, words.head.normed(h), words, wanted, rows))
        if last:
            continue
        p = log_p.exp()
        slope = unit * words.head.backward(h, wanted.mean[rows] - words.head.mean(p))
        weight = (p.gather(1, tokens) + wanted.q[rows]) / 2
        curve = torch.diag_embed(weight) - weight[:, :, None] * weight[:, None, :]
        moves = unit * words.head.backward(h[:, None], words.head.rows(tokens))
        left = COST * torch.eye(tokens.shape[1]) + curve @ (moves @ moves.mT)
        solved = torch.linalg.solve(left, curve @ (moves @ slope[:, :, None]))
        newton.append((slope - (moves.mT @ solved)[:, :, 0]) / COST)
        slopes.append(slope)
    if last:
        return torch.cat(divergence), (states, states)
    shift = torch.cat(newton)
    lengths = shift.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.cat(divergence), (unit * shift * (lengths.mean() / lengths).clamp(max=1), unit * torch.cat(slopes))


def _length(words: Words, states: Tensor, step: Tensor, wanted: Wanted, few: Tensor) -> tuple[float, float]:
    """Return the least mean KL(q || p) that a step leaves at some states, and its length."""
    size, found = float(step[few].pow(2).mean().sqrt()) / float(states[few].std(0).mean()), []
    for length in LENGTHS:
        length /= max(size, 1e-12)
        h = states[few] + length * step[few]
        found.append((float(_divergence(words.log_p(h, few), words.head.normed(h), words, wanted, few).mean()), length))
    return min(found)
