"""What an adapter costs: drift from the unmodified model, and perplexity."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from commandv.adapters.adapter import Adapter
from commandv.adapters.attach import attach
from commandv.arguments import checked
from commandv.errors import InputError
from commandv.evaluation.scores import Score, geometric_mean, mean
from commandv.models.encoding import Encoded, Turns, encode, last_logits, opening, pad_replies
from commandv.models.finite import require_finite
from commandv.models.generation import batches
from commandv.models.lm import LM
from commandv.models.prefix import shared_prefix
from commandv.prompts.sets import PromptSet, as_prompts

REPLY_TOKENS = 16  # of each passage on which drift is measured
CONTEXT_TOKENS = 16  # of each passage that are read before perplexity counts
MEASURES = ("kl", "kl_first", "kl_after", "perplexity_first", "perplexity_after")


@checked
def drift(
    lm: LM,
    passages: PromptSet,
    adapter: Adapter,
    *,
    name: str = "",
    scale: float = 1.0,
    tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
    reference: list[torch.Tensor] | None = None,
) -> Score:
    """Measure what an adapter costs: KL(unmodified || adapted) of the next-token distribution, nats per token.

    The passages are read as replies to their prompts, in the model's own format; the mean is over the first
    `tokens` tokens of each, the interval (Student's t, 95 %) over passages.

    Args:
        lm: the model, with nothing attached.
        passages: prompts with replies that neither the adapter nor a profile has seen.
        adapter: what to measure.
        name: of the score.
        scale: as in `attach`.
        tokens: of each reply that count.
        batch_size: passages per forward pass.
        reference: result of `reply_log_probs` of as many tokens without the adapter, to spare computing it again.
    """
    values = drift_values(lm, passages, adapter, scale=scale, tokens=tokens, batch_size=batch_size, reference=reference)
    return mean(name, values, "nats per token")


@checked
def drift_values(
    lm: LM,
    passages: PromptSet,
    adapter: Adapter,
    *,
    scale: float = 1.0,
    tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
    reference: list[torch.Tensor] | None = None,
) -> list[float]:
    """Return `drift` passage by passage, in nats per token, for paired tests; arguments as there."""
    plain = reply_log_probs(lm, passages, tokens=tokens, batch_size=batch_size) if reference is None else reference
    changed = reply_log_probs(lm, passages, adapter, scale=scale, tokens=tokens, batch_size=batch_size)
    return [float(one.mean()) for one in _by_token(plain, changed)]


@checked
def prices(
    lm: LM,
    passages: PromptSet,
    plain: Sequence[torch.Tensor],
    changed: Sequence[torch.Tensor] | None = None,
) -> dict[str, list[float]]:
    """Return what a change costs, passage by passage, at the first token of the replies and after it apart.

    The first token is where a pasted adapter acts hardest: a mean over all hides it.

    Args:
        lm: the model.
        passages: prompts with replies.
        plain: `reply_log_probs` of the model as it is.
        changed: the same of the model as changed; None for the model as it is.

    Returns:
        Measure of `MEASURES` -> figures in nats per token: `kl` over all tokens (what budgets are kept in),
        `kl_first`, `kl_after`; `perplexity_first` and `perplexity_after` as logarithms, since they are averaged so.
        No `kl` for the model as it is; no figure after the first of a reply of one token (NaN).
    """
    found: dict[str, list[float]] = {}
    if changed is not None:
        kl = _by_token(plain, changed)
        found["kl"] = [float(one.mean()) for one in kl]
        found |= {f"kl_{place}": values for place, values in _apart(kl).items()}
    nats = []
    for one, rows in zip(passages, plain if changed is None else changed, strict=True):
        encoded = encode(lm, one.text, one.response)
        wanted = torch.tensor(encoded.ids[encoded.n_prompt :][: len(rows)])
        nats.append(-rows.float().gather(1, wanted[:, None])[:, 0])
    return found | {f"perplexity_{place}": values for place, values in _apart(nats).items()}


def _by_token(plain: Sequence[torch.Tensor], changed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return KL(plain || changed) of each passage, token by token.

    Raises:
        InputError: distributions of other passages, or of fewer tokens of them.
    """
    shapes = [[tuple(one.shape) for one in many] for many in (plain, changed)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"distributions of {len(plain)} and {len(changed)} passages, or of other numbers of tokens: expected those "
            "of the same passages on both sides, see reply_log_probs"
        )
    return [(a.float().exp() * (a.float() - b.float())).sum(-1) for a, b in zip(plain, changed, strict=True)]


def _apart(by_token: Sequence[torch.Tensor]) -> dict[str, list[float]]:
    return {
        "first": [float(one[0]) for one in by_token],
        "after": [float(one[1:].mean()) for one in by_token],  # NaN where there is none
    }


@checked
def perplexity(
    lm: LM,
    passages: PromptSet | Sequence[str],
    adapter: Adapter | None = None,
    *,
    name: str = "",
    scale: float = 1.0,
    context: int = CONTEXT_TOKENS,
    tokens: int = 128,
    batch_size: int = 4,
) -> Score:
    """Measure the perplexity of plain text: exp of the mean over passages of their nats per token.

    So every passage weighs the same, and the value is the geometric mean of the passages' perplexities; the interval
    is exp of that of the mean (Student's t over passages, 95 %). Perplexities of models with different tokenizers
    do not compare.

    Args:
        lm: the model, with nothing attached.
        passages: texts; of a passage with a reply the reply is the text.
        adapter: to attach meanwhile. It sees the BOS token and the first `context` tokens as the prompt, so one that
            acts at the last prompt token acts there, and all that counts comes after it.
        name: of the score.
        scale: as in `attach`.
        context: tokens of each passage that are read but do not count.
        tokens: of each passage that count after those, at most.
        batch_size: passages per forward pass.

    Raises:
        InputError: a passage with no token after the context.
    """
    values = perplexity_values(
        lm, passages, adapter, scale=scale, context=context, tokens=tokens, batch_size=batch_size
    )
    return geometric_mean(name, values, "perplexity")


@checked
def perplexity_values(
    lm: LM,
    passages: PromptSet | Sequence[str],
    adapter: Adapter | None = None,
    *,
    scale: float = 1.0,
    context: int = CONTEXT_TOKENS,
    tokens: int = 128,
    batch_size: int = 4,
) -> list[float]:
    """Return the nats per token of each passage, for paired tests; arguments as in `perplexity`."""
    rows = [_plain(lm, one.response or one.text, context, tokens) for one in as_prompts(passages)]
    out = [math.nan] * len(rows)
    for item, log_probs in token_log_probs(lm, rows, adapter, scale=scale, batch_size=batch_size):
        out[item] = -float(log_probs.mean())
    return out


def _plain(lm: LM, text: str, context: int, tokens: int) -> Encoded:
    """Return a text's tokens after the BOS that the model expects, the first of them as its prompt."""
    if context < 0 or tokens < 1:
        raise InputError(f"context={context}, tokens={tokens}: expected 0 or more, and 1 or more")
    start = opening(lm)
    ids = start + list(lm.tokenizer(text, add_special_tokens=False).input_ids)
    n_prompt = max(1, len(start) + context)  # without BOS the first token has nothing to be predicted from
    if len(ids) <= n_prompt:
        raise InputError(
            f"a passage of {len(ids)} tokens ({text[:40]!r} ...): nothing is left to count after {n_prompt} tokens of "
            "context; leave it out, or lower context="
        )
    kept = ids[: min(n_prompt + tokens, lm.context_length or len(ids))]
    return Encoded(kept, n_prompt, [-1] * len(kept))


@checked
def reply_log_probs(
    lm: LM,
    passages: PromptSet,
    adapter: Adapter | None = None,
    *,
    scale: float = 1.0,
    tokens: int = REPLY_TOKENS,
    turns: Turns = (),
    batch_size: int = 8,
) -> list[torch.Tensor]:
    """Return the log-probabilities [tokens, vocabulary] of each reply's first `tokens`, float16, in order.

    `turns` are earlier turns of the conversation in which the passages are read; the rest as in `drift`.
    """
    encoded = [encode(lm, one.text, one.response, turns=turns) for one in passages]
    encoded = [one._replace(ids=one.ids[: one.n_prompt + tokens]) for one in encoded]
    out: list[torch.Tensor | None] = [None] * len(encoded)
    for item, logits in _reply_logits(lm, encoded, adapter, scale, batch_size):
        out[item] = logits.float().log_softmax(-1).half().cpu()
    return [one for one in out if one is not None]


def token_log_probs(
    lm: LM, rows: Sequence[Encoded], adapter: Adapter | None = None, *, scale: float = 1.0, batch_size: int = 8
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index of the row, log-probabilities [tokens] of the tokens after its prompt), in no set order.

    At least one token of each row comes after its `n_prompt`; an adapter takes these for generated ones.
    """
    for item, logits in _reply_logits(lm, rows, adapter, scale, batch_size):
        wanted = torch.tensor(rows[item].ids[rows[item].n_prompt :], device=logits.device)
        yield item, logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0].double().cpu()


def _reply_logits(
    lm: LM, rows: Sequence[Encoded], adapter: Adapter | None, scale: float, batch_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index of the row, logits [tokens, vocabulary] that predict each token after its prompt)."""
    positions = adapter.positions if adapter else set()
    prefix = shared_prefix(lm, [one.ids for one in rows], [one.n_prompt for one in rows], positions=positions)
    alike = [one.n_prompt for one in rows] if lm.recurrent else None  # prompts are padded at their left
    for members in batches([len(one.ids) for one in rows], batch_size, alike=alike):
        batch, n_prompt = pad_replies(lm, [rows[i] for i in members], shared=prefix.length)
        n_reply = batch.input_ids.shape[1] - n_prompt
        changed = attach(lm, adapter, scale=scale, n_prompt=n_prompt) if adapter else contextlib.nullcontext()
        with torch.inference_mode(), changed:
            logits = last_logits(lm, prefix.rest(batch), n_reply + 1, prefix.past(len(members)))[:, :-1]
            for row, item in enumerate(members):
                own = logits[row, : len(rows[item].ids) - rows[item].n_prompt]
                require_finite(lm, own, item + 1, rows[item].ids)
        for row, item in enumerate(members):
            yield item, logits[row, : len(rows[item].ids) - rows[item].n_prompt]
