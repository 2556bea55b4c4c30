"""Generated multistep arithmetic of graded difficulty, with exact answers."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence

from commandv.arguments import checked
from commandv.errors import InputError
from commandv.evaluation.reasoning import final_answer, is_right
from commandv.prompts.sets import Prompt, PromptSet

# (operations, depth of brackets), from what a small model can do up to BIG-Bench Hard's and beyond.
LEVELS = ((1, 0), (2, 0), (2, 1), (3, 1), (4, 1), (4, 2), (6, 2), (8, 3))
LARGEST = 9999  # magnitude of a value on the way; products of brackets would grow without end
_TRIES = 1000  # expressions drawn in a row without a new one, before a level counts as exhausted


def by_hash(texts: Iterable[str]) -> list[str]:
    """Return the distinct texts in the order of their SHA-256: an order that no author chose."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def is_dev(expression: str) -> bool:
    """True for the third of all expressions, told by their hash, that only development splits hold."""
    return hashlib.sha256(expression.encode()).digest()[0] % 3 == 0


@checked
def arithmetic_prompts(
    n_dev: int = 60, n_test: int = 140, *, levels: Sequence[tuple[int, int]] = LEVELS, seed: int = 0
) -> tuple[PromptSet, PromptSet]:
    """Generate (dev, test) sets of problems such as "What is (3 + -4) * 2?" with their answers as replies.

    The operations are +, - and * on whole numbers from -9 to 9, with the usual precedence. Which of the splits an
    expression may be in depends on the expression alone, so that they are disjoint whatever the seeds and sizes: what
    was tuned on one seed's dev set is in no seed's test set. The levels take turns; a prompt's category names its own.

    Args:
        n_dev: problems for choosing settings.
        n_test: problems for reporting.
        levels: difficulties as (number of operations, depth of brackets); each bracket needs an operation more.
        seed: of the expressions.

    Raises:
        InputError: a level that does not exist or has too few different problems, or no problems asked for.
    """
    if n_dev < 1 or n_test < 1 or not levels:
        raise InputError(f"n_dev={n_dev}, n_test={n_test}, {len(levels)} levels: expected 1 or more of each")
    for operations, depth in levels:
        if depth < 0 or operations < depth + 1:
            raise InputError(f"level ({operations}, {depth}): expected depth 0 or more, and more operations than that")
    rng = random.Random(seed)
    seen: set[str] = set()
    splits = []
    for dev, n in ((True, n_dev), (False, n_test)):
        chosen = [_problem(rng, levels[i % len(levels)], dev, seen) for i in range(n)]
        splits.append(PromptSet(tuple(chosen), f"arithmetic-{'dev' if dev else 'test'}, seed {seed}"))
    return splits[0], splits[1]


def sum_is_right(question: str, answer: str, reference: str) -> bool:
    """True when an answer states the value of what was asked ("What is 3 + -4?"); see `is_right`.

    An echo of the question is no result, whatever its last number. Where no final answer is marked, equations of the
    expression asked for count ("2 + 4 = 6, as everybody knows since 1900"); all of them must give the value.
    """
    asked = re.fullmatch(r"What is (.+)\?", question)
    if asked is None:
        return is_right(answer, reference)
    if final_answer(answer) is None:
        values = re.findall(rf"{re.escape(asked[1])}\s*=\s*(-?\d[\d.,]*)(?!\s*[-+*=\d])", answer)
        if values:
            return all(is_right(value, reference) for value in values)
    return is_right(answer.replace(asked[1], " "), reference)


def _problem(rng: random.Random, level: tuple[int, int], dev: bool, seen: set[str]) -> Prompt:
    for _ in range(_TRIES):
        expression, value = _expression(rng, *level)
        if expression not in seen and is_dev(expression) == dev and abs(value) <= LARGEST:
            seen.add(expression)
            category = f"{level[0]} operation{'s' * (level[0] > 1)}, depth {level[1]}"
            return Prompt(f"What is {expression}?", str(value), category)
    raise InputError(f"level {level}: hardly any new problems are left after {len(seen)}; ask for fewer, or add levels")


def _expression(rng: random.Random, operations: int, depth: int) -> tuple[str, int]:
    """Return an expression with so many operations and its value; one operand of each bracket is the next bracket."""
    inner = rng.randrange(depth, operations) if depth else 0  # operations within the bracket
    terms = [(str(value), value) for value in (rng.randrange(-9, 10) for _ in range(operations - inner + 1))]
    if depth:
        text, value = _expression(rng, inner, depth - 1)
        terms[rng.randrange(len(terms))] = (f"({text})", value)
    signs = ["+-*"[rng.randrange(3)] for _ in terms[1:]]
    text = terms[0][0] + "".join(f" {sign} {term}" for sign, (term, _) in zip(signs, terms[1:], strict=True))
    sums = [terms[0][1]]  # summands after the products are taken
    for sign, (_, value) in zip(signs, terms[1:], strict=True):
        if sign == "*":
            sums[-1] *= value
        else:
            sums.append(value if sign == "+" else -value)
    return text, sum(sums)
