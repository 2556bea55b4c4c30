"""Whether an answer depends on what shares its batch: writes results/batching.json and ../docs/benchmarks/batching.md.

python -m benchmarks.batching
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import commandv as cv

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "batching.json"
PAGE = ROOT / "docs" / "benchmarks" / "batching.md"
DONOR, RECIPIENT = "gemma-3-270m", "smollm2-135m-instruct"
N, TOKENS = 48, 48

TEXT = """# Does an answer depend on what shares its batch?

Written by `python -m benchmarks.batching`. {n} development questions, greedy answers of {tokens} tokens by
{recipient}, each alone and all in one batch; with nothing attached, and with the numbered list pasted from {donor} at
its full scale. Padding and batching change nothing but the order in which a processor adds; in bfloat16, which keeps
three digits, that decides between two tokens of nearly the same probability.

| dtype | attached | the same alone and together |
|---|---|---|
{rows}
"""


def measure() -> list[dict[str, Any]]:
    """Return for both precisions, plain and pasted, how many answers are the same."""
    general = cv.load_prompts("builtin:general")
    adapter = cv.load_adapter(f"builtin:numbered-list@{DONOR}")
    pasted = cv.paste(adapter, *(cv.profile(cv.load_model(name), general) for name in (DONOR, RECIPIENT)))
    asked = cv.load_prompts("builtin:questions-dev")[:N]
    rows = []
    for dtype in ("bfloat16", "float32"):
        lm = cv.load_model(RECIPIENT, dtype=dtype)
        for name, adapter in {"nothing": None, "pasted": pasted}.items():
            with cv.attach(lm, adapter) if adapter else contextlib.nullcontext():
                together = cv.generate(lm, asked, max_new_tokens=TOKENS, batch_size=N)
                alone = cv.generate(lm, asked, max_new_tokens=TOKENS, batch_size=1)
            same = sum(a == b for a, b in zip(together, alone, strict=True))
            rows.append({"dtype": dtype, "attached": name, "same": same, "n": N})
    return rows


def page() -> str:
    """Return the page, from the results."""
    found = json.loads(RESULTS.read_text("utf-8"))
    rows = "\n".join(f"| {one['dtype']} | {one['attached']} | {one['same']} of {one['n']} |" for one in found)
    return TEXT.format(n=N, tokens=TOKENS, donor=DONOR, recipient=RECIPIENT, rows=rows)


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", "utf-8")
    PAGE.write_text(page(), "utf-8")
    print(page())
