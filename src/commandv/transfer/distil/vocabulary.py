"""The vocabulary as the bridge: what an adapter changes in its donor, asked of the recipient."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from commandv.adapters.adapter import Intervention
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.models.encoding import Encoded, encode, pad_replies, run_blocks
from commandv.models.generation import batches
from commandv.models.live import reading
from commandv.models.lm import LM
from commandv.models.prefix import shared_prefix
from commandv.models.template import end_of_turn
from commandv.positions import Positions
from commandv.progress import track
from commandv.transfer.distil.demonstrate import places
from commandv.transfer.distil.demonstrations import END, Demonstrations
from commandv.transfer.distil.head import Head
from commandv.transfer.distil.rounds import LIKELY, Places, Wanted, Words, chunks, descend
from commandv.transfer.distil.texts import beginning, tokens_by_text

CLIP = 10.0  # nats of a log-ratio
SHARED = 0.5  # of the donor's likely tokens: with fewer in the recipient's vocabulary its ratios say too little
EARLY = 6  # tokens of an answer that every row of is used
HELD_OUT = 0.2  # of the prompts, for the stop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _AtTheLastBlock:
    """Rounds of ridge regression at the last block; see `commandv.transfer.distil.rounds.descend`."""

    rounds: int = 4  # at most so many
    places: int = 2560  # at most so many; of an answer's later tokens a random part is used

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.places < 32:
            raise InputError(f"{self}: expected 1 round and 32 places or more")


@checked
@dataclass(frozen=True)
class Vocabulary(_AtTheLastBlock):
    """Ask of the recipient's own distribution what the adapter changes in the donor's.

    q(v) ∝ p(v) exp(donor's log-ratio of v) on tokens of the same text, where both tokenizers have a token's end at the
    same character of the answer; all other tokens have the donor's ratio of the rest. Compiled into one intervention
    at the last block. Carries what the *adapter* changes and leaves the recipient's own competence.

    Source: proxy tuning (arXiv 2401.08565), as an adapter in place of two more models at decoding.
    """

    name: ClassVar[str] = "vocabulary"

    def __call__(
        self, lm: LM, shown: Demonstrations, *, rank: int, seed: int, batch_size: int
    ) -> tuple[dict[int, tuple[Intervention, ...]], dict[str, Any]]:
        """Return interventions by layer, and facts of the fit; see `commandv.transfer.distil.distil`."""
        if shown.changes is None:
            raise InputError(
                f"the demonstrations of {shown.name} are texts only, without what an adapter changes in its donor; use "
                "by='context' or 'answers', or demonstrate with a donor and its adapter"
            )
        share, tokens = shared_tokens(lm, shown)
        if share < SHARED:
            raise InputError(
                f"{share:.0%} of what {shown.donor.id or 'the donor'} says is in tokens that {lm.id} has, too; "
                f"by='vocabulary' needs {SHARED:.0%}. Use by='context'"
            )
        head, lead = Head.of(lm), beginning(lm, shown.prompts)
        here = read_places(lm, shown, lead, seed=seed, most=self.places, batch_size=batch_size)
        by_place = {(int(p), int(e)): i for i, (p, e) in enumerate(shown.changes.places)}
        rows = [by_place.get((int(p), int(e)), -1) for p, e in zip(here.groups, here.ends, strict=True)]
        met = torch.tensor(rows)
        here, met = here.at(met >= 0), met[met >= 0]
        first, told = first_tokens(lm, shown, lead), shown.changes
        named = torch.where((here.columns == 0)[:, None], first[told.tokens[met]], tokens[told.tokens[met]])
        rest = told.rest[met, None].clamp(-CLIP, CLIP)
        change = Change(named, told.ratio[met].clamp(-CLIP, CLIP) - rest)
        interventions, facts = _fit(lm, head, here, change, rank, self.rounds)
        return interventions, {"shared_tokens": round(share, 4), **facts}


@checked
@dataclass(frozen=True)
class Answers(_AtTheLastBlock):
    """Ask of the recipient the donor's answers, token by token, in the same rounds: lasting styles, and loops."""

    name: ClassVar[str] = "answers"

    def __call__(
        self, lm: LM, shown: Demonstrations, *, rank: int, seed: int, batch_size: int
    ) -> tuple[dict[int, tuple[Intervention, ...]], dict[str, Any]]:
        """Return interventions by layer, and facts of the fit; see `commandv.transfer.distil.distil`."""
        head, lead = Head.of(lm), beginning(lm, shown.prompts)
        here = read_places(lm, shown, lead, seed=seed, most=self.places, batch_size=batch_size)
        here = here.at(here.tokens >= 0)
        return _fit(lm, head, here, None, rank, self.rounds)


class Change(NamedTuple):
    """What is to change in the recipient's log-odds against the rest: of tokens [n, t] (-1 for none), nats [n, t]."""

    tokens: Tensor
    nats: Tensor


def _fit(
    lm: LM, head: Head, here: Places, change: Change | None, rank: int, rounds: int
) -> tuple[dict[int, tuple[Intervention, ...]], dict[str, Any]]:
    if not here.held_out.any() or here.held_out.all():
        raise InputError("too few demonstrations to hold some out for the stop; expected answers to 4 prompts or more")
    words = Words.at(head, here.states, here.tokens if change is None else change.tokens)
    positions = Positions(last=1, generated=max(1, int(here.columns.max())))
    wanted = _wanted(words, here, change)
    one, told = descend(words, here, wanted, rank=rank, rounds=rounds, positions=positions)
    log.info("%s: held-out divergence %s", lm.id, " -> ".join(f"{value:.3f}" for value in told))
    return {lm.n_layers - 1: (one,)}, {"places": len(here.states), "held_out_divergence": told}


def _wanted(words: Words, here: Places, change: Change | None) -> Wanted:
    """Return q ∝ p exp(change), or without a change the token that follows in the answer."""
    size, parts = len(words.head.weight), []
    for rows in chunks(len(here.states), size):
        log_p = words.log_p(here.states[rows], rows)
        if change is None:
            q = torch.zeros_like(log_p).scatter_(1, words.columns[here.tokens[rows], None], 1.0)
        else:
            tokens = change.tokens[rows]
            columns = torch.where(tokens >= 0, words.columns[tokens], size)
            added = torch.zeros(len(log_p), size + 1).scatter_(1, columns, change.nats[rows])[:, :size]
            q = (log_p + added).softmax(1)
        heavy = (q + log_p.exp())[:, :-1].topk(min(LIKELY, size - 1), 1).indices
        entropy = torch.special.entr(q).sum(1)
        parts.append(Wanted(words.head.mean(q), q[:, -1], entropy, heavy, q.gather(1, heavy)))
    return Wanted(*(torch.cat(many) for many in zip(*parts, strict=True)))


def shared_tokens(lm: LM, shown: Demonstrations) -> tuple[float, Tensor]:
    """Return the share of the donor's likely tokens, by probability, that a recipient has, and its tokens or -1 [v]."""
    known = tokens_by_text(lm)
    tokens = torch.tensor([known.get(text, -1) for text in shown.vocabulary])
    if shown.changes is None or not len(tokens):
        return 0.0, tokens
    p = shown.changes.log_p.exp()
    return float((p * (tokens[shown.changes.tokens] >= 0)).sum() / p.sum()), tokens


def first_tokens(lm: LM, shown: Demonstrations, lead: str) -> Tensor:
    """Return the recipient's tokens for the donor's at an answer's beginning, after its white space."""
    known = tokens_by_text(lm)
    return torch.tensor([known.get(lead + text if text != END else text, -1) for text in shown.vocabulary])


def read_places(lm: LM, shown: Demonstrations, lead: str, *, seed: int, most: int, batch_size: int) -> Places:
    """Read the answers in the recipient, and return the places where it predicts a token of them."""
    texts = zip(shown.prompts, shown.answers, strict=True)
    encoded = [encode(lm, prompt, lead + answer) for prompt, answer in texts]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(encoded), generator=generator)
    held_out = set(order[: round(HELD_OUT * len(order))].tolist())
    stop, facts, at = end_of_turn(lm), list[tuple[int, ...]](), list[list[int]]()
    for i, one in enumerate(encoded):
        ends, columns = places(one)
        last = -1 if stop is None or _cut_off(shown, i) else stop
        follows = [*one.ids[one.n_prompt :], last]
        facts += [
            (i, i in held_out, max(0, end - len(lead)), column, follows[column])
            for end, column in zip(ends, columns, strict=True)
        ]
        at.append(columns)
    told = torch.tensor(facts)
    states = _states(lm, encoded, at, batch_size)
    whole = Places(states, told[:, 0], told[:, 1].bool(), told[:, 2], told[:, 3], told[:, 4])
    return whole.at(_chosen(whole.columns, most, generator))


