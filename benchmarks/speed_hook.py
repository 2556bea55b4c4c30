"""The part of `speed.py` that runs a model: what attached adapters cost during a pass, hook by hook.

One thread, and the CPU seconds of that thread, which other work on the machine does not add to.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import tokenizers
import torch
import transformers

import commandv as cv
from commandv.models import live, passes

TOKENS, DONOR, RANK = 128, 4096, 8
LAYERS = 16  # edited layers that share what is done once per pass
SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "max_position_embeddings": 512,
}
OWNER = ("_enter", "_begin", "_finish")


def block_of_3b(dtype: torch.dtype) -> cv.LM:
    """A Llama of one block of Llama-3.2-3B's shape, with random weights."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(dtype).eval()
    return cv.wrap_model(model, tokenizer, "one block of 3B")


@contextlib.contextmanager
def removing(handle: Any) -> Iterator[Any]:
    try:
        yield handle
    finally:
        handle.remove()


class Clock:
    """Microseconds spent in named functions."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = {}
        self.began = 0.0

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.taken.setdefault(name, []).append((time.thread_time() - start) * 1e6)

        return timed

    def median(self, name: str) -> float:
        return statistics.median(self.taken[name])

    def stamp(self, ends: str | None = None) -> Callable[..., None]:
        """Return a hook that ends the span of that name, if any, and begins the next.

        A wrapper around the edit would hold the block's output, and whoever holds it makes the edit copy it.
        """

        def hook(*_: Any) -> None:
            now = time.thread_time()
            if ends is not None:
                self.taken.setdefault(ends, []).append((now - self.began) * 1e6)
            self.began = time.thread_time()

        return hook


@contextlib.contextmanager
def attached(lm: cv.LM, clock: Clock) -> Iterator[None]:
    """Attach a random adapter with a clock on the block, its hook and the owner's hooks."""
    generator = torch.Generator().manual_seed(0)
    d = lm.d_model
    read, bias, write = (torch.randn(*shape, generator=generator) for shape in ((RANK, d), (RANK,), (RANK, d)))
    adapter = cv.Adapter({0: (cv.Intervention(read / d**0.5, bias, write),)}, lm.ref, "random")
    with contextlib.ExitStack() as stack:
        for name in OWNER:
            timed = clock.around(name, getattr(live.Live, name))
            stack.enter_context(mock.patch.object(live.Live, name, timed))
        stack.enter_context(removing(lm.blocks[0].register_forward_pre_hook(clock.stamp())))
        ends = stack.enter_context(removing(lm.blocks[0].register_forward_hook(clock.stamp("block"))))
        stack.enter_context(removing(lm.owner.norm.register_forward_pre_hook(clock.stamp("hook"))))
        stack.enter_context(cv.attach(lm, adapter))

        def first(*_: Any) -> None:  # edits are put before other hooks, and the block ends before them
            lm.blocks[0]._forward_hooks.move_to_end(ends.id, last=False)

        stack.enter_context(removing(lm.owner.register_forward_pre_hook(first)))
        yield


def published_hook(batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """h <- h + (I(h C_RD) - h C_RD) C_DR at the last token, sample by sample, converters materialised in float32."""
    d = SHAPE["hidden_size"]
    into, back = torch.randn(d, DONOR) / d**0.5, torch.randn(DONOR, d) / DONOR**0.5
    read, bias, write = torch.randn(DONOR, RANK), torch.randn(RANK), torch.randn(RANK, DONOR)
    h = torch.randn(batch, TOKENS, d).to(dtype)

    def hook() -> None:
        for sample in range(batch):
            state = h[sample, -1].float() @ into
            changed = state + (state @ read + bias) @ write
            h[sample, -1] += ((changed - state) @ back).to(dtype)

    return hook


def prefill(lm: cv.LM, batch: int, repetitions: int) -> dict[str, Any]:
    dtype = lm.model.dtype
    clock, ids = Clock(), torch.ones(batch, TOKENS, dtype=torch.int64)
    published = clock.around("published", published_hook(batch, dtype))
    with attached(lm, clock), torch.inference_mode():
        for repetition in range(repetitions + 1):
            lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
            published()
            if repetition == 0:
                clock.taken.clear()  # the first pass warms up
    hook, block = clock.median("hook"), clock.median("block")
    owner = sum(clock.median(name) for name in OWNER) / LAYERS
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "repetitions": repetitions,
        "block_us": block,
        "hook_us": hook,
        "owner_us": owner,
        "share_percent": 100 * (hook + owner) / block,
        "published_us": clock.median("published"),
    }


def floor(lm: cv.LM, repetitions: int) -> dict[str, float]:
    """Microseconds at batch 1 of a hook that changes nothing, and of one that makes a single call of PyTorch's."""

    def took(edit: Callable[[torch.Tensor], torch.Tensor]) -> float:
        with mock.patch.object(passes, "_adding", return_value=edit):
            return float(prefill(lm, 1, repetitions)["hook_us"])

    def one_call(h: torch.Tensor) -> torch.Tensor:
        h[0, -1].add_(0.0)
        return h

    return {"nothing_us": took(lambda h: h), "one_call_us": took(one_call)}


def decode(lm: cv.LM, steps: int = 30) -> dict[str, float]:
    """Count the hooks left on the block at decode steps, and the microseconds of those on its owner."""
    clock, seen = Clock(), []
    block = lm.blocks[0]
    with attached(lm, clock), torch.inference_mode():
        probe = block.register_forward_pre_hook(lambda *_: seen.append(len(block._forward_hooks)))
        cache = lm.model(input_ids=torch.ones(1, TOKENS, dtype=torch.int64), use_cache=True).past_key_values
        assert seen == [2], "the prefill was not edited"
        clock.taken.clear()
        for _ in range(steps):
            lm.model(input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
        probe.remove()
    # One of the hooks on the block is the clock.
    return {"block_hooks": max(seen[1:]) - 1, "owner_us": sum(clock.median(name) for name in OWNER)}


def measure(*, quick: bool) -> dict[str, Any]:
    """Time the hooks at prefill for both dtypes and several batches, and what is left of them at decode."""
    torch.set_num_threads(1)
    rows = []
    batches = {1: 5, 8: 2} if quick else {1: 20, 8: 5, 32: 2}
    for dtype in (torch.float32, torch.bfloat16):
        lm = block_of_3b(dtype)
        rows += [prefill(lm, batch, repetitions) for batch, repetitions in batches.items()]
    return {"layers": LAYERS, "prefill": rows, "floor": floor(lm, batches[1]), "decode": decode(lm)}
