"""What an adapter costs: drift from the unmodified model."""

from __future__ import annotations

from typing import Any

import torch

from commandv.adapter import Adapter
from commandv.attaching import attach
from commandv.evaluate.scores import Score, mean
from commandv.generation import batches
from commandv.models import LM, accepts, encode, pad
from commandv.prompts import PromptSet

REPLY_TOKENS = 32  # of each passage on which drift is measured


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
    plain = reply_log_probs(lm, passages, tokens=tokens, batch_size=batch_size) if reference is None else reference
    changed = reply_log_probs(lm, passages, adapter, scale=scale, tokens=tokens, batch_size=batch_size)
    per_passage = [
        float((a.float().exp() * (a.float() - b.float())).sum(-1).mean()) for a, b in zip(plain, changed, strict=True)
    ]
    return mean(name, per_passage, "nats per token")


def reply_log_probs(
    lm: LM,
    passages: PromptSet,
    adapter: Adapter | None = None,
    *,
    scale: float = 1.0,
    tokens: int = REPLY_TOKENS,
    batch_size: int = 8,
) -> list[torch.Tensor]:
    """Return the log-probabilities [tokens, vocabulary] of each reply's first `tokens`, float16, in order."""
    encoded = [encode(lm, one.text, one.response) for one in passages]
    encoded = [one._replace(ids=one.ids[: one.n_prompt + tokens]) for one in encoded]
    out: list[torch.Tensor | None] = [None] * len(encoded)
    for members in batches([len(one.ids) for one in encoded], batch_size):
        prompts = pad(lm, [encoded[i].ids[: encoded[i].n_prompt] for i in members], "left")
        replies = pad(lm, [encoded[i].ids[encoded[i].n_prompt :] for i in members], "right")
        ids = torch.cat([prompts.input_ids, replies.input_ids], 1)
        mask = torch.cat([prompts.attention_mask, replies.attention_mask], 1)
        n_prompt, n_reply = prompts.input_ids.shape[1], replies.input_ids.shape[1]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if accepts(lm.model, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if accepts(lm.model, "logits_to_keep"):
            inputs["logits_to_keep"] = n_reply + 1
        with torch.inference_mode():
            if adapter is None:
                logits = lm.model(**inputs).logits
            else:
                with attach(lm, adapter, scale=scale, n_prompt=n_prompt):
                    logits = lm.model(**inputs).logits
            logits = logits[:, -n_reply - 1 : -1]
        for row, item in enumerate(members):
            length = int(replies.attention_mask[row].sum())
            out[item] = logits[row, :length].float().log_softmax(-1).half().cpu()
    return [one for one in out if one is not None]
