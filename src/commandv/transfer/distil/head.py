"""The way from the last block's stream to logits, and back: final norm and unembedding, differentiated by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from commandv.errors import InputError
from commandv.models.encoding import encode, last_logits, pad
from commandv.models.live import reading
from commandv.models.lm import LM

NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")  # what architectures call it
CLOSE = 0.02  # of the logits' size: more is another function


@dataclass(frozen=True, eq=False)
class Head:
    """logits = norm(h) Wᵀ, norm(h) = g ⊙ (h - m) / r + b; m is the mean of h (LayerNorm) or 0, r its quadratic mean."""

    norm: nn.Module  # the model's own
    weight: Tensor  # W, [V, d_model], in the model's precision
    gain: Tensor  # g, [d_model]
    centred: bool  # whether the mean is taken off

    @classmethod
    def of(cls, lm: LM) -> Head:
        """Find a model's head.

        Raises:
            InputError: its logits are another function of the stream (soft-capped, scaled, with a bias).
        """
        norm = next((one for name in NORMS if (one := getattr(lm.owner, name, None)) is not None), None)
        out = lm.model.get_output_embeddings()
        if norm is None or out is None or getattr(out, "bias", None) is not None:
            raise _unlike(lm)
        centred = isinstance(norm, nn.LayerNorm)
        first = next(norm.parameters(), out.weight)
        ones = torch.ones(1, lm.d_model, device=first.device, dtype=first.dtype)
        gain = norm.weight if centred else norm(ones)[0]
        made = cls(norm, out.weight.detach(), gain.detach().float().cpu(), centred)
        made._require_same(lm)
        return made

    def _require_same(self, lm: LM) -> None:
        states: list[Tensor] = []
        ids = encode(lm, "What is a river?").ids
        with torch.no_grad(), reading(lm, {lm.n_layers - 1: lambda h: states.append(h[:, -1].float().cpu())}):
            wanted = last_logits(lm, pad(lm, [ids]), 1)[:, 0].float().cpu()
            h = states[0]
            whole = self.gain * self._parts(h)[0]
        if self.centred:
            whole = whole + self.norm.bias.float().cpu()  # type: ignore[operator]
        for found in (self.logits(self.normed(h)), self.logits(whole)):
            if found.shape != wanted.shape or float((found - wanted).norm() / wanted.norm()) > CLOSE:
                raise _unlike(lm)

    def normed(self, h: Tensor) -> Tensor:
        """Return norm(h), float32 [n, d_model]."""
        return self.norm(h.to(self.weight.device, self.weight.dtype)).float().cpu()

    def logits(self, y: Tensor) -> Tensor:
        """Return y Wᵀ, float32 [n, V]."""
        return (y.to(self.weight.device, self.weight.dtype) @ self.weight.T).float().cpu()

    def mean(self, p: Tensor) -> Tensor:
        """Return E_p[W] for probabilities [n, V], float32 [n, d_model]."""
        return (p.to(self.weight.device, self.weight.dtype) @ self.weight).float().cpu()

    def rows(self, tokens: Tensor) -> Tensor:
        """Return rows of W by token, float32 [..., d_model]."""
        return self.weight[tokens.to(self.weight.device)].float().cpu()

    def backward(self, h: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient at h for one at norm(h), both [..., d_model]."""
        x, r = self._parts(h)
        return self._tangent(x, self.gain * gradient) / r

    def _parts(self, h: Tensor) -> tuple[Tensor, Tensor]:
        shifted = h - h.mean(-1, keepdim=True) if self.centred else h
        r = shifted.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        return shifted / r, r

    def _tangent(self, x: Tensor, step: Tensor) -> Tensor:
        taken = step - step.mean(-1, keepdim=True) if self.centred else step
        return taken - x * (x * taken).mean(-1, keepdim=True)


def _unlike(lm: LM) -> InputError:
    return InputError(
        f"{lm.id}: its logits are not a norm and an unembedding of the last block's stream alone (they are soft-capped "
        "or scaled, or have a bias), which by='vocabulary' and 'answers' need; use by='context'"
    )
