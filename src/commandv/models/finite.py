"""Stopping where a model's numbers overflow: an answer made of NaN is no answer, and no rate over such is one."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from commandv.errors import ModelError
from commandv.models.encoding import pad, run_blocks
from commandv.models.live import prompts_of, reading
from commandv.models.lm import LM


def require_finite(lm: LM, logits: Tensor, number: int, ids: Sequence[int]) -> None:
    """Raise `ModelError` where logits [..., vocabulary] of one sequence are NaN, infinite or all minus infinity.

    A single token may well be ruled out by minus infinity. One reduction, small beside the product with the head. The
    message says the prompt's number, from 1, and the layer, for which the sequence is run again.
    """
    if not torch.isfinite(logits.amax(-1)).all():
        raise ModelError(
            f"{lm.id}: NaN or infinity in the output of {_first_layer(lm, ids)} for prompt {number}. The weights are "
            "broken, an adapter is too strong, or the dtype overflows: load the model with dtype='float32' or "
            "'bfloat16', or attach with a smaller scale"
        )


class Finite:
    """A logits processor of transformers that raises `ModelError` at the first step that is not finite."""

    def __init__(self, lm: LM, numbers: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        self.lm, self.numbers, self.rows = lm, numbers, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are."""
        finite = torch.isfinite(scores.amax(-1))
        if not finite.all():
            row = int((~finite).nonzero()[0])
            require_finite(self.lm, scores[row], self.numbers[row], self.rows[row])
        return scores


@torch.inference_mode()
def _first_layer(lm: LM, ids: Sequence[int]) -> str:
    """Return the first layer whose output is not finite when a sequence is run."""
    broken: list[int] = []

    def check(layer: int, h: Tensor) -> None:
        if not torch.isfinite(h).all():
            broken.append(layer)

    readers = {layer: functools.partial(check, layer) for layer in range(lm.n_layers)}
    with reading(lm, readers), prompts_of(lm, len(ids)):
        run_blocks(lm, pad(lm, [list(ids)]))
    return f"layer {min(broken)}" if broken else "the head"
