"""The one check for answers that go round in circles."""

from __future__ import annotations

import re
from collections import Counter

from commandv.arguments import checked

GRAM, TIMES = 4, 3  # words, and how often the same ones stand in an answer that may be a loop
REPEATED = 1 / 3  # of an answer's runs of four words: so many are there a second time in a loop
CYCLE = 1 / 2  # so many repeats are a loop whatever is repeated, from eight runs on

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_MARK = r"(?<!\S)\(?(?:\d{1,3}|[A-Za-z]|[ivx]{2,4}|[IVX]{2,4})[.):](?!\S)"  # "1.", "2)", "(b)", "IV."
_NUMBERING = re.compile(_MARK)
_EMPTY_ITEMS = re.compile(rf"(?:{_MARK}\s*){{4,}}")
_STEADY = re.compile(r"(\S{2,12}?)\1{4,}|(\S{13,60}?)\2{2,}")  # "ArrArrArrArrArr"; sentences of scripts without spaces
_RULE = re.compile(r"\w([.\-_=*#])\1{19,}")  # right after a word; a ruled line stands alone
_SYLLABLE = re.compile(r"(?!(.)\1\1)([^\W\d_]{3,12}?)\2{2,}")  # "ArrArrArr", and no "Arrrrrr"


@checked
def loops(text: str) -> bool:
    """True for a text that goes round in circles: the one check of this kind, which every grader applies.

    Any of:

    - the same four words in a row (two of them with letters) three times, and a third or more of all its runs of four
      words are repeats of earlier ones. The second condition spares lists of one pattern ("It is made of milk. It is
      made of hay. It is made of wool."), which say something new each time;
    - half or more of its runs of four words, of eight at least, are repeats;
    - one word four times without a break, or two to eight words three times;
    - its last words are one run of four to twenty-four words twice, and four words more of it: a loop that was cut off;
    - a run of characters over and over; four list marks ("1.", "b)") in a row with nothing after them.

    Case, marks and list marks do not matter. In answers of fewer than six words the first two cannot be found. A
    stretched letter ("Arrrrr"), a round number ("1000000") and a ruled line are no loops.
    """
    plain = _NUMBERING.sub(" ", text)
    dense = re.sub(r"[\s.\-_=*#]+", "", plain)
    if any(one.search(text) for one in (_SYLLABLE, _RULE, _EMPTY_ITEMS)) or _STEADY.search(dense):
        return True
    words = [word.lower() for word in WORD.findall(plain)]
    runs = list(zip(*(words[i:] for i in range(GRAM)), strict=False))
    counts = Counter(runs)
    repeated = 1 - len(counts) / len(runs) if runs else 0.0
    often = any(n >= TIMES and sum(not word.isdigit() for word in run) >= 2 for run, n in counts.items())
    if (often and repeated >= REPEATED) or (len(runs) >= 8 and repeated >= CYCLE):
        return True
    if any(words[-n - 4 :] == words[-2 * n - 4 : -n] for n in range(4, 25) if len(words) >= 2 * n + 4):
        return True
    return any(
        words[i : i + n] * times == words[i : i + times * n]
        for n in range(1, 9)
        for times in (4 if n == 1 else 3,)
        for i in range(len(words) - times * n + 1)
    )
