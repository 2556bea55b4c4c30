"""Seconds and bytes of pushing, loading, pulling and exporting, with a hub on this machine.

    python benchmarks/sharing.py OUT.json

Runs `tests/support/local_hub.py`; what the network would add is not in it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "0"

import huggingface_hub
import torch

import commandv as cv
import local_hub
from commandv.interop.baked import bake
from commandv.interop.control_vectors import write_control_vector
from commandv.interop.pyreft import write_pyreft
from commandv.positions import EVERYWHERE

MODEL = "smollm2-135m-instruct"
ADAPTER = f"builtin:numbered-list@{MODEL}"


def size(path: Path) -> int:
    return sum(one.stat().st_size for one in ([path] if path.is_file() else path.iterdir()))


def main(out: Path) -> None:
    rows: list[dict[str, Any]] = []

    def timed(what: str, run: Callable[[], Any], measured: Callable[[Any], int]) -> Any:
        start = time.perf_counter()
        made = run()
        rows.append({"what": what, "seconds": round(time.perf_counter() - start, 3), "bytes": measured(made)})
        print(rows[-1], flush=True)
        return made

    lm = cv.load_model(MODEL)
    prompts, text = cv.load_prompts("builtin:general"), cv.load_prompts("builtin:text")
    profile = cv.profile(lm, prompts, text=text)
    adapter = cv.load_adapter(ADAPTER)
    with tempfile.TemporaryDirectory() as folder, local_hub.serving() as hub:
        place = Path(folder)
        constants: Any = huggingface_hub.constants
        constants.ENDPOINT, constants.HF_HUB_CACHE = hub.url, str(place / "cache")
        constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        os.environ["HF_TOKEN"] = local_hub.TOKEN
        for name, one, load in (("adapter", adapter, cv.load_adapter), ("profile", profile, cv.load_profile)):
            pushed = timed(
                f"push the {name}", lambda one=one, name=name: cv.push(one, f"anna/{name}"), lambda it: it.size
            )
            timed(f"load the {name}, first time", lambda load=load, name=name: load(f"anna/{name}"),
                  lambda _, pushed=pushed: pushed.size)  # fmt: skip
            timed(f"load the {name}, from the cache", lambda load=load, name=name: load(f"anna/{name}"), lambda _: 0)
            timed(f"pull the {name}", lambda name=name: cv.pull(f"anna/{name}", place / name),
                  lambda _, name=name: size(place / name))  # fmt: skip
        timed("export the adapter to pyreft", lambda: write_pyreft(adapter, place / "reft"), size)
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(lm.d_model, generator=generator)
        push = cv.Adapter({20: cv.steering_vector(20 * vector / vector.norm())}, lm.ref, "push").at(EVERYWHERE)
        timed("export a vector to GGUF", lambda: write_control_vector(push, place / "push.gguf"), size)
        baked = timed("bake a vector into the model", lambda: bake(lm, push, place / "baked"), lambda it: size(it.path))
        rows.append({"what": "baked", "difference": baked.difference, "effect": baked.effect})
        directions = {layer: cv.ablation(vector) for layer in range(lm.n_layers)}
        without = cv.Adapter(directions, lm.ref, "without").at(EVERYWHERE)
        ablated = timed("bake an ablation into the model", lambda: bake(lm, without, place / "cut", every_writer=True),
                        lambda it: size(it.path))  # fmt: skip
        rows.append({"what": "ablated", "difference": ablated.difference, "effect": ablated.effect, "kl": ablated.kl})
        print(rows, flush=True)
    out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
