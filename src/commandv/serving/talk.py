"""A conversation with a model before and after: its state, and the commands that change it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from commandv.errors import InputError, did_you_mean
from commandv.models.sampling import Sampling
from commandv.serving.behaviours import BASE, Behaviour, Part, behaviour_name
from commandv.serving.conversation import conversation_ids, plain_stops
from commandv.serving.engine import Engine
from commandv.serving.requests import Answer, Request

SIDES = ("before", "after")


@dataclass
class Talk:
    """Two conversations with the same questions, one without and one with behaviours."""

    engine: Engine  # what answers; all its adapters are on at first
    sampling: Sampling = field(default_factory=Sampling)  # how tokens are chosen
    max_tokens: int = 256  # longest answer
    system: str | None = None  # system prompt; None leaves what the model was loaded with
    scales: dict[str, float] = field(init=False)  # factor of each adapter
    on: list[str] = field(init=False)  # the adapters that are on, in the order in which they act
    turns: tuple[list[dict[str, str]], list[dict[str, str]]] = field(init=False)  # messages of each conversation

    def __post_init__(self) -> None:
        self.scales = dict.fromkeys(self.engine.adapters, 1.0)
        self.on = list(self.engine.adapters)
        self.turns = ([], [])

    @property
    def behaviour(self) -> Behaviour:
        """What is attached in the second conversation."""
        return tuple(Part(name, self.scales[name]) for name in self.on)

    @property
    def names(self) -> tuple[str, str]:
        """The model names of both sides."""
        return BASE, behaviour_name(self.behaviour)

    def ask(self, question: str) -> tuple[Answer, Answer]:
        """Ask both sides; `heard` goes on when they have answered.

        Raises:
            InputError: the model's prompt format does not take the conversation, or its context is full.
        """
        asked = {"role": "user", "content": question}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        lm = self.engine.lm
        one, two = (
            Request(
                conversation_ids(lm, [*system, *turns, asked]), behaviour, self.max_tokens, self.sampling,
                plain_stops(lm), strip=not lm.chat,
            )
            for turns, behaviour in zip(self.turns, ((), self.behaviour), strict=True)
        )  # fmt: skip
        before, after = self.engine.submit(one, two)
        return before, after

    def heard(self, question: str, answers: tuple[str, str]) -> None:
        """Take answers into the conversations."""
        for turns, answer in zip(self.turns, answers, strict=True):
            # Chat templates and the plain format both want an answer to every question.
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer or " "}]

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says, and return what to tell."""
        name, _, rest = line.removeprefix("/").strip().partition(" ")
        if name not in COMMANDS:
            raise InputError(f"/{name}: no such command{did_you_mean(name, COMMANDS, '/')}; /help lists them")
        return COMMANDS[name].run(self, rest.strip())

    def state(self) -> str:
        """Return what is on and how answers are made."""
        off = [name for name in self.scales if name not in self.on]
        told = [
            self.names[1],
            *([f"off: {', '.join(off)}"] if off else []),
            f"temperature {self.sampling.temperature:g}",
        ]
        told += [f"top_p {self.sampling.top_p:g}", f"at most {self.max_tokens} tokens"]
        return "; ".join([*told, f"system: {self.system}"] if self.system is not None else told)

    def adapter(self, name: str) -> str:
        """Return an adapter's name if there is one of it."""
        if name not in self.scales:
            what = f"no adapter {name!r}{did_you_mean(name, self.scales)}" if name else "name an adapter"
            raise InputError(f"{what}; there are: {', '.join(self.scales) or 'none'}")
        return name


@dataclass(frozen=True)
class Command:
    """What a slash and a word do."""

    usage: str
    help: str
    run: Callable[[Talk, str], str]


def completions() -> Iterator[str]:
    """Yield the commands as they are typed."""
    return (f"/{name}" for name in COMMANDS)


def _help(_talk: Talk, _rest: str) -> str:
    width = max(len(one.usage) for one in COMMANDS.values())
    return "\n".join(f"{one.usage.ljust(width)}  {one.help}" for one in COMMANDS.values())


def _scale(talk: Talk, rest: str) -> str:
    try:
        name, number = shlex.split(rest)
        scale = float(number)
    except ValueError:
        raise InputError(f"/scale {rest}: expected an adapter's name and a number, as in /scale pirate 0.6") from None
    name = talk.adapter(name)
    talk.engine.adapters[name].scaled(scale)  # says what is no scale
    talk.scales[name] = scale
    return talk.state()


def _on(talk: Talk, rest: str) -> str:
    if talk.adapter(rest) not in talk.on:
        talk.on.append(rest)
    return talk.state()


def _off(talk: Talk, rest: str) -> str:
    if talk.adapter(rest) in talk.on:
        talk.on.remove(rest)
    return talk.state()


def _system(talk: Talk, rest: str) -> str:
    before, talk.system = talk.system, rest or None
    try:
        conversation_ids(talk.engine.lm, [*_said(talk.system), {"role": "user", "content": "a"}])
    except InputError:
        talk.system = before
        raise
    return talk.state()


def _said(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _number(what: str) -> Callable[[Talk, str], str]:
    kind = int if what in ("seed", "max") else float

    def run(talk: Talk, rest: str) -> str:
        try:
            given: dict[str, Any] = {what: kind(rest)}
        except ValueError:
            raise InputError(f"/{what} {rest}: expected a number") from None
        if what != "max":
            talk.sampling = replace(talk.sampling, **given)
        elif given["max"] < 1:
            raise InputError(f"/max {rest}: expected 1 or more")
        else:
            talk.max_tokens = given["max"]
        return talk.state()

    return run


def _reset(talk: Talk, _rest: str) -> str:
    for turns in talk.turns:
        turns.clear()
    return "a new conversation"


def _quit(_talk: Talk, _rest: str) -> str:
    raise EOFError


COMMANDS = {
    "help": Command("/help", "this list", _help),
    "show": Command("/show", "what is on, and how answers are made", lambda talk, _: talk.state()),
    "scale": Command("/scale NAME X", "factor on an adapter's deltas", _scale),
    "on": Command("/on NAME", "switch an adapter on", _on),
    "off": Command("/off NAME", "switch an adapter off", _off),
    "system": Command("/system TEXT", "another system prompt; nothing for the model's own", _system),
    "temperature": Command("/temperature X", "0 takes the most likely token", _number("temperature")),
    "top_p": Command("/top_p X", "sample among the fewest tokens of this probability", _number("top_p")),
    "seed": Command("/seed N", "of sampling", _number("seed")),
    "max": Command("/max N", "longest answer in tokens", _number("max")),
    "reset": Command("/reset", "begin a new conversation", _reset),
    "quit": Command("/quit", "end; so does the end of input", _quit),
}  # fmt: skip
