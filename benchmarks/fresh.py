"""From a clone to an answer: times and sizes of the set-up; writes results/fresh.json and ../docs/benchmarks/fresh.md.

    python -m benchmarks.fresh [FILE.gguf]    # with a file, its conversion as well

The clone is of what is committed. pip's cache is used as it is; the cache of converted models and profiles is empty.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fresh.json"
PAGE = ROOT / "docs" / "benchmarks" / "fresh.md"
STAGES = {
    "set-up for the demo": ["make", ".venv/.installed"],
    "demo": ["make", "demo"],
    "set-up for the tests": ["make", ".venv/.dev"],
    "checks": ["make", "check"],
    "tests": ["make", "test"],
}

TEXT = """# From a clone to an answer

Written by `python -m benchmarks.fresh` on {cores} cores without a GPU: a clone in an empty directory, pip's cache as it
was, no model converted and nothing profiled before.

| stage | seconds | .venv after it |
|---|---|---|
{rows}

{conversion}"""

CONVERSION = """`{file}` (quantised) was converted and loaded in {seconds:.0f} s and at most
{peak:.1f} GB of memory; the model itself takes {own:.1f} GB in bfloat16.
"""


def measure(gguf: str | None) -> dict[str, Any]:
    """Return seconds and sizes of each stage; raises where one fails."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        clone, environment = Path(folder) / "commandv", {**os.environ, "COMMANDV_CACHE": f"{folder}/cache"}
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        for stage, command in STAGES.items():
            began = time.monotonic()
            subprocess.run(command, cwd=clone, env=environment, check=True, stdout=subprocess.DEVNULL)
            seconds = round(time.monotonic() - began)
            size = sum(file.lstat().st_size for file in (clone / ".venv").rglob("*") if not file.is_symlink())
            found["stages"][stage] = {"seconds": seconds, "bytes": size}
            print(f"{stage}: {seconds} s", flush=True)
        if gguf:
            command = [sys.executable, "-m", "benchmarks.fresh", "--convert", str(Path(gguf).resolve())]
            done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            found["conversion"] = json.loads(done.stdout.splitlines()[-1])
    return found


def convert(file: str) -> dict[str, Any]:
    """Load a GGUF model, which converts it, and return seconds and bytes; in a process of its own."""
    import commandv as cv

    began = time.monotonic()
    lm = cv.load_model(file, dtype="bfloat16")
    own = sum(one.numel() * one.element_size() for one in lm.model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"file": Path(file).name, "seconds": time.monotonic() - began, "own": own, "peak": peak}


def page() -> str:
    """Return the page, from the results."""
    found = json.loads(RESULTS.read_text("utf-8"))
    rows = [f"| {name} | {one['seconds']} | {one['bytes'] / 1e9:.1f} GB |" for name, one in found["stages"].items()]
    told = found.get("conversion")
    conversion = told and CONVERSION.format(**{**told, "own": told["own"] / 1e9, "peak": told["peak"] / 1e9})
    return TEXT.format(cores=found["cores"], rows="\n".join(rows), conversion=conversion or "")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        print(json.dumps(convert(sys.argv[2])))
    else:
        RESULTS.write_text(json.dumps(measure(next(iter(sys.argv[1:]), None)), indent=1) + "\n", "utf-8")
        PAGE.write_text(page(), "utf-8")
        print(page())
