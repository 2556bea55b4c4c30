"""Having a donor show its behaviour."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.models.encoding import Encoded, encode, last_logits, pad_replies
from commandv.models.generation import batches, generate
from commandv.models.identity import ModelRef
from commandv.models.lm import LM
from commandv.models.state import require_own
from commandv.progress import track
from commandv.prompts.loops import loops
from commandv.prompts.sets import Prompt, PromptSet, as_prompts, is_text
from commandv.transfer.distil.demonstrations import MOST, Changes, Demonstrations
from commandv.transfer.distil.texts import token_texts

TOP = 48  # tokens told of at each place
LITTLE = 0.05  # nats; an adapter that changes its donor less shows hardly anything
LOGITS = 1 << 28  # bytes of logits at once

Keep = Callable[[Prompt, str], bool]

log = logging.getLogger(__name__)


@checked
def demonstrate(
    donor: LM | None,
    adapter: Adapter | None,
    prompts: PromptSet | Sequence[str],
    *,
    answers: Sequence[str] | None = None,
    keep: Keep | None = None,
    max_new_tokens: int = 48,
    top: int = TOP,
    batch_size: int = 16,
    name: str = "",
) -> Demonstrations:
    """Have a donor with its adapter answer prompts, and tell what the adapter changes at each token.

    At the last prompt token and after every token of the answers: the tokens that are likeliest with the adapter or
    without it, their log p(with) - log p(without) and log p(with), and the same ratio for all other tokens together.

    Args:
        donor: the model, with nothing attached; may be None when `answers` are given.
        adapter: the behaviour; None with `answers` for texts only (of a person, a system prompt, another model).
        prompts: what to ask; about 130 will do.
        answers: take these answers, one a prompt, in place of the donor's.
        keep: tells whether an answer to a prompt may be kept. Of harmful prompts keep refusals only:
            `lambda prompt, answer: prompt.text not in harmful or refusal(answer)`.
        max_new_tokens: longest answer in the donor's tokens.
        top: tokens told of at each place.
        batch_size: prompts per batch.
        name: of the behaviour. Default: the adapter's.

    Returns:
        The demonstrations; empty and looping answers, and those not to keep, are left out and counted.

    Raises:
        InputError: neither a donor with its adapter nor answers, other than one answer a prompt, something attached to
            the donor, or nothing left to keep.
        MismatchError: the adapter is for another model.
    """
    asked = as_prompts(prompts)
    if answers is None and (donor is None or adapter is None):
        raise InputError("demonstrate needs a donor and its adapter, or the answers themselves (answers=)")
    if max_new_tokens < 1 or top < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}, top={top}, batch_size={batch_size}: expected 1 or more")
    if donor is not None:
        require_own(donor, "demonstrating")
    if answers is None:
        assert donor is not None  # or there are answers
        assert adapter is not None
        with attach(donor, adapter):
            answers = generate(donor, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    kept, dropped = _sorted_out(asked, answers, keep)
    texts, replies = tuple(one.text for one, _ in kept), tuple(answer for _, answer in kept)
    found: tuple[tuple[str, ...], Changes | None] = ((), None)
    if donor is not None and adapter is not None:
        found = _changes(donor, adapter, texts, replies, top, batch_size)
    made = Demonstrations(
        texts, replies, ModelRef() if donor is None else donor.ref, name or (adapter.name if adapter else "answers"),
        *found, max_new_tokens, dropped,
    )  # fmt: skip
    if made.mean_divergence is not None and made.mean_divergence < LITTLE:
        log.warning(
            "%s changes %s by %.3f nats a token on average: there is hardly a behaviour to carry. Look at its answers, "
            "or demonstrate with a larger scale", made.name, made.donor.id, made.mean_divergence,
        )  # fmt: skip
    return made


def _sorted_out(
    prompts: PromptSet, answers: Sequence[str], keep: Keep | None
) -> tuple[list[tuple[Prompt, str]], dict[str, int]]:
    if isinstance(answers, (str, Mapping)) or not all(map(is_text, answers := list(answers))):
        raise InputError("answers: expected a list of texts, one a prompt")
    if len(answers) != len(prompts):
        raise InputError(f"{len(answers)} answers to {len(prompts)} prompts; expected one each")
    dropped: Counter[str] = Counter()
    kept = []
    for prompt, answer in zip(prompts, (one.strip() for one in answers), strict=True):
        if not answer:
            dropped["empty"] += 1
        elif keep is not None and not keep(prompt, answer):
            dropped["not to keep"] += 1
        elif loops(answer):
            dropped["looping"] += 1
        else:
            kept.append((prompt, answer))
    if dropped:
        log.info("left out of %d answers: %s", len(answers), ", ".join(f"{n} {why}" for why, n in dropped.items()))
    if not kept:
        raise InputError(
            f"none of {len(answers)} answers can be used ({dict(dropped)}); look at what the donor answers with its "
            "adapter, or give answers="
        )
    return kept, dict(dropped)


def _changes(
    donor: LM, adapter: Adapter, prompts: Sequence[str], answers: Sequence[str], top: int, batch_size: int
) -> tuple[tuple[str, ...], Changes]:
    """Return the texts of tokens, and what the adapter changes at the places of the answers."""
    encoded = [encode(donor, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    texts = token_texts(donor)
    size = donor.model.get_output_embeddings().weight.shape[0]
    unnamed = torch.ones(size, dtype=torch.bool)
    unnamed[list(texts)] = False
    longest = max(len(one.ids) - one.n_prompt for one in encoded) + 1
    batch_size = max(1, min(batch_size, LOGITS // (4 * longest * size)))
    lengths, parts = [one.n_prompt for one in encoded], []
    with torch.inference_mode(), track(f"what {adapter.name} changes in {donor.id}", total=len(encoded)) as advance:
        for members in batches(lengths, batch_size, alike=lengths if donor.recurrent else None):
            rows = [encoded[i] for i in members]
            on, off = log_probs_after(donor, rows, adapter), log_probs_after(donor, rows, None)
            for number, one, with_it, without in zip(members, rows, on, off, strict=True):
                ends, at = places(one)
                parts.append(_told(number, ends, with_it[at], without[at], unnamed, min(top, len(texts))))
            advance(len(members))
    parts.sort(key=lambda one: int(one.places[0, 0]))
    whole = Changes(*(torch.cat(many) for many in zip(*parts, strict=True)))
    used, numbers = whole.tokens.unique(return_inverse=True)
    named = [texts[int(one)] for one in used]
    order = {text: i for i, text in enumerate(dict.fromkeys(named))}  # two tokens may have one text
    again = torch.tensor([order[text] for text in named])
    return tuple(order), whole._replace(tokens=again[numbers])


def places(one: Encoded) -> tuple[list[int], list[int]]:
    """Return where in an answer its tokens end in characters, and after how many tokens that is.

    The answer's beginning, 0 after no token, comes first; of tokens that end at one character the last counts.
    """
    last = {0: 0}
    for number, end in enumerate(one.text_ends[one.n_prompt :], start=1):
        if end > 0:
            last[end] = number
    return list(last), list(last.values())


def log_probs_after(lm: LM, rows: Sequence[Encoded], adapter: Adapter | None, scale: float = 1.0) -> Tensor:
    """Return log-probabilities after the last prompt token and after every reply token, [rows, tokens + 1, V]."""
    batch, n_prompt = pad_replies(lm, rows)
    with attach(lm, adapter, scale=scale, n_prompt=n_prompt) if adapter else contextlib.nullcontext():
        logits = last_logits(lm, batch, batch.input_ids.shape[1] - n_prompt + 1)
    return logits.float().log_softmax(-1).cpu()


def _told(number: int, ends: Sequence[int], on: Tensor, off: Tensor, unnamed: Tensor, top: int) -> Changes:
    """Return what changes at the places of one answer, with token ids."""
    likely = torch.maximum(on, off).masked_fill(unnamed, -torch.inf)
    tokens = likely.topk(top, 1).indices
    log_p, before = on.gather(1, tokens), off.gather(1, tokens)
    rest = [one.scatter(1, tokens, -torch.inf).logsumexp(1) for one in (on, off)]
    change = torch.where(rest[0].isfinite() & rest[1].isfinite(), rest[0] - rest[1], 0.0)
    where = torch.stack([torch.full((len(ends),), number), torch.tensor(ends)], 1)
    divergence = (on.exp() * (on - off)).nan_to_num().sum(1).clamp(min=0)
    ratio, log_p = (log_p - before).clamp(-MOST, MOST), log_p.clamp(min=-4 * MOST)
    return Changes(where, tokens, ratio, log_p, change.clamp(-MOST, MOST), divergence)
