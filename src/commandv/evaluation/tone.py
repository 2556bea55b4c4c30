"""Tone: sentiment and formality of a text, by word lists that anybody can read."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from dataclasses import dataclass

from commandv.errors import InputError, require_known
from commandv.prompts.loops import loops

# In the same clause with at most one word between: "not good", "never a joy". "Not only good" is praise.
_NEGATED = re.compile(
    r"(?:(?<![\w'])(?:not|no|never|nor|neither|hardly|barely|scarcely|without|nothing|cannot)|n't)"
    r"(?!\s+(?:only|just|merely)\b)(?:\s+[\w'-]+)?\s+$"
)
_PLAIN_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


@dataclass(frozen=True)
class Lexicon:
    """Words and phrases that speak for a feature of a text, and such that speak against it."""

    name: str  # of the feature
    positive: tuple[str, ...]  # entries that speak for it, in lower case; `*` stands for any further letters
    negative: tuple[str, ...]  # entries that speak against it
    # whether a negation ("not", "never", "n't" ...) up to two words before a word turns it round
    negations: bool = False

    def __post_init__(self) -> None:
        both = sorted(set(self.positive) & set(self.negative))
        if not self.positive or not self.negative or not all(self.positive + self.negative) or both:
            raise InputError(
                f"lexicon {self.name}: {len(self.positive)} entries for and {len(self.negative)} against it, on both "
                f"sides {both}; expected at least one on each side, none empty and none on both"
            )

    def counts(self, text: str) -> tuple[int, int]:
        """Return how many words or phrases of a text speak for and against the feature; case does not matter."""
        plain = text.translate(_PLAIN_QUOTES).lower()
        found = [0, 0]
        for side, entries in enumerate((self.positive, self.negative)):
            for hit in _pattern(entries).finditer(plain):
                turned = self.negations and _NEGATED.search(plain[: hit.start()])
                found[1 - side if turned else side] += 1
        return found[0], found[1]

    def balance(self, text: str) -> float:
        """Return (for - against) / (for + against), from -1 to 1; 0 where nothing speaks and for a text that loops."""
        more, less = self.counts(text)
        return 0.0 if more == less or loops(text) else (more - less) / (more + less)


@functools.cache
def _pattern(entries: tuple[str, ...]) -> re.Pattern[str]:
    """Return the pattern of any of the entries as whole words, the longest first."""
    parts = []
    for entry in sorted(entries, key=len, reverse=True):
        # Before "*n't" and after "ador*" there must be no boundary, and ":)" has no letter to bound.
        before, after = (r"(?<!\w)" if entry[0].isalnum() else ""), (r"(?!\w)" if entry[-1].isalnum() else "")
        parts.append(before + re.escape(entry).replace(r"\*", r"\w*").replace(r"\ ", r"\s+") + after)
    return re.compile("|".join(parts))


@functools.cache
def load_lexicon(name: str) -> Lexicon:
    """Return a lexicon that comes with the library, written from general knowledge; its file says what is in it.

    Args:
        name: `sentiment` (positive, negative) or `formality` (formal, informal).

    Raises:
        InputError: no such lexicon.
    """
    require_known("lexicon", name, LEXICONS)
    text = (importlib.resources.files("commandv.evaluation") / "data" / f"{name}.json").read_text("utf-8")
    lists = json.loads(text)
    return Lexicon(name, tuple(lists["positive"]), tuple(lists["negative"]), lists["negations"])


def positive_sentiment(text: str) -> bool:
    """True when more words of the text speak well of something than ill; it does not loop; False without either."""
    return load_lexicon("sentiment").balance(text) > 0


def formal(text: str) -> bool:
    """True when more of the text's words and marks are formal than informal; it does not loop; False without either."""
    return load_lexicon("formality").balance(text) > 0


LEXICONS = ("sentiment", "formality")
