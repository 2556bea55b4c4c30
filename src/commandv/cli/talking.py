"""A conversation in the terminal, both answers side by side as they come; or line by line from standard input."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import InMemoryHistory
from rich.console import Console
from rich.live import Live
from rich.segment import SegmentLines
from rich.table import Table
from rich.text import Text

from commandv.cli.options import printable
from commandv.errors import CommandVError
from commandv.serving.requests import Answer
from commandv.serving.talk import Talk, completions

try:
    import termios
except ImportError:  # Windows, whose console does not echo what is typed meanwhile
    termios = None  # type: ignore[assignment]

_NARROW = 60  # columns of a terminal in which two answers do not fit side by side


def talk(talk: Talk) -> None:
    """Read questions and commands until the input ends, and show the answers."""
    console = Console(highlight=False)
    asking = sys.stdin.isatty()
    if asking:
        console.print(f"{talk.engine.lm.id}: {talk.state()}. /help lists commands, /quit ends.", markup=False)
    for line in _typed(talk) if asking else _piped():
        question = line.strip()
        if not question:
            continue
        try:
            if question.startswith("/"):
                console.print(talk.command(question), style="dim", markup=False)
            else:
                _ask(talk, question, console)
        except EOFError:
            return
        except CommandVError as error:
            console.print(f"commandv: {error}", style="red", markup=False)


def _typed(talk: Talk) -> Iterator[str]:
    words = WordCompleter([*completions(), *talk.scales], WORD=True)
    session: PromptSession[str] = PromptSession(history=InMemoryHistory(), completer=words, complete_while_typing=False)
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:  # what was typed is dropped, as in a shell
            continue
        except EOFError:
            return


def _piped() -> Iterator[str]:
    yield from sys.stdin


def _ask(talk: Talk, question: str, console: Console) -> None:
    answers = talk.ask(question)
    texts, cut, note = ["", ""], set[int](), ""
    try:
        if console.is_terminal:
            with _without_echo(), Live(console=console, refresh_per_second=12, transient=True) as live:
                for _ in _growing(answers, texts, cut):
                    live.update(_last_lines(_columns(talk, texts, console.width), console))
        else:
            for _ in _growing(answers, texts, cut):
                pass
            console.print(f"> {question}", markup=False)
    except KeyboardInterrupt:
        note = "(stopped)"
    finally:
        for one in answers:
            one.cancel()
    console.print(_columns(talk, texts, console.width))
    if note or cut:
        console.print(note or f"(cut at {talk.max_tokens} tokens; /max N allows more)", style="dim")
    talk.heard(question, (texts[0], texts[1]))


def _last_lines(table: Table, console: Console) -> SegmentLines:
    """Return what of a table fits on the screen; the whole is printed at the end."""
    return SegmentLines(console.render_lines(table)[1 - console.height :], new_lines=True)


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """Keep what is typed while answers are drawn out of the drawing; it is there at the next prompt."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _growing(answers: tuple[Answer, Answer], texts: list[str], cut: set[int]) -> Iterator[None]:
    """Yield whenever a text has grown, both to their ends; `cut` gets the sides that came to the longest answer."""
    sides = {i: iter(one) for i, one in enumerate(answers)}
    while sides:
        for i, pieces in list(sides.items()):
            piece = next(pieces, None)
            if piece is None:
                del sides[i]
                continue
            texts[i] += piece.text
            if piece.finish == "length":
                cut.add(i)
            yield


def _columns(talk: Talk, texts: list[str], width: int) -> Table:
    shown = [Text(printable(text.rstrip())) for text in texts]
    if width < _NARROW:
        stacked = Table(show_header=False, expand=True)
        for name, text in zip(talk.names, shown, strict=True):
            stacked.add_row(Text(name, style="bold"))
            stacked.add_row(text)
        return stacked
    table = Table(expand=True)
    for name in talk.names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*shown)
    return table
