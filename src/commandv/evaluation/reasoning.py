"""Answers to problems: the final answer in a free text, whether it is right, and what comes before it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from commandv.arguments import checked
from commandv.evaluation.formats import find_json, word_count
from commandv.evaluation.graders import unless_looping

MIN_REASONS = 8  # words before the answer from which they count as reasons; "24 + 13 = 37" has two

_ANSWER_KEYS = ("answer", "final_answer", "final answer", "finalanswer")
_KEY = re.compile(r'"final[_ ]?answer"|"answer"', re.IGNORECASE)
_IS = r"\b(?:[^.\n:=]{0,40}?\b(?:is|are|equals)\b\s*:?|\W{0,3}[:=])[\s*_]*"
_SAYS = re.compile(  # "The answer is 5", "Answer: 5", "The final answer to this is 5", "**Answer:** 5"
    r"\b(?:the\s+)?(?:final\s+|correct\s+)?answer" + _IS, re.IGNORECASE
)
_SUMS_UP = re.compile(  # "The total is 5": in the last line only, because reasons have totals of their own
    r"\b(?:the\s+)?(?:final\s+)?(?:result|total|solution)" + _IS + r"(?=[^\n]*\Z)", re.IGNORECASE
)
_HASHES = re.compile(r"####\s*")
_EQUALS = re.compile(r"=\s*(?=\$?[-+\u2212]?\$?[\d.,]*\d[^=\n]{0,20}\s*\Z)")  # "... = 24" at the very end
_NUMBER = re.compile(  # lengths are bounded: a looping answer may be one number of thousands of digits
    r"(?:(?<![\w)\].])[-+\u2212])?(?<![\w.])\$?"
    r"(?P<value>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,300}(?:\.\d{1,300})?(?:[eE][-+]?\d{1,3}\b)?|\.\d{1,300})"
    r"(?:\s?/\s?(?P<below>[1-9]\d*)(?![\d/]))?"
)
_YES = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


class Final(NamedTuple):
    """The final answer that a text states, and the offset where the statement starts."""

    text: str
    start: int


@checked
def final_answer(text: str) -> Final | None:
    r"""Return the final answer that a text marks as such, None when it marks none.

    Marks are: a JSON object with a field "answer", `\boxed{X}`, `#### X`, "the answer is X", "Answer: X", in the
    last line "the total (result, solution) is X", and an equation that ends the text. JSON goes first; of the others
    the last one counts.
    """
    found = find_json(text)
    if found and isinstance(found[0], dict):
        fields = {key.lower(): value for key, value in found[0].items()}
        key = next((key for key in _ANSWER_KEYS if fields.get(key) not in (None, "", [], {})), None)
        if key is not None:
            place = _KEY.search(text, found[1])
            return Final(_tidy(str(fields[key])), place.start() if place else found[1])
    marked = [one for one in _marked(text) if one.text]
    return max(marked, key=lambda one: one.start) if marked else None


def _marked(text: str) -> Iterator[Final]:
    for boxed in re.finditer(r"\\boxed\s*\{", text):
        depth, end = 1, boxed.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield Final(_tidy(text[boxed.end() : end - (not depth)]), boxed.start())
    for pattern in (_SAYS, _SUMS_UP, _HASHES, _EQUALS):
        for mark in pattern.finditer(text.rstrip()):
            line = text[mark.end() :].split("\n", 1)[0]
            sentence = re.split(r"(?<=\S)[.;!?](?:\s|$)", line, maxsplit=1)[0]
            yield Final(_tidy(sentence), mark.start())


def _tidy(text: str) -> str:
    r"""Strip LaTeX and Markdown around an answer, quotes, and dots at its end."""
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\d?frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text)
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"\\[()\[\],!; ]|\*\*|__|`", "", text)
    return text.strip(" \t\r\n\"'*_\u201c\u201d").rstrip(".;,! ").strip("\"'\u201c\u201d")


def numbers(text: str) -> list[Fraction]:
    """Return the numbers in a text, exactly: "1,000", "$18.50", "-3", "1/2", "2e3"; a dash after a word is no sign."""
    found = []
    for one in _NUMBER.finditer(text):
        sign = -1 if one[0][0] in "-\u2212" else 1
        below = int(one["below"]) if one["below"] else 1
        found.append(sign * Fraction(one["value"].replace(",", "")) / below)
    return found


@checked
def is_right(answer: str, reference: str) -> bool:
    """True when the final answer of a text is the reference.

    The reference decides how they are compared: numbers by value (1,000 = 1000.0; units, currency and dots at the end
    aside), a letter such as "(A)" with or without brackets, yes / no (true / false likewise), else the text without
    regard to case. A text that marks no final answer is taken by its last number, its letter, the first word of its
    first or last line, or as a whole. So a text cut off in mid-calculation can be right by chance: give answers room.

    Args:
        answer: the free text; see `final_answer` for the marks.
        reference: the answer wanted, or a worked solution that marks it ("... #### 18").
    """
    stated = final_answer(reference)
    wanted = stated.text if stated else _tidy(reference)
    final = final_answer(answer)
    said = final.text if final else ""
    if re.fullmatch(r"\(?[A-Za-z]\)?", wanted):
        return _letter(said, answer) == wanted.strip("()").upper()
    if wanted.lower() in _YES:
        return _yes_or_no(said, answer) == _YES[wanted.lower()]
    value = _sole_number(wanted)
    if value is not None:
        found = numbers(said.rpartition("=")[2])[:1] or numbers(answer)[-1:]
        return found == [value]
    candidates = (said,) if final else (answer, *answer.strip().split("\n")[-1:])
    return _plain(wanted) in map(_plain, candidates)


def _sole_number(text: str) -> Fraction | None:
    """Return the value of a reference such as "18", "$1,000", "-3.0 km" or "40%"; None for any other text."""
    found = numbers(text)
    rest = _NUMBER.sub("", text)
    return found[0] if len(found) == 1 and len(rest.split()) <= 2 and re.match(r"\s*[-+\u2212$]*[\d.]", text) else None


def _letter(said: str, answer: str) -> str:
    """Return the option's letter in what a text states, else in its first words, else the last one in brackets."""
    for place in (said, answer.strip()):
        alone = re.match(
            r"[\s*]*(?:(?:option|choice|answer)\b[:\s]*)?\(?([A-Za-z])(?:\)|[.:,](?:\s|$)|\s*$)", place, re.I
        )
        if alone:
            return alone[1].upper()
        if place is said and (bare := re.match(r"([B-HJ-Z])\b", said)):  # "C because"; "A" and "I" are words as well
            return bare[1]
        if bracketed := re.findall(r"\(([A-Za-z])\)", place):
            return bracketed[0 if place is said else -1].upper()
    return ""


