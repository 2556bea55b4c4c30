"""What commandv costs on a GPU: one command, under eight minutes on an H100, no network.

    python -m benchmarks.gpu               # writes results/gpu-CARD.json
    python -m benchmarks.gpu --dry-run     # tiny shapes, also without a GPU; writes nothing

Models have the true width of Llama-3.2-3B and Llama-3.1-8B, random weights in bfloat16 and `--depth` blocks. Measured
are

- the hooks: a prefill and a decoding step with an adapter on half of the blocks, over the same passes without, eager
  and (decoding) as CUDA graphs, batch 1 to 64;
- profiling: tokens a second, as a share of the same batches run through plain forward passes;
- the fit of one layer pair by the library (float32 and float64 on the CPU), and the same Gram matrix and Cholesky
  solve on the GPU, in float32 with one refinement and in float64;
- the greatest memory of each part.

Times are medians over turns in which both sides alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

import commandv as cv
from commandv.errors import CommandVError
from commandv.transfer.convert.fitters import Ridge

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
TINY = {"tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}}
BATCHES, TOKENS, RANK, TURNS = (1, 8, 32, 64), 128, 8, 7
ROWS = 5000


def words() -> Any:
    """A tokenizer of a few words."""
    vocabulary = {"<unk>": 0, **{f"w{n}": n + 1 for n in range(255)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<unk>")


def model(shape: dict[str, int], depth: int, device: str) -> cv.LM:
    """Random weights of a shape, bfloat16."""
    config = transformers.LlamaConfig(
        **shape, num_hidden_layers=depth, vocab_size=256, max_position_embeddings=1024, attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return cv.wrap_model(made, words(), "random")


def adapter(lm: cv.LM) -> cv.Adapter:
    """A rank-8 adapter on the upper half of the blocks."""
    generator = torch.Generator().manual_seed(0)
    d = lm.d_model
    edits = {
        layer: (
            cv.Intervention(
                torch.randn(RANK, d, generator=generator) / d**0.5,
                torch.zeros(RANK),
                1e-3 * torch.randn(RANK, d, generator=generator),
            ),
        )
        for layer in range(lm.n_layers // 2, lm.n_layers)
    }
    return cv.Adapter(edits, lm.ref, "random")


Around = Callable[[], contextlib.AbstractContextManager[Any]]
nothing: Around = contextlib.nullcontext


class Bench:
    """Times on one device."""

    def __init__(self, device: str, turns: int) -> None:
        self.device, self.turns = device, turns

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def ratio(self, one: Callable[[], Any], other: Callable[[], Any], around: Around = nothing) -> dict[str, float]:
        """Return seconds of both, and how many times as long the first takes, medians over alternating turns.

        `around` is entered for the first, outside the time.
        """

        def first() -> float:
            with around():
                return self.seconds(one)

        def second() -> float:
            return self.seconds(other)

        first(), second()
        pairs = []
        for turn in range(self.turns):
            taken = {work: work() for work in ((first, second) if turn % 2 else (second, first))}
            pairs.append((taken[first], taken[second]))
        return {
            "seconds": statistics.median(a for a, _ in pairs),
            "plain": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(a / b for a, b in pairs),
        }


def hooks(bench: Bench, lm: cv.LM, batch: int, tokens: int) -> dict[str, Any]:
    """Measure a prefill and a decoding step with an adapter attached over those without."""
    made = adapter(lm)
    ids = torch.randint(1, 256, (batch, tokens), device=bench.device)
    mask = torch.ones_like(ids)
    step = ids[:, :1]
    longer = torch.ones(batch, tokens + 1, dtype=mask.dtype, device=bench.device)

    def prefill() -> Any:
        with torch.inference_mode():
            return lm.model(input_ids=ids, attention_mask=mask, use_cache=True)

    def decode() -> None:
        with torch.inference_mode():
            lm.model(input_ids=step, attention_mask=longer, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    def attached() -> contextlib.AbstractContextManager[Any]:
        return cv.attach(lm, made, n_prompt=tokens)

    cache = prefill().past_key_values

    def attached_alone() -> None:
        with attached():
            pass

    return {
        "prefill": bench.ratio(prefill, prefill, attached),
        "decode": bench.ratio(decode, decode, attached),
        "attach and detach, seconds": statistics.median(bench.seconds(attached_alone) for _ in range(bench.turns)),
        "decode as a CUDA graph": _graphs(bench, lm, made, step) if bench.device == "cuda" else "needs a GPU",
    }


def _graphs(bench: Bench, lm: cv.LM, made: cv.Adapter, step: torch.Tensor) -> Any:
    """Measure a captured decoding step; prefill-only adapters leave nothing on the blocks for it to capture."""
    cache = transformers.StaticCache(config=lm.model.config, max_cache_len=256)
    place = torch.full((1,), 128, device=bench.device)

    def one() -> None:
        lm.model(input_ids=step, past_key_values=cache, cache_position=place, use_cache=True)

    def captured() -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):
                one()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.inference_mode(), torch.cuda.graph(graph):
            one()
        return graph

    try:
        plain = captured()
        with cv.attach(lm, made, n_prompt=128):
            with_hooks = captured()
            return bench.ratio(with_hooks.replay, plain.replay)
    except (RuntimeError, CommandVError) as error:  # what cannot be captured is a finding, too
        return f"not captured: {str(error).splitlines()[0][:200]}"


def profiling(bench: Bench, lm: cv.LM, prompts: int, tokens: int) -> dict[str, float]:
    """Measure a profile over plain forward passes of as many prompts of the same length."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, 255, (prompts, tokens), generator=generator).tolist()
    texts = [" ".join(f"w{n}" for n in row) for row in rows]
    ids = torch.tensor(rows, device=bench.device)

    def plain() -> None:
        with torch.inference_mode():
            for part in ids.split(16):
                lm.model.model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False)

    found = bench.ratio(lambda: cv.profile(lm, texts, cache=False, text=None), plain)
    return {**found, "tokens a second": prompts * tokens / found["seconds"]}


