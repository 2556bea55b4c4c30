"""How alike two texts are."""

from __future__ import annotations

import re


def rouge_l(a: str, b: str) -> float:
    """Return 2 LCS(a, b) / (|a| + |b|), 0 to 1, with texts as sequences of words in lower case; 1 for two empty ones.

    LCS is the length of the longest common subsequence.

    Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, section 3 (F of precision and recall,
    weighted alike); without stemming.
    """
    first, second = (re.findall(r"\w+", text.lower()) for text in (a, b))
    if not first and not second:
        return 1.0
    longest = [0] * (len(second) + 1)  # with the words of `first` so far, and each beginning of `second`
    for word in first:
        before = 0  # of the row above, one column to the left
        for column, other in enumerate(second, start=1):
            above = longest[column]
            longest[column] = before + 1 if word == other else max(above, longest[column - 1])
            before = above
    return 2 * longest[-1] / (len(first) + len(second))
