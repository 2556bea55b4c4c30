"""Small instructions that a program can check, put behind everyday questions: what an adapter leaves of obedience.

Source: the manner of IFEval (Zhou et al., arXiv 2311.07911, strict accuracy); kinds, wording and questions are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from commandv.prompts.sets import Prompt, PromptSet

Check = Callable[[str], bool]


class Instruction(NamedTuple):
    """What is asked for, and whether an answer does it."""

    text: str
    check: Check


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[\w'’]+", text.lower())


def items(text: str) -> list[str]:
    """Return the lines that begin with a star or a dash and say something."""
    return re.findall(r"^\s*[*-]\s+(\S.*)$", text, re.M)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, told by their final marks; what has none at its end counts as one."""
    return [one for one in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()) if words(one)]


INSTRUCTIONS: dict[str, Instruction] = {
    "lower case": Instruction(
        "Write your whole answer in lower case letters, no capitals at all.",
        lambda text: bool(words(text)) and not re.search(r"[A-Z]", text),
    ),
    "capitals": Instruction(
        "Write your whole answer in capital letters.",
        lambda text: bool(re.search(r"[A-Z]{2}", text)) and not re.search(r"[a-z]", text),
    ),
    "no commas": Instruction(
        "Do not use any comma in your answer.", lambda text: len(words(text)) >= 5 and "," not in text
    ),
    "short": Instruction("Answer in at most ten words.", lambda text: 1 <= len(words(text)) <= 10),
    "one sentence": Instruction(
        "Answer in exactly one sentence.",
        lambda text: len(sentences(text)) == 1 and text.strip().rstrip("\"')]")[-1:] in (".", "!", "?"),
    ),
    "three items": Instruction(
        "Answer with exactly three items, each on a line of its own that begins with a star (*).",
        lambda text: len(set(items(text))) == len(items(text)) == 3,
    ),
    "begins": Instruction(
        'Begin your answer with the word "Listen".', lambda text: bool(re.match(r"\W*listen\b", text, re.I))
    ),
    "keyword": Instruction(
        'Use the word "garden" in your answer.', lambda text: "garden" in words(text) and len(words(text)) >= 5
    ),
    "quotes": Instruction(
        "Put your whole answer into double quotation marks.",
        lambda text: bool(re.fullmatch(r'\s*["“][^"“”]*\w[^"“”]*["”]\s*', text)),
    ),
    "title": Instruction(
        "Begin your answer with a title in double angle brackets, such as <<my title>>.",
        lambda text: bool(re.match(r"\s*<<[^<>\n]*\w[^<>\n]*>>\s*\w", text)),
    ),
}


def instructed(questions: PromptSet, name: str) -> PromptSet:
    """Return questions with an instruction behind each, kinds by turns; a prompt's `response` is its kind."""
    kinds = list(INSTRUCTIONS)
    return PromptSet(
        tuple(
            Prompt(f"{one.text} {INSTRUCTIONS[kinds[i % len(kinds)]].text}", kinds[i % len(kinds)])
            for i, one in enumerate(questions)
        ),
        name,
    )


def follows(kind: str, answer: str) -> bool:
    """Return whether an answer does what the instruction of a kind asks, to the letter."""
    return INSTRUCTIONS[kind].check(answer)
