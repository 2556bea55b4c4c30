"""What a model predicts along given texts when a layer's states are replaced, beside what it predicts by itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import commandv as cv
from commandv.errors import InputError
from commandv.evaluation import Score, mean
from commandv.mapping import Counterparts, Mapper, replaced

RESAMPLES = 2000
UNPATCHED = "unpatched"


@dataclass
class TextValues:
    """One arm on each text; the first three are means over its tokens but the last, which nothing follows.

    Attributes:
        kl: KL(unpatched || patched) of the next-token distribution, nats per token.
        nats: negative log-probability of the text's next token.
        agreement: share of tokens after which both find the same next token the most likely.
        cosine: mean cosine of the replaced states, new against own, both minus the own states' mean over all texts.
        unexplained: sums over a text's replaced states of (new - own)², per dimension, [d_model].
    """

    kl: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    unexplained: list[Tensor] = field(default_factory=list)


def read_texts(lm: cv.LM, texts: Sequence[Counterparts], arms: Mapping[str, Mapper]) -> dict[str, TextValues]:
    """Let a model read texts with its states replaced at every token that has a counterpart.

    Args:
        lm: the recipient.
        texts: read up to their last token of text.
        arms: what makes the new states.

    Returns:
        Arm -> its values; the first arm, `UNPATCHED`, is the model by itself.

    Raises:
        InputError: a text of one token, after which nothing can be predicted.
    """
    short = next((number for number, one in enumerate(texts, start=1) if len(one.ids) - one.places.start < 2), None)
    if short is not None:
        raise InputError(f"text {short} is one token of {lm.id}; expected at least 2, leave it out")
    many: dict[str, Mapper | None] = {UNPATCHED: None, **arms}
    centre = torch.cat([one.own for one in texts]).double().mean(0)
    found: dict[str, dict[int, tuple[float, ...]]] = {name: {} for name in many}
    out = {name: TextValues() for name in many}
    for item, one in enumerate(texts):
        plain = _logits(lm, one)
        for name, mapper in many.items():
            with replaced(lm, [one], mapper) if mapper else contextlib.nullcontext():
                found[name][item] = _predicted(one, plain, _logits(lm, one) if mapper else plain)
    for name, values in out.items():
        for item, one in enumerate(texts):
            kl, nats, agreement = found[name][item]
            mapper, own = many[name], one.own.double()
            new = own if mapper is None else one.mapped(mapper).double()
            cosine = torch.nn.functional.cosine_similarity(new - centre, own - centre).mean()
            values.kl.append(kl)
            values.nats.append(nats)
            values.agreement.append(agreement)
            values.cosine.append(float(cosine))
            values.unexplained.append((new - own).square().sum(0))
    return out


@torch.inference_mode()
def _logits(lm: cv.LM, one: Counterparts) -> Tensor:
    """Return the logits [tokens of the text, vocabulary]."""
    ids = torch.tensor([one.ids], device=lm.device)
    logits = lm.model(input_ids=ids, use_cache=False).logits[0, one.places.start :]
    if not torch.isfinite(logits).all():
        raise InputError(f"{lm.id}: logits that are no numbers; load it in bfloat16 or float32")
    return logits


def _predicted(one: Counterparts, plain: Tensor, changed: Tensor) -> tuple[float, float, float]:
    """Return (KL, nats, agreement) of one text."""
    log_p, log_q = (logits[:-1].float().log_softmax(-1) for logits in (plain, changed))
    following = torch.tensor(one.ids[one.places.start + 1 :], device=log_q.device)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    nats = -log_q.gather(1, following[:, None]).mean()
    return float(kl), float(nats), float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean())


def score_texts(values: TextValues, texts: Sequence[Counterparts]) -> dict[str, Score]:
    """Return the figures of one arm, with 95 % intervals over texts (Student's t; FVU: bootstrap).

    The fraction of variance unexplained (FVU) of a dimension is sum (new - own)² / sum (own - mean)² over all replaced
    states; its mean and its median over dimensions are given.
    """
    fvu, nats = _unexplained(values.unexplained, texts), mean("perplexity", values.nats, "perplexity")
    with np.errstate(over="ignore"):
        value, low, high = np.exp([nats.value, nats.low, nats.high]).tolist()
    perplexity = nats._replace(value=value, low=low, high=high)
    return {
        "kl": mean("KL", values.kl, "nats per token"),
        "perplexity": perplexity,
        "agreement": mean("top-1 agreement", values.agreement, "share"),
        "cosine": mean("cosine", values.cosine, "cosine"),
        "fvu_mean": fvu[0],
        "fvu_median": fvu[1],
    }


def _unexplained(errors: Sequence[Tensor], texts: Sequence[Counterparts]) -> tuple[Score, Score]:
    """Return FVU, mean and median over the dimensions that vary, with a bootstrap over texts."""
    # Around one mean for all resamples: around each one's own, fewer different texts would vary less.
    centre = torch.cat([one.own for one in texts]).double().mean(0)
    squares = torch.stack([(one.own.double() - centre).square().sum(0) for one in texts]).numpy()
    n = len(texts)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    weights = np.vstack([np.ones(n), drawn])  # the first line is the estimate itself
    variance = weights @ squares
    keep = variance[0] > 1e-12 * variance[0].max()
    with np.errstate(divide="ignore", invalid="ignore"):
        fvu = (weights @ torch.stack(list(errors)).numpy())[:, keep] / variance[:, keep]

    def score(name: str, per_draw: np.ndarray) -> Score:
        low, high = np.nanquantile(per_draw[1:], [0.025, 0.975]) if n > 1 else (math.nan, math.nan)
        return Score(name, float(per_draw[0]), float(low), float(high), n, "fraction of variance")

    return score("FVU, mean", fvu.mean(1)), score("FVU, median", np.median(fvu, axis=1))
