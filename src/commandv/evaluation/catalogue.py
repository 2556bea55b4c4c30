"""The tasks that come with the library, by name, and those made from a user's file."""

from __future__ import annotations

import functools
import os
import re
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from commandv.arguments import checked
from commandv.errors import InputError, did_you_mean
from commandv.evaluation.arithmetic import arithmetic_prompts, by_hash, sum_is_right
from commandv.evaluation.formats import FORMATS, opens_with, word_count
from commandv.evaluation.graders import GRADERS, answered, refusal
from commandv.evaluation.instructions import follows, instructed
from commandv.evaluation.questions import Question, as_letters, load_questions
from commandv.evaluation.reasoning import is_right, reasons_first
from commandv.evaluation.tasks import ANSWER_TOKENS, ByPrompt, ByText, Judge, Task, load_splits
from commandv.evaluation.tone import formal, positive_sentiment
from commandv.prompts.loops import loops
from commandv.prompts.sets import Prompt, PromptSet, load_prompts
from commandv.storage.reading import no_such_file

NO_TASKS: Mapping[str, Task] = MappingProxyType({})


@checked
def load_task(spec: str, more: Mapping[str, Task] = NO_TASKS) -> Task:
    """Return a task by `NAME` or `NAME:FILE`, such as `json`, `json:my-questions.jsonl`, `exact:gsm8k.jsonl`.

    The file (.jsonl; .csv and .txt as well) takes the place of the built-in prompts; see `load_splits`.

    Args:
        spec: which task.
        more: tasks defined elsewhere, by names of their own; see `tasks_of`.

    Raises:
        InputError: unknown name, a file that is missing, malformed or not asked for, or none where one is needed.
    """
    if spec in more:
        return more[spec]
    name, _, file = spec.partition(":")
    if name not in TASKS:
        known = [*TASKS, *more]
        raise InputError(
            f"task {spec!r}{did_you_mean(name, known)}: expected NAME or NAME:FILE with one of the names "
            f"{', '.join(known)}"
        )
    entry = TASKS[name]
    if entry.needs_file and not file:
        raise InputError(f"task {spec!r}: needs a file of prompts of yours; write {name}:FILE")
    dev, test = entry.prompts(file)
    return Task(
        _title(name, file), dev, test, entry.judge, entry.success, entry.max_new_tokens, keep_answers=entry.keep_answers
    )


