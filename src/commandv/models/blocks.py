"""Finding the decoder blocks of a model, and what sort of model they make."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

from commandv.errors import ModelError
from commandv.models.lm import device_of
from commandv.models.passes import stream_of
from commandv.models.running import evaluating
from commandv.storage.reading import first_line

# Of layers without a cache of their own, from transformers 5.23 on; before, they were DynamicLayers that stay empty.
_KEEPS_NOTHING = getattr(cache_utils, "DummyLayer", DynamicLayer)


class Found(NamedTuple):
    """Decoder blocks."""

    owner: nn.Module  # the module that runs them
    blocks: tuple[nn.Module, ...]  # in order; the output of block l is the residual stream at layer l
    d_model: int  # width of the stream
    stream: int  # which of several streams that a block puts out it works on (Gemma 3n has four)
    # the model keeps more from token to token than keys and values, so that padding before a text, which a mask hides
    # from attention, may change it
    recurrent: bool


def find_blocks(model: Any) -> Found:
    """Find the decoder blocks by structure: the shallowest module list that a text-only pass runs layer by layer.

    Candidates have as many entries as the text configuration has layers. A vision tower or a list of experts of the
    same length is told apart by running two tokens: every block must run once and put out [batch, 2, d_model]. Blocks
    that a text does not go through (cross-attention to an image) are left out.
    """
    config = model.config.get_text_config(decoder=True)
    n_layers = config.num_hidden_layers
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    stream = getattr(config, "altup_active_idx", 0)
    calls: dict[nn.Module, list[Tensor]] = {}

    def record(module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.ndim >= 3:
            calls.setdefault(module, []).append(stream_of(output, stream))

    handles = [block.register_forward_hook(record) for _, blocks in candidates for block in blocks]
    try:
        with torch.inference_mode(), evaluating(model):
            # The rows differ in their second token only, which the first one must not see.
            output = model(input_ids=torch.tensor([[0, 1], [0, 2]], device=device_of(model)), use_cache=True)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: cannot run two tokens: {first_line(error)}; its configuration and its weights do "
            "not fit together, or it needs more than input_ids"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for name, blocks in sorted(candidates, key=lambda item: item[0].count(".")):
        run = tuple(block for block in blocks if block in calls)
        shapes = {tuple(state.shape) for block in run for state in calls[block]}
        once = 2 * len(run) >= n_layers and all(len(calls[block]) == 1 for block in run)
        if once and len(shapes) == 1 and len(shape := shapes.pop()) == 3 and shape[:2] == (2, 2):
            # A dtype may overflow in late blocks (Gemma in float16): the deepest states that are numbers tell.
            states = (calls[block][0].float() for block in reversed(run))
            deepest = next((state for state in states if torch.isfinite(state).all()), None)
            if deepest is None:
                raise ModelError(
                    f"{type(model).__name__}: NaN or infinity in the output of its first block; the weights are "
                    "broken, or the dtype overflows: load the model with dtype='float32' or 'bfloat16'"
                )
            if not torch.allclose(deepest[0, 0], deepest[1, 0], rtol=1e-2, atol=1e-3 * float(deepest.abs().max())):
                raise ModelError(
                    f"{type(model).__name__}: a token's state changes with the tokens after it; commandv needs a "
                    "causal language model, not an encoder"
                )
            owner = model.get_submodule(name.rpartition(".")[0])
            return Found(owner, run, shape[-1], stream, not _attends_only(getattr(output, "past_key_values", None)))
    raise ModelError(
        f"{type(model).__name__}: found no list of {n_layers} decoder blocks that each run once and put out "
        f"[batch, sequence, d_model]; looked at {[name for name, _ in candidates] or 'no module list of that length'}"
    )


def _attends_only(cache: Any) -> bool:
    return isinstance(cache, Cache) and all(
        isinstance(layer, DynamicLayer | _KEEPS_NOTHING) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in cache.layers
    )
