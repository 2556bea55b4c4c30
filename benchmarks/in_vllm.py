"""vLLM with our plug-in, and vLLM on baked weights, against our own answers: in an environment that has vLLM.

    python benchmarks/in_vllm.py OUT.json

vLLM holds transformers at another version than the tests', so this is no test of the suite. It answers the same prompts
greedily in one batch of mixed behaviours, once whole and once with prompts cut into chunks of 16 tokens.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import commandv as cv
from commandv.interop.baked import bake
from commandv.interop.vllm import register
from commandv.models.gguf import converted
from commandv.positions import EVERYWHERE

MODEL = "smollm2-135m-instruct"
ADAPTERS = {"list": f"builtin:numbered-list@{MODEL}", "pirate": f"builtin:pirate@{MODEL}"}
N, TOKENS = 12, 24
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "COMMANDV_VLLM": ",".join(f"{name}={source}" for name, source in ADAPTERS.items()),
}


def asked(llm: Any, ids: list[list[int]], names: list[str | None]) -> list[str]:
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=TOKENS, extra_args={"commandv": name} if name else None)
        for name in names
    ]
    return [one.outputs[0].text.strip() for one in llm.generate([{"prompt_token_ids": one} for one in ids], params)]


def main(out: Path) -> None:
    os.environ |= ENVIRONMENT
    from vllm import LLM  # reads the environment

    register()
    lm = cv.load_model(MODEL, dtype="float32")
    texts = cv.load_prompts("builtin:general", limit=N).texts
    names: list[str | None] = [[None, "list", "pirate"][i % 3] for i in range(N)]
    expected = []
    for text, name in zip(texts, names, strict=True):
        adapter = cv.load_adapter(ADAPTERS[name]) if name else tuned(lm, 0.0)
        with cv.attach(lm, adapter):
            expected += cv.generate(lm, [text], max_new_tokens=TOKENS)
    ids = [cv.encode(lm, text).ids for text in texts]
    common = {"enforce_eager": True, "enable_prefix_caching": False, "dtype": "float32", "max_model_len": 512}
    found: dict[str, Any] = {}
    for what, more in (("whole", {}), ("chunked", {"max_num_batched_tokens": 16, "max_num_seqs": 4})):
        start = time.perf_counter()
        llm = LLM(model=str(converted(MODEL)), **common, **more)
        answers = asked(llm, ids, names)
        found[what] = {"same": sum(a == b.strip() for a, b in zip(answers, expected, strict=True)), "of": N,
                       "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip
        plain = asked(llm, ids, [None] * N)
        found[what]["changed"] = sum(a != b for a, b in zip(answers, plain, strict=True))
        try:
            asked(llm, ids[:1], ["nobody"])
        except ValueError as error:
            found[what]["unknown"] = str(error)[:120]
        print(what, found[what], flush=True)
        del llm
    os.environ.pop("COMMANDV_VLLM")
    with tempfile.TemporaryDirectory() as folder:
        push = tuned(lm, 30.0)
        bake(lm, push, Path(folder) / "baked")
        with cv.attach(lm, push):
            expected = cv.generate(lm, texts, max_new_tokens=TOKENS)
        answers = asked(LLM(model=str(Path(folder) / "baked"), **common), ids, [None] * N)
        found["baked"] = {"same": sum(a == b.strip() for a, b in zip(answers, expected, strict=True)), "of": N}
    print(found, flush=True)
    out.write_text(json.dumps(found, indent=1))


def tuned(lm: cv.LM, size: float) -> cv.Adapter:
    """A vector of some length on every token, after block 20."""
    vector = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    return cv.Adapter({20: cv.steering_vector(size * vector / vector.norm())}, lm.ref, "push").at(EVERYWHERE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
