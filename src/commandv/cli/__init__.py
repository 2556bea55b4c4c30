"""The command line: thin verbs over the library, by subject."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import sys

import typer

from commandv.cli import (  # noqa: F401  (defines the verbs, in this order)
    chat,
    core,
    exporting,
    rehearsing,
    serve,
    share,
    steering,
    studies,
    transfer,
    words,
)
from commandv.cli.app import app, options_of
from commandv.cli.options import printable
from commandv.errors import (
    CommandVError,
    FormatError,
    HubError,
    InputError,
    JudgeError,
    MismatchError,
    ModelError,
    StorageError,
    WorkerError,
    did_you_mean,
)

EXIT_CODES: dict[type[Exception], int] = {
    InputError: 2,
    typer.TyperException: 2,  # a verb or option that does not exist, a value of another type
    ModelError: 3,
    StorageError: 4,
    MismatchError: 5,
    FormatError: 6,
    JudgeError: 7,
    WorkerError: 8,
    HubError: 9,
}


def main() -> None:
    """Run the command line; an expected error is one line on standard error and an exit status of its own.

    With `--json` it is an object on standard output as well: `{"error": {"kind", "message", "exit_code"}}`.
    """
    _ready_streams()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("commandv").setLevel(logging.INFO)
    _quiet_libraries()
    try:
        code = app(standalone_mode=False)
    except (CommandVError, typer.TyperException) as error:
        code = _report(error)
    except typer.Abort:
        code = 130
    except OSError as error:
        code = 1
        if error.filename is not None:  # not of our output
            code = _report(StorageError(f"{error.filename}: {error.strerror}; check the name and who may use it"))
        else:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more as it ends
        if error.filename is None and error.errno != errno.EPIPE:  # whose reader has gone, such as `head`
            code = _report(StorageError(f"the output cannot be written: {error.strerror}; free some space"))
    sys.exit(code)


def _ready_streams() -> None:
    """Let output hold every character, whatever the terminal's encoding, and give closed streams an empty end."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (for as long as we run)
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if "--json" in sys.argv and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as JSON is


def _report(error: Exception) -> int:
    """Print an error and return the exit status it stands for."""
    code = next(number for kind, number in EXIT_CODES.items() if isinstance(error, kind))
    usage = isinstance(error, typer.TyperException)
    message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{message}\n")
        return code
    message = printable(" ".join(_as_options(message).splitlines()))
    if usage:
        message = message.replace("Value error, ", "")
        if choice := re.search(r"'([^']*)' is not one of (.*)", message):
            message += did_you_mean(choice[1], re.findall(r"'([^']+)'", choice[2]))
        verb = next((word for word in sys.argv[1:2] if options_of(word)), "")
        message += f" (`commandv {verb + ' ' if verb else ''}-h` lists what there is)"
    sys.stderr.write(f"commandv: {message}\n")
    if "--json" in sys.argv:
        kind = "UsageError" if usage else type(error).__name__
        sys.stdout.write(json.dumps({"error": {"kind": kind, "message": message, "exit_code": code}}) + "\n")
    return code


def _as_options(message: str) -> str:
    """Say `--layer 3` where a message of the library says `layer=3`, of what the verb has an option for."""
    names = "|".join(map(re.escape, options_of(next(iter(sys.argv[1:2]), ""))))
    if not names:
        return message
    pattern = rf"(?<![\w.-])({names})=(?:'([^']*)'|([\w.+-]+))?"

    def option(match: re.Match[str]) -> str:
        value = match[2] if match[2] is not None else match[3] or ""
        return f"--{match[1].replace('_', '-')} {value}".rstrip()

    return re.sub(pattern, option, message)


def _quiet_libraries() -> None:
    """Keep transformers' own bars and notices out of our output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
