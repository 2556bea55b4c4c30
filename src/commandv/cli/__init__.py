"""The command line: thin verbs over the library, by subject."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from commandv.cli import (  # noqa: F401  (defines the verbs, in this order)
    chat,
    core,
    exporting,
    serve,
    share,
    steering,
    studies,
    transfer,
    words,
)
from commandv.cli.app import app
from commandv.cli.options import printable
from commandv.errors import CommandVError


def _quiet_libraries() -> None:
    """Keep transformers' own bars and notices out of our output."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")


def main(run: Callable[[], Any] = app) -> None:
    """Run the command line; an expected error is one line on standard error and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("commandv").setLevel(logging.INFO)
    _quiet_libraries()
    try:
        run()
    except CommandVError as error:
        sys.stderr.write(f"commandv: {printable(' '.join(str(error).splitlines()))}\n")
        sys.exit(2)
