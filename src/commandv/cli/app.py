"""The command line itself."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Copy a behaviour from one language model, paste it into another.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