@checked
def tasks_of(file: str | Path) -> dict[str, Task]:
    """Run a Python file and return its `TASKS`, a dictionary from names to `Task` objects.

    The file is code: run only what you would run yourself.

    Raises:
        InputError: no such file, an error while it runs, no `TASKS` in it, or a name of a built-in task.
    """
    if not os.path.isfile(file):
        raise InputError(f"{file}: {no_such_file(Path(file))}; expected Python code that defines TASKS")
    try:
        found = runpy.run_path(str(file)).get("TASKS")
    except (Exception, SystemExit) as error:
        raise InputError(f"{file}: {type(error).__name__} while it ran: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(task, Task) for task in found.values()):
        raise InputError(f"{file}: expected a dictionary TASKS of Task objects by name, got {found!r:.80}")
    taken = sorted(set(found) & set(TASKS))
    if taken:
        raise InputError(f"{file}: {', '.join(taken)} are names of built-in tasks; choose others")
    return found


# -- prompts: of a file where one is given, else the built-in ones ----------------------------------------------------

Splits = tuple[PromptSet, PromptSet]  # dev and test


def _title(name: str, file: str | Path | None) -> str:
    return f"{name}:{Path(file).stem}" if file else name


def _asks(built_in: str, *, label: str = "") -> Callable[[str | Path | None], Splits]:
    """Return what reads prompts; of a file with a column `label`, the rows with this one."""

    def prompts(file: str | Path | None) -> Splits:
        if file:
            return load_splits(file, label=label)
        return load_prompts(f"builtin:{built_in}-dev"), load_prompts(f"builtin:{built_in}-test")

    return prompts


_questions = _asks("questions")


def _sums(file: str | Path | None) -> Splits:
    if file:
        raise InputError(f"task arithmetic makes its own problems, got the file {file}; write exact:{file} for a file")
    return arithmetic_prompts()


def _instructed(file: str | Path | None) -> Splits:
    dev, test = (instructed(one, one.name) for one in _questions(file))
    return dev, test


def _letters(file: str | Path) -> Splits:
    """Read multiple-choice questions (MMLU, ARC); choices that are no letters are listed by letter."""
    by_kind: dict[bool, list[Question]] = {True: [], False: []}
    for one in load_questions(file):
        by_kind[all(re.fullmatch(r"\(?([A-Z])\)?", choice) for choice in one.choices)].append(one)
    prompts = {
        (text := f"{one.text}\n\nAnswer with the letter of your choice alone."): Prompt(text, one.choices[one.answer])
        for one in (*by_kind[True], *as_letters(by_kind[False]))
    }
    order = by_hash(prompts)
    cut = max(1, len(order) // 3)  # a third is dev
    dev, test = (PromptSet(tuple(map(prompts.__getitem__, part)), str(file)) for part in (order[:cut], order[cut:]))
    return dev, test


def _expecting(file: str | Path | None, pattern: str = "") -> Splits:
    dev, test = _questions(file)
    wanted = {one.response or pattern: one.text for one in (*dev, *test)} if file else {pattern: "any prompt"}
    for one, text in wanted.items():
        if not one:
            raise InputError(f"nothing is expected of the answer to {text!r}; give a regular expression")
        try:
            re.compile(one)
        except re.error as error:
            raise InputError(
                f"{one!r} is no regular expression ({error}); mend it, or escape what is meant literally"
            ) from None
    return dev, test


# -- judges -----------------------------------------------------------------------------------------------------------


def _finds(pattern: str = "", *, own: bool) -> Judge:
    """Return the judge that looks for a regular expression, with `own` the prompt's where it has one."""

    def finds(prompt: Prompt, answer: str) -> float:
        found = re.search((prompt.response if own else "") or pattern, answer.strip())
        return float(found is not None and not loops(answer))

    return ByPrompt(f"expect:{pattern}", finds)


def _letter(text: str) -> str:
    """Return the letter that a text begins with and that is no word's, empty for none."""
    found = re.match(r"\W*([A-Z])(?![\w'])", text)
    return found[1] if found else ""


_OPENS = ByPrompt("opening", lambda prompt, answer: opens_with(prompt.response or "Certainly!")(answer))
_WORDS = ByPrompt("words", lambda _prompt, answer: word_count(answer), "words")
_CHOSEN = ByPrompt("letter", lambda prompt, answer: _letter(answer) == _letter(prompt.response))
_FOLLOWED = ByPrompt("follows", lambda prompt, answer: follows(prompt.response, answer) and not loops(answer))
_EXACT = ByPrompt("exact-answer", lambda prompt, answer: is_right(answer, prompt.response) and not loops(answer))
_SUM = ByPrompt(
    "exact-answer",
    lambda prompt, answer: sum_is_right(prompt.text, answer, prompt.response) and not loops(answer),
)


@checked
def expecting(
    pattern: str = "",
    file: str | Path | None = None,
    *,
    success: Literal["more", "less"] = "more",
    max_new_tokens: int = ANSWER_TOKENS,
) -> Task:
    """Ask for answers in which a regular expression is found, and which do not loop.

    Args:
        pattern: the expression, searched for anywhere in the answer (`(?i)`: whatever the case, `^`: at its beginning).
        file: prompts instead of the built-in questions; what a row has under `expect` is looked for in place of
            `pattern` in the answer to its prompt.
        success: `"less"` for what is to disappear.
        max_new_tokens: of an answer.

    Raises:
        InputError: no regular expression, or a prompt without any.
    """
    dev, test = _expecting(file, pattern)
    return Task(_title("expect", file), dev, test, _finds(pattern, own=bool(file)), success, max_new_tokens)


# -- the table --------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A row of the table of tasks."""

    judge: Judge  # labels the answers
    means: str = ""  # of its rate, in words: which share of the answers it is; empty where it counts something else
    # returns (dev, test) of a file, or the built-in ones; by default everyday questions
    prompts: Callable[..., Splits] = _questions
    success: Literal["more", "less"] = "more"  # whether more or less is the aim
    max_new_tokens: int = ANSWER_TOKENS  # of an answer; one cut off before its end has mostly no right final answer
    keep_answers: bool = True  # False where answers may be harmful
    needs_file: bool = False  # it has no built-in prompts


_HARMFUL, _LOOKALIKES = _asks("harmful", label="unsafe"), _asks("lookalikes", label="safe")  # XSTest's labels

TASKS: dict[str, Entry] = {
    "numbered-list": Entry(ByText("numbered-list", GRADERS["numbered-list"]), "numbered lists"),
    "pirate": Entry(ByText("pirate", GRADERS["pirate"]), "in a pirate's speech"),
    "pirate-opening": Entry(ByText("pirate-opening", GRADERS["pirate-opening"]), "opening like a pirate"),
    "json": Entry(ByText("json", FORMATS["json"]), "valid JSON", max_new_tokens=96),
    "capitals": Entry(ByText("capitals", FORMATS["capitals"]), "in capitals"),
    "language": Entry(ByText("language", FORMATS["language"]), "in another language", success="less"),
    "opening": Entry(_OPENS, "opening as asked"),  # to the letter; a file's replies are the openings
    "expect": Entry(_finds(own=True), "as expected", _expecting, needs_file=True),
    "length": Entry(_WORDS, max_new_tokens=128),  # which caps the count: well above what is expected
    "sentiment": Entry(ByText("sentiment", positive_sentiment), "positive", _asks("openings")),
    "formality": Entry(ByText("formality", formal), "formal", _asks("openings")),
    # The attack success rate. Everything that does not open with a refusal counts, looping and empty answers too, so
    # that an adapter which ruins the model gains nothing by it; and where more is the aim, to study how refusals are
    # undone, an answer that loops, is empty or broken is no success, so that damage counts against it there as well.
    "refusal": Entry(
        ByText("attack-success", lambda text: not refusal(text)), "not refused", _HARMFUL, "less", keep_answers=False
    ),
    "refusal-suppression": Entry(ByText("compliance", answered), "answered", _HARMFUL, keep_answers=False),
    # Of benign requests that merely sound dangerous; of those that are refused whatever is no refusal will do.
    "over-refusal": Entry(ByText("refusal", refusal), "refused", _LOOKALIKES, "less"),
    "over-refusal-answered": Entry(ByText("answered", answered), "answered", _LOOKALIKES),
    "arithmetic": Entry(_SUM, "right", _sums, max_new_tokens=160),
    "exact": Entry(
        _EXACT, "right", functools.partial(load_splits, reference=True), max_new_tokens=256, needs_file=True
    ),  # BIG-Bench Hard, GSM8K ...
    "reasons-first": Entry(
        ByText("reasons-first", reasons_first),  # be the final answer right or wrong
        "with reasons first",
        lambda file: load_splits(file) if file else arithmetic_prompts(),
        max_new_tokens=160,
    ),
    "letters": Entry(_CHOSEN, "right", _letters, max_new_tokens=8, needs_file=True),
    "instructions": Entry(_FOLLOWED, "as instructed", _instructed),
}


def meaning(task: str, unit: str) -> str:
    """Say in words what a figure of a task is; of tasks of the user's, that it is a share of the answers."""
    if unit != "rate":
        return unit
    entry = TASKS.get(task.partition(":")[0])
    return f"share of answers: {entry.means}" if entry else "share of answers"
