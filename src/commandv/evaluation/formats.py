"""Graders and labellers of format and style: JSON, capitals, openings, length, language, repetition."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from commandv.arguments import checked
from commandv.evaluation.graders import Grader, unless_looping
from commandv.prompts.loops import loops

CAPITALS_SHARE = 0.9  # of the cased letters; leaves room for a unit or a name such as "km" or "iPhone"

_FENCE = re.compile(r"```[ \t]*(?:json)?[ \t]*\r?\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)


def parse_json(text: str) -> Any | None:
    """Return the non-empty JSON object or array that the text is, None when it is none.

    A bare number, string or `null` is no format that anybody asks for, and `NaN` is not JSON.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # a degenerate "[[[[[[" nests deeper than Python's stack
        return None
    return value if isinstance(value, (dict, list)) and value else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def find_json(text: str) -> tuple[Any, int] | None:
    """Return the first JSON value in a text and where it starts: the whole text, a fenced block, or an object within.

    Only objects are looked for outside fences: prose is full of brackets such as "[1]".
    """
    whole = parse_json(text)
    if whole is not None:
        return whole, len(text) - len(text.lstrip())
    for block in _FENCE.finditer(text):
        value = parse_json(block[1])
        if value is not None:
            return value, block.start(1)
    decoder = json.JSONDecoder(parse_constant=_refuse)
    for brace in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        if value:
            return value, brace.start()
    return None


@checked
@unless_looping
def json_strict(text: str) -> bool:
    """True when the whole answer is a non-empty JSON object or array."""
    return parse_json(text) is not None


@checked
@unless_looping
def json_lenient(text: str) -> bool:
    """True when the whole answer or a fenced block in it is a non-empty JSON object or array."""
    return json_strict(text) or any(parse_json(block[1]) is not None for block in _FENCE.finditer(text))


@checked
def json_fields(fields: Sequence[str], *, strict: bool = False) -> Grader:
    """Return the grader that asks for a JSON object in which each of the fields has a value.

    Args:
        fields: names of keys; others may be there too.
        strict: whether the object must be the whole answer; otherwise a fenced block will do.
    """

    def grade(text: str) -> bool:
        texts = [text] if strict else [text, *(block[1] for block in _FENCE.finditer(text))]
        values = (parse_json(one) for one in texts)
        return any(isinstance(value, dict) and all(_filled(value.get(f)) for f in fields) for value in values)

    return unless_looping(grade)


def _filled(value: Any) -> bool:
    return value is not None and value not in ("", [], {}) and (not isinstance(value, str) or bool(value.strip()))


@checked
@unless_looping
def capitals(text: str) -> bool:
    """True when at least nine in ten of the letters that have a case, and two at least, are capitals."""
    cased = [letter.isupper() for letter in text if letter.isupper() or letter.islower()]
    return len(cased) >= 2 and sum(cased) >= CAPITALS_SHARE * len(cased)


@checked
def opens_with(opening: str) -> Grader:
    """Return the grader that asks for an opening as given, case and all, ending at a word's end."""
    wanted = _plain_quotes(opening.strip())
    boundary = r"(?!\w)" if wanted[-1:].isalnum() else ""
    pattern = re.compile(r"\s*" + re.escape(wanted) + boundary)

    def grade(text: str) -> bool:
        return bool(wanted and pattern.match(_plain_quotes(text)))

    return unless_looping(grade)


def _plain_quotes(text: str) -> str:
    return text.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""))


@checked
def word_count(text: str) -> int:
    """Return the number of words: runs without white space that hold a letter or a digit."""
    return sum(any(character.isalnum() for character in word) for word in text.split())


# -- language ---------------------------------------------------------------------------------------------------------

# Frequent function words; they are facts of the languages and written here from knowledge of them. No list holds a word
# that English has too ("die", "as", "no", "son", "is"), so that an English text is never taken for another one.
_STOP_WORDS = {
    "english": "the and of to a an in is are was were you your that this with for it its they i have has not be can "
    "will from by on as at or if how what why who do does my me we he she their there when which into out but no",
    "german": "der das und ist sind nicht ein eine einen einem mit für auf zu von den dem sich auch werden wird sie "
    "ich im es wie oder bei haben wenn aus",
    "french": "le la les et est sont une des du dans pour que qui avec sur pas vous il elle nous ce cette au aux ou "
    "être je n'est c'est",
    "spanish": "el la los las y es una del en para que con por se su como más pero lo al está puede muy sus",
    "italian": "il lo la gli le e è sono una di del della che con si nel alla come più anche un può questo",
    "portuguese": "o os e é são uma da dos em para que com não se na por mais mas como um seu pode você ao",
    "dutch": "de het een en zijn niet van voor op te dat er ook worden wordt ze je om aan maar bij naar deze",
}
_LANGUAGES = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}
MIN_HITS = 2  # different function words that a guess rests on


@checked
def outside_script(text: str, script: str = "LATIN") -> float:
    """Return the share of letters outside a script, 0 for a text without letters.

    Args:
        text: any text; digits, signs and spaces do not count.
        script: a word of Unicode's character names: `LATIN`, `CYRILLIC`, `GREEK`, `ARABIC`, `CJK`, `HANGUL` ...
    """
    letters = [letter for letter in text if letter.isalpha()]
    outside = sum(script.upper() not in unicodedata.name(letter, "").split() for letter in letters)
    return outside / len(letters) if letters else 0.0


@checked
def language(text: str) -> str:
    """Name the language of a text by its function words, `"other script"` when it is not in Latin letters.

    Deliberately silent, with `""`, on texts too short or too poor in function words to tell (a list of names, an
    equation): as a meter of drift it must not invent any. A statistical identifier (py3langid carries its model)
    always answers; it knows more languages, and would be a dependency for this one label.
    """
    if outside_script(text) > 0.5:
        return "other script"
    words = set(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", _plain_quotes(text).lower()))
    hits = {name: len(words & own) for name, own in _LANGUAGES.items()}
    first, second = sorted(hits, key=lambda name: -hits[name])[:2]
    return first if hits[first] >= MIN_HITS and hits[first] > hits[second] else ""


@checked
def in_another_language(home: str = "english") -> Grader:
    """Return the grader that is True for an answer recognised as in another language than `home`, looping or not."""

    def grade(text: str) -> bool:
        return language(text) not in ("", home)

    return grade


# -- repetition -------------------------------------------------------------------------------------------------------


@checked
def distinct_share(text: str, n: int = 2) -> float:
    """Return the number of different runs of n words over the number of such runs, 1 where there is none.

    Source: distinct-n of Li et al., arXiv 1510.03055, over one answer instead of all.
    """
    words = text.lower().split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


FORMATS: dict[str, Grader] = {
    "json": json_lenient,
    "json-strict": json_strict,
    "capitals": capitals,
    "language": in_another_language(),
    "loops": loops,
}
