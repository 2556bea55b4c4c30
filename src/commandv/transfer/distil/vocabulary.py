"""The vocabulary as the bridge: what an adapter changes in its donor, asked of the recipient."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from commandv.adapters.adapter import Intervention
from commandv.errors import InputError
from commandv.models.encoding import encode, pad_replies, run_blocks
from commandv.models.generation import batches
from commandv.models.live import reading
from commandv.models.load import LM
from commandv.models.template import end_of_turn
from commandv.positions import Positions
from commandv.progress import track
from commandv.transfer.distil.demonstrate import places
from commandv.transfer.distil.demonstrations import END, Changes, Demonstrations
from commandv.transfer.distil.head import Head
from commandv.transfer.distil.rounds import Places, Wanted, chunks, descend
from commandv.transfer.distil.texts import beginning, tokens_by_text

CLIP = 10.0  # nats of a log-ratio
SHARED = 0.5  # of the donor's likely tokens: with fewer in the recipient's vocabulary its ratios say too little
EARLY = 6  # tokens of an answer that every row of is used
HELD_OUT = 0.2  # of the prompts, for the stop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _AtTheLastBlock:
    """Rounds of ridge regression at the last block; see `commandv.transfer.distil.rounds.descend`.

    Attributes:
        rounds: at most so many.
        places: at most so many; of an answer's later tokens a random part is used.
    """

    rounds: int = 8
    places: int = 2048

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.places < 32:
            raise InputError(f"{self}: expected 1 round and 32 places or more")


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
        first = first_tokens(lm, shown, lead)
        named = torch.where((here.columns == 0)[:, None], first[shown.changes.tokens[met]],
                            tokens[shown.changes.tokens[met]])  # fmt: skip
        wanted = _changed(head, here, _part(shown.changes, met), named)
        interventions, told = _fit(lm, head, here, wanted, rank, self.rounds)
        return interventions, {"shared_tokens": round(share, 4), "places": len(met), "held_out_divergence": told}


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
        wanted = Wanted(head.rows(here.tokens), torch.zeros(len(here.tokens)), here.tokens[:, None])
        interventions, told = _fit(lm, head, here, wanted, rank, self.rounds)
        return interventions, {"places": len(here.tokens), "held_out_divergence": told}


def _fit(
    lm: LM, head: Head, here: Places, wanted: Wanted, rank: int, rounds: int
) -> tuple[dict[int, tuple[Intervention, ...]], list[float]]:
    if not here.held_out.any() or here.held_out.all():
        raise InputError("too few demonstrations to hold some out for the stop; expected answers to 4 prompts or more")
    positions = Positions(last=1, generated=max(1, int(here.columns.max())))
    one, told = descend(head, here, wanted, rank=rank, rounds=rounds, positions=positions)
    log.info("%s: held-out divergence %s", lm.id, " -> ".join(f"{value:.3f}" for value in told))
    return {lm.n_layers - 1: (one,)}, told


def _part(changes: Changes, index: Tensor) -> Changes:
    return Changes(*(one[index] for one in changes))


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
    found, lengths = list[tuple[Tensor, Tensor]](), [one.n_prompt for one in encoded]
    stop = end_of_turn(lm)
    with torch.inference_mode(), track(f"reading in {lm.id}", total=len(encoded)) as advance:
        for members in batches(lengths, batch_size, alike=lengths if lm.recurrent else None):
            batch, n_prompt = pad_replies(lm, [encoded[i] for i in members])
            states: list[Tensor] = []
            with reading(lm, {lm.n_layers - 1: states.append}):
                run_blocks(lm, batch)
            for row, i in enumerate(members):
                ends, columns = places(encoded[i])
                last = -1 if stop is None or _cut_off(shown, i) else stop
                follows = [*encoded[i].ids[encoded[i].n_prompt :], last]
                rows = [
                    (i, i in held_out, max(0, end - len(lead)), column, follows[column])
                    for end, column in zip(ends, columns, strict=True)
                ]
                at = torch.tensor(columns) + n_prompt - 1
                found.append((states[0][row, at.to(states[0].device)].float().cpu(), torch.tensor(rows)))
            advance(len(members))
    facts = torch.cat([one for _, one in found])
    whole = Places(
        torch.cat([one for one, _ in found]), facts[:, 0], facts[:, 1].bool(), facts[:, 2], facts[:, 3], facts[:, 4]
    )
    return whole.at(_chosen(whole.columns, most, generator))


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


def _changed(head: Head, here: Places, changes: Changes, tokens: Tensor) -> Wanted:
    """Return q ∝ p exp(ratio) from E_p[W] and corrections on the tokens that the ratios name.

    With weights w = p (exp(ratio - rest) - 1) on these, E_q[W] = (E_p[W] + Σ w W) / (1 + Σ w).
    """
    parts = []
    for rows in chunks(len(tokens), len(head.weight)):
        y = head.normed(here.states[rows])
        logits = head.logits(y)
        normaliser = logits.logsumexp(1)
        named = tokens[rows]
        shared = named >= 0
        named = torch.where(shared, named, named.max(1, keepdim=True).values.clamp(min=0))
        log_p = logits.gather(1, named) - normaliser[:, None]
        mean = head.mean(logits.sub_(normaliser[:, None]).exp_())
        delta = (changes.ratio[rows].clamp(-CLIP, CLIP) - changes.rest[rows].clamp(-CLIP, CLIP)[:, None]) * shared
        weight = log_p.exp() * delta.expm1()
        total = 1 + weight.sum(1)
        vectors = head.rows(named)
        q_mean = (mean + torch.einsum("nt,ntd->nd", weight, vectors)) / total[:, None]
        q = log_p.exp() * delta.exp() * shared / total[:, None]
        cross = (y * q_mean).sum(1) - normaliser  # E_q[log p]
        entropy = -(cross + (q * delta).sum(1) - total.log())
        parts.append(Wanted(q_mean, entropy, named))
    return Wanted(*(torch.cat(many) for many in zip(*parts, strict=True)))