def solving(bench: Bench, n: int, d: int) -> dict[str, float]:
    """Measure the fit of a layer pair, and its Gram matrix and solve on the device."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(n, d, generator=generator).bfloat16() for _ in range(2))
    write = torch.randn(RANK, d, generator=generator)
    found = {"library, CPU": bench.seconds(lambda: Ridge()(x, y, groups=np.arange(n)).push(write))}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        here, right = x.to(bench.device, dtype), write.T.to(bench.device, dtype)
        here = here - here.mean(0)

        def solve(here: torch.Tensor = here, right: torch.Tensor = right) -> torch.Tensor:
            gram = here.T @ here
            gram.diagonal().add_(0.1 * gram.diagonal().mean())
            factor = torch.linalg.cholesky(gram)
            first = torch.cholesky_solve(right, factor)
            return first + torch.cholesky_solve(right - gram @ first, factor)

        solve()
        found[f"Gram and Cholesky with refinement, {name}, {bench.device}"] = bench.seconds(solve)
    return found


def peak(bench: Bench, work: Callable[[], Any]) -> Any:
    """Return what a part found, with the device's greatest memory meanwhile."""
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    value = work()
    if bench.device == "cuda" and isinstance(value, dict):
        value = {**value, "peak bytes": torch.cuda.max_memory_allocated()}
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--depth", type=int, default=8, help="blocks; the full models have 28 and 32")
    given = parser.parse_args()
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("no GPU; --dry-run tries the script without one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes, depth, batches, tokens = (TINY, 4, (1, 4), 16) if given.dry_run else (SHAPES, given.depth, BATCHES, TOKENS)
    bench = Bench(device, 3 if given.dry_run else TURNS)
    began = time.perf_counter()
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "depth": depth,
        "tokens": tokens,
    }
    for name, shape in shapes.items():
        lm = model(shape, depth, device)
        part: dict[str, Any] = {"hooks": {}}
        for batch in batches:
            part["hooks"][str(batch)] = peak(bench, lambda batch=batch, lm=lm: hooks(bench, lm, batch, tokens))
        part["profile"] = peak(bench, lambda lm=lm: profiling(bench, lm, 32 if given.dry_run else 256, tokens))
        rows = 200 if given.dry_run else ROWS
        part["solve"] = peak(bench, lambda shape=shape, rows=rows: solving(bench, rows, shape["hidden_size"]))
        found[name] = part
        del lm
        print(name, json.dumps(part, indent=1), flush=True)
    found["seconds in all"] = round(time.perf_counter() - began, 1)
    if not given.dry_run:
        card = "-".join(found["card"].lower().split())
        (RESULTS / f"gpu-{card}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