def _yes_or_no(said: str, answer: str) -> str:
    lines = [said] if said else [answer.strip(), answer.strip().rpartition("\n")[2]]
    for line in lines:
        first = re.match(r"\W*(?:so|therefore|thus|hence)?\W*(yes|no|true|false)\b", line, re.IGNORECASE)
        if first:
            return _YES[first[1].lower()]
    return ""


def _plain(text: str) -> str:
    return " ".join(_tidy(text).casefold().split())


def answer_start(text: str) -> int:
    """Return the offset where the final answer starts: its mark, else the last line's last number, else that line."""
    final = final_answer(text)
    if final:
        return final.start
    body = text.rstrip()
    line = body.rfind("\n") + 1
    places = [one.start() for one in _NUMBER.finditer(body, line)]
    return places[-1] if places else line


@checked
def words_before_answer(text: str) -> int:
    """Return the number of words that come before the final answer."""
    return word_count(text[: answer_start(text)])


@checked
@unless_looping
def reasons_first(text: str) -> bool:
    """True when a marked final answer follows at least eight words of reasons and does not open the text as well.

    In JSON the reasons are what stands before the field "answer".
    """
    final = final_answer(text)
    if final is None or word_count(text[: final.start]) < MIN_REASONS:
        return False
    opening = re.match(re.escape(final.text) + r"(?!\w)", text.lstrip(" \t\r\n*(\"'"), re.IGNORECASE)
    return opening is None