def _states(lm: LM, encoded: Sequence[Encoded], at: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """Return the last block's output after so many tokens of each reply, one below the other."""
    lengths, found = [one.n_prompt for one in encoded], dict[int, Tensor]()
    with torch.inference_mode(), track(f"reading in {lm.id}", total=len(encoded)) as advance:
        prefix = shared_prefix(lm, [one.ids for one in encoded], lengths)
        for members in batches(lengths, batch_size, alike=lengths if lm.recurrent else None):
            batch, n_prompt = pad_replies(lm, [encoded[i] for i in members], shared=prefix.length)
            kept: list[Tensor] = []
            with reading(lm, {lm.n_layers - 1: kept.append}):
                run_blocks(lm, prefix.rest(batch), prefix.past(len(members)))
            for row, i in enumerate(members):
                columns = torch.tensor(at[i], device=kept[0].device) + n_prompt - 1 - prefix.length
                found[i] = kept[0][row, columns].float().cpu()
            advance(len(members))
    return torch.cat([found[i] for i in range(len(encoded))])


def _cut_off(shown: Demonstrations, i: int) -> bool:
    """Tell whether an answer may have gone on: what comes after its last token is then unknown."""
    changes = shown.changes
    if changes is None:
        return False
    mine = (changes.places[:, 0] == i).nonzero()[:, 0]
    last = mine[changes.places[mine, 1].argmax()]
    likeliest = changes.tokens[last, changes.log_p[last].argmax()]
    return shown.vocabulary[int(likeliest)] != END


def _chosen(columns: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return all places at answers' beginnings and a random part of the later ones, in their order."""
    early = (columns <= EARLY).nonzero()[:, 0]
    late = (columns > EARLY).nonzero()[:, 0]
    drawn = late[torch.randperm(len(late), generator=generator)[: max(0, most - len(early))]]
    return torch.cat([early, drawn]).sort().values
