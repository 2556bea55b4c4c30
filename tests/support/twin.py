"""A model's twin: the same function in another basis, so that what is carried into it has to be turned."""

from __future__ import annotations

import torch

import commandv as cv
import tiny
from commandv.models.lm import LM


def twin_of(lm: LM, *, seed: int = 7, noise: float = 0.0, id: str = "twin") -> LM:
    """A tiny llama whose residual stream is that of `lm` turned by a random rotation, with noise in its weights.

    Its norms have weights of 1, which every rotation leaves as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(lm.d_model, lm.d_model, generator=generator)).Q
    model = tiny.tiny_model("llama")
    state = {name: value.clone() for name, value in lm.model.state_dict().items()}
    for name, value in state.items():
        if value.ndim < 2:
            continue
        turned = q.T @ value if name.endswith(("o_proj.weight", "down_proj.weight")) else value @ q
        state[name] = turned + noise * turned.std() * torch.randn(turned.shape, generator=generator)
    model.load_state_dict(state)
    return cv.wrap_model(model, lm.tokenizer, id, template="plain")


def saying(lm: LM, token: int, *, strength: float = 60.0) -> cv.Adapter:
    """An adapter of a tiny llama that makes answers begin with a token."""
    row = lm.model.get_output_embeddings().weight[token].detach()
    layer = lm.n_layers - 1
    vector = cv.steering_vector(strength * row / row.norm())  # at the last prompt token
    return cv.Adapter({layer: vector}, lm.ref, "says it")
