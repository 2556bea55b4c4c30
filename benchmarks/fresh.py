"""From a clone to an answer: seconds and sizes of what a new user does; writes results/fresh.json.

    python -m benchmarks.fresh

The clone is of what is committed; the cache of converted models and profiles is empty, pip's is as it was. Every stage
runs the clone's own `.venv` in the clone. The hub is `tests/support/local_hub.py` on this machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fresh.json"
RECIPIENT, ADAPTER = "smollm2-135m-instruct", "commandv-demo"
CLIENT = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
asked = [{"role": "user", "content": "How do I make tea?"}]
answer = client.chat.completions.create(model="base+list", messages=asked, max_tokens=48, temperature=0)
assert answer.choices[0].message.content.strip()
"""

TEXT = """# From a clone to an answer

Written by `python -m benchmarks.fresh` on {cores} cores without a GPU ({python}): a clone in an empty directory, pip's
cache as it was, no model converted and nothing profiled before; at the start {load:.1f} processes ran. Seconds are
those of whole commands, Python's and PyTorch's start among them.

| | command | seconds | |
|---|---|---|---|
{rows}
"""


class Fresh:
    """A clone, and what has been measured in it."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.rows = folder / "commandv", list[dict[str, Any]]()
        self.environment = {**os.environ, "COMMANDV_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub")}
        self.environment.pop("PYTHONPATH", None)
        self.environment["PATH"] = f"{self.clone / '.venv' / 'bin'}:{os.environ['PATH']}"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.clone)], check=True)

    def stage(
        self, name: str, command: str, told: Callable[[], str] = str, *, typed: str = "", shown: str = "", **more: str
    ) -> None:
        """Run a command and keep its seconds; `told` says what it left, `shown` stands for it on the page."""
        began = time.monotonic()
        done = subprocess.run(
            shlex.split(command), cwd=self.clone, env={**self.environment, **more}, input=typed, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{command}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        self.keep(name, shown or command, time.monotonic() - began, told())

    def keep(self, name: str, command: str, seconds: float, told: str) -> None:
        self.rows.append({"name": name, "command": command, "seconds": round(seconds, 1), "left": told})
        print(self.rows[-1], flush=True)

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Serve the recipient with the adapter; yield the address of the API."""
        command = f"commandv serve {RECIPIENT} --adapter list={ADAPTER}"
        began = time.monotonic()
        with subprocess.Popen(
            shlex.split(f"{command} --port 0 --json"), cwd=self.clone, env=self.environment, stdout=subprocess.PIPE,
            text=True,
        ) as server:  # fmt: skip
            assert server.stdout is not None
            text = ""
            while not text.endswith("}\n"):
                text += server.stdout.readline()
            self.keep("until it serves", command, time.monotonic() - began, "")
            try:
                yield json.loads(text)["api"]
            finally:
                server.terminate()
                server.wait(60)

    def size(self, *names: str) -> str:
        total = 0
        for name in names:
            files = [self.clone / name, *(self.clone / name).rglob("*")]
            total += sum(one.lstat().st_size for one in files if one.is_file() and not one.is_symlink())
        return f"{total / 1e9:.2f} GB" if total > 1e8 else f"{total / 1e6:.2f} MB"

    def all(self) -> list[dict[str, Any]]:
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        import local_hub

        venv = functools.partial(self.size, ".venv")
        self.stage("set-up for the demo", "make .venv/.installed", venv)
        self.stage("demo, models converted", "make demo", functools.partial(self.size, ADAPTER))
        self.stage("a prompt of one's own", f"commandv generate {RECIPIENT} 'How do I make tea?' --adapter {ADAPTER}")
        self.stage("chat and server", "python -m pip install --quiet -c constraints.txt -e .[chat,serve] openai", venv,
                   shown="pip install 'commandv[chat,serve]' openai")  # fmt: skip
        self.stage("a question in chat", f"commandv chat {RECIPIENT} --adapter list={ADAPTER} --max-new-tokens 48",
                   typed="How do I make tea?\n/quit\n")  # fmt: skip
        with self.serving() as api:
            self.stage("OpenAI's client, 48 tokens", f"python -c {shlex.quote(CLIENT)} {api}", shown="docs/serving.md")
        with local_hub.serving() as hub:
            signed = {"HF_ENDPOINT": hub.url, "HF_TOKEN": local_hub.TOKEN, "HF_HUB_DISABLE_XET": "1"}
            signed["HF_HUB_OFFLINE"] = "0"
            self.stage("push to a hub on this machine", f"commandv push {ADAPTER} anna/lists", **signed)
            self.stage("inspect it there", "commandv inspect anna/lists", **signed)
            self.stage(
                "pull it", "commandv pull anna/lists -o pulled", functools.partial(self.size, "pulled"), **signed
            )
        self.stage("export for pyreft", f"commandv export {ADAPTER} for-pyreft --to pyreft",
                   functools.partial(self.size, "for-pyreft"))  # fmt: skip
        self.stage("set-up for the tests", "make .venv/.dev", venv)
        return self.rows


def page() -> str:
    """Return the page, from the results."""
    found = json.loads(RESULTS.read_text("utf-8"))
    rows = [f"| {one['name']} | `{one['command']}` | {one['seconds']:.0f} | {one['left']} |" for one in found["stages"]]
    return TEXT.format(cores=found["cores"], python=found["python"], load=found["load"], rows="\n".join(rows))


def main() -> None:
    found = {"cores": os.cpu_count(), "python": f"Python {platform.python_version()}", "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        found["stages"] = Fresh(Path(folder)).all()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
