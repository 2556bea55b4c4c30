"""The words around a conversation: chat templates with a system prompt and options, and the plain format."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes

from commandv.errors import InputError, ModelError
from commandv.models.lm import LM, PLAIN_FORMAT, RESERVED

log = logging.getLogger(__name__)

PLAIN_STOP = "\nQuestion:"

MARK = "commandv-prompt-begins-here"
# A template is code from a hub: whatever it raises is the template's fault.
_RAISED = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
)  # fmt: skip


def render(lm: LM, turns: Sequence[Mapping[str, str]], *, begun: bool = False) -> str:
    """Return the text that the model sees for a conversation, up to where its reply starts.

    Args:
        lm: the model.
        turns: `{"role": ..., "content": ...}` each. The model's own system prompt goes before them unless they begin
            with one.
        begun: the last turn is the beginning of the reply.
    """
    roles = ", ".join(turn["role"] for turn in turns)
    if not lm.chat:
        if [turn["role"] for turn in turns] != ["user"]:
            raise InputError(
                f"{lm.id} is asked in the plain format, which holds one user message; got {roles or 'none'}. Use a "
                "model with a chat template, or a task without system messages and earlier turns"
            )
        return PLAIN_FORMAT.format(turns[0]["content"])
    system = lm.format.system
    if system is not None and not (turns and turns[0]["role"] == "system"):
        turns, roles = [{"role": "system", "content": system}, *turns], f"system, {roles}"
    try:
        source, dates = _with_dates(lm.tokenizer.get_chat_template(), lm.format.date)
        return lm.tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], chat_template=source, tokenize=False, add_generation_prompt=not begun,
            continue_final_message=begun, **dates, **lm.format.options,
        )  # fmt: skip
    except _RAISED as error:
        raise InputError(
            f"{lm.id}: its chat template refuses messages of roles {roles}: {error}. Load the model with another "
            "system prompt (system=), other template_options=, or template='plain'"
        ) from error


def check_format(lm: LM) -> LM:
    """Return the model if its template takes the system prompt and the options it was given; say if it writes the date.

    Raises:
        InputError: the plain format with either; an option that the template does not know; a system prompt that the
            template refuses, or leaves out without a word.
    """
    _say_date(lm)
    if not str(lm.format):
        return lm
    if not lm.chat:
        raise InputError(f"{lm.id} is asked in the plain format, which has no system prompt and no options")
    unknown = sorted(set(lm.format.options) - _variables(lm))
    if unknown:
        listed = ", ".join(options_of(lm)) or "none"
        raise InputError(f"{lm.id}: template options {unknown}: its chat template knows {listed}")
    if lm.format.system is not None and lm.format.system.strip() not in render(lm, [{"role": "user", "content": MARK}]):
        raise InputError(f"{lm.id}: its chat template leaves the system prompt out; put it before the prompts instead")
    return lm


def _say_date(lm: LM) -> None:
    """Warn of a template whose prompts are others on another day."""
    if "strftime_now" not in str(lm.template):
        return
    turn = {"role": "user", "content": MARK}
    other = replace(lm, format=replace(lm.format, date=lm.format.date - timedelta(days=400, hours=1, minutes=1)))
    try:
        dated = render(lm, [turn]) != render(other, [turn])
    except InputError:  # said when a prompt is made
        return
    if dated:
        fixed = "; template_options={'date_string': ...} fixes it" if "date_string" in options_of(lm) else ""
        log.warning("the chat template of %s writes the date: what is made today is of today's prompts%s", lm.id, fixed)


def options_of(lm: LM) -> list[str]:
    """Return the names of the options that the model's chat template reads."""
    said = {
        *RESERVED,
        *lm.tokenizer.special_tokens_map,
        "strftime_now",
        "raise_exception",
        "namespace",
        "range",
        "dict",
    }
    return sorted(_variables(lm) - said)


def default_system(lm: LM) -> str | None:
    """Return the system prompt that the template writes where none is given; None where that cannot be told."""
    turn = {"role": "user", "content": "a"}
    try:
        own, marked = render(lm, [turn]), render(lm, [{"role": "system", "content": MARK}, turn])
    except InputError:
        return None
    before, _, after = marked.partition(MARK)
    told = bool(after) and own.startswith(before) and own.endswith(after) and len(own) >= len(before + after)
    return own[len(before) : len(own) - len(after)] if told else None


def end_of_turn(lm: LM) -> int | None:
    """Return the token with which a reply ends: the one the template writes after it, else the tokenizer's end."""
    if lm.chat:
        try:
            text = render(lm, [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}], begun=False)
        except InputError:  # no replies in its conversations
            text = ""
        after = text.rpartition(MARK)[2].lstrip() if MARK in text else ""
        ids = lm.tokenizer(after, add_special_tokens=False).input_ids if after else []
        if ids and ids[0] in lm.tokenizer.added_tokens_decoder:
            return int(ids[0])
    return lm.tokenizer.eos_token_id


def stop_tokens(lm: LM) -> list[int]:
    """Return the tokens at which generation stops: the reply's end, the tokenizer's, the generation configuration's."""
    own = lm.model.generation_config.eos_token_id
    listed = own if isinstance(own, list | tuple) else [own]
    found = [end_of_turn(lm), lm.tokenizer.eos_token_id, *listed]
    try:
        numbers = list(dict.fromkeys(operator.index(one) for one in found if one is not None))
        if max(map(abs, numbers), default=0) >= 1 << 31:
            raise TypeError("beyond every vocabulary")
        return numbers
    except TypeError as error:
        raise ModelError(
            f"{lm.id}: the tokens at which it ends are {str(own)[:60]}: expected numbers of tokens; set "
            "eos_token_id in its generation_config.json right"
        ) from error


def _with_dates(source: str, date: datetime) -> tuple[str, dict[str, Any]]:
    """Return a template in which `strftime_now` tells one date, and the option that it needs for that."""
    formats = _date_formats(source)
    if not formats:
        return source, {}
    told = "{% macro strftime_now(format) %}{{ commandv_dates[format] }}{% endmacro +%}"
    return told + source, {"commandv_dates": {one: date.strftime(one) for one in formats}}


@functools.lru_cache(maxsize=64)
def _date_formats(source: str) -> tuple[str, ...]:
    calls = (call for call in _parsed(source).find_all(jinja2.nodes.Call) if isinstance(call.node, jinja2.nodes.Name))
    dated = (call for call in calls if call.node.name == "strftime_now" and len(call.args) == 1)  # type: ignore[attr-defined]
    given = [call.args[0] for call in dated]
    constant = [one.value for one in given if isinstance(one, jinja2.nodes.Const)]
    return tuple(map(str, constant)) if len(constant) == len(given) else ()


def _variables(lm: LM) -> set[str]:
    """Return the names that the chat template reads from outside; none of one that cannot be read."""
    try:
        return jinja2.meta.find_undeclared_variables(_parsed(lm.tokenizer.get_chat_template())) if lm.chat else set()
    except (jinja2.TemplateError, ValueError):  # `render` says what is wrong with it
        return set()


def _parsed(source: str) -> jinja2.nodes.Template:
    extensions = ["jinja2.ext.loopcontrols"]
    text = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return jinja2.Environment(extensions=extensions).parse(text)
