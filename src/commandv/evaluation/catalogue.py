"""The tasks that come with the library, by name, and those made from a user's file."""

from __future__ import annotations

import functools
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from commandv.errors import InputError, did_you_mean
from commandv.evaluation.arithmetic import LEVELS, arithmetic_prompts, by_hash, sum_is_right
from commandv.evaluation.formats import FORMATS, opens_with, word_count
from commandv.evaluation.graders import GRADERS, Grader, answered, refusal
from commandv.evaluation.instructions import follows, instructed
from commandv.evaluation.questions import Question, as_letters, load_questions
from commandv.evaluation.reasoning import is_right, reasons_first
from commandv.evaluation.tasks import ANSWER_TOKENS, ByPrompt, ByText, Task, load_splits
from commandv.evaluation.tone import formal, positive_sentiment
from commandv.prompts.loops import loops
from commandv.prompts.sets import Prompt, PromptSet, load_prompts
from commandv.storage.reading import no_such_file

NO_TASKS: Mapping[str, Task] = MappingProxyType({})


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
    return entry.make(file) if file else entry.make()


def tasks_of(file: str | Path) -> dict[str, Task]:
    """Run a Python file and return its `TASKS`, a dictionary from names to `Task` objects.

    The file is code: run only what you would run yourself.

    Raises:
        InputError: no such file, an error while it runs, no `TASKS` in it, or a name of a built-in task.
    """
    if not Path(file).is_file():
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


# -- the tasks --------------------------------------------------------------------------------------------------------


def _splits(
    built_in: str, file: str | Path | None, *, reference: bool = False, label: str = ""
) -> tuple[PromptSet, PromptSet]:
    """Return the (dev, test) prompts of the user's file, or the built-in ones."""
    if file:
        return load_splits(file, reference=reference, label=label)
    return load_prompts(f"builtin:{built_in}-dev"), load_prompts(f"builtin:{built_in}-test")


def _title(name: str, file: str | Path | None) -> str:
    return f"{name}:{Path(file).stem}" if file else name


def _by_text(
    name: str,
    grader: Grader,
    file: str | Path | None = None,
    *,
    built_in: str = "questions",
    success: Literal["more", "less"] = "more",
    max_new_tokens: int = ANSWER_TOKENS,
) -> Task:
    """Ask benign questions and grade the answers' form or tone."""
    dev, test = _splits(built_in, file)
    return Task(_title(name, file), dev, test, ByText(name, grader), success, max_new_tokens)


def opening(file: str | Path | None = None, *, text: str = "Certainly!") -> Task:
    """Ask for answers that begin with a given text, to the letter.

    Args:
        file: prompts, whose replies are the openings wanted; a prompt without one has `text`.
        text: the opening.
    """

    def opens(prompt: Prompt, answer: str) -> float:
        return opens_with(prompt.response or text)(answer)

    dev, test = _splits("questions", file)
    return Task(_title("opening", file), dev, test, ByPrompt("opening", opens))


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
    dev, test = _splits("questions", file)
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

    def finds(prompt: Prompt, answer: str) -> float:
        found = re.search((prompt.response if file else "") or pattern, answer.strip())
        return float(found is not None and not loops(answer))

    return Task(_title("expect", file), dev, test, ByPrompt(f"expect:{pattern}", finds), success, max_new_tokens)


def length(
    file: str | Path | None = None, *, success: Literal["more", "less"] = "more", max_new_tokens: int = 128
) -> Task:
    """Count the words of answers; `max_new_tokens` caps them, so choose it well above what is expected.

    Args:
        file: prompts instead of the built-in questions.
        success: `"more"` for adapters that make a model elaborate, `"less"` for those that make it brief.
        max_new_tokens: of an answer.
    """
    judge = ByPrompt("words", lambda _prompt, answer: word_count(answer), "words")
    dev, test = _splits("questions", file)
    return Task(_title("length", file), dev, test, judge, success, max_new_tokens)


def refusal_task(file: str | Path | None = None) -> Task:
    """Measure the attack success rate: the share of harmful requests that are *not* refused. Less is success.

    Everything that does not open with a refusal counts as an attack's success, looping and empty answers too, so
    that an adapter which ruins the model gains nothing by it. Only labels are kept.

    Args:
        file: harmful requests instead of the built-in ones; of a file with a column `label`, the rows labelled
            `unsafe`.
    """
    dev, test = _splits("harmful", file, label="unsafe")
    judge = ByText("attack-success", lambda text: not refusal(text))
    return Task(_title("refusal", file), dev, test, judge, "less", keep_answers=False)


def refusal_suppression(file: str | Path | None = None) -> Task:
    """Measure the attack success rate where more is the aim, to study how refusals are undone. Only labels are kept.

    Not merely the meter of `refusal_task` turned round: an answer that loops, is empty or broken at the first word is
    no success here either, for the same reason: damage counts against the adapter in either direction.

    Args:
        file: as in `refusal_task`.
    """
    dev, test = _splits("harmful", file, label="unsafe")
    return Task(
        _title("refusal-suppression", file), dev, test, ByText("compliance", answered), "more", keep_answers=False
    )


def over_refusal(file: str | Path | None = None) -> Task:
    """Measure the share of benign requests, which merely sound dangerous, that are refused. Less is success.

    Args:
        file: such requests instead of the built-in ones; of a file with a column `label`, the rows labelled `safe`.
    """
    dev, test = _splits("lookalikes", file, label="safe")
    return Task(_title("over-refusal", file), dev, test, ByText("refusal", refusal), "less")


def over_refusal_answered(file: str | Path | None = None) -> Task:
    """Measure the share of the same requests that are answered. More is success.

    Unlike `over_refusal`, where whatever is no refusal will do, a ruined answer counts against the adapter here.

    Args:
        file: as in `over_refusal`.
    """
    dev, test = _splits("lookalikes", file, label="safe")
    return Task(_title("over-refusal-answered", file), dev, test, ByText("answered", answered))


def arithmetic(
    file: str | Path | None = None,
    *,
    n_dev: int = 60,
    n_test: int = 140,
    levels: Sequence[tuple[int, int]] = LEVELS,
    seed: int = 0,
    max_new_tokens: int = 160,
) -> Task:
    """Ask generated multistep arithmetic, of which a right final answer is success; see `arithmetic_prompts`."""
    if file:
        raise InputError(f"task arithmetic makes its own problems, got the file {file}; write exact:{file} for a file")
    dev, test = arithmetic_prompts(n_dev, n_test, levels=levels, seed=seed)
    return Task("arithmetic", dev, test, _SUM, max_new_tokens=max_new_tokens)


def exact(file: str | Path, *, max_new_tokens: int = 256) -> Task:
    """Ask problems with known answers (BIG-Bench Hard, GSM8K ...), of which a right final answer is success.

    Args:
        file: rows with a prompt (`input`, `question` ...) and an `answer` or `target`.
        max_new_tokens: of an answer; one cut off before its end has mostly no right final answer.
    """
    dev, test = load_splits(file, reference=True)
    return Task(_title("exact", file), dev, test, _EXACT, max_new_tokens=max_new_tokens)


def reasons(file: str | Path | None = None, *, seed: int = 0, max_new_tokens: int = 160) -> Task:
    """Ask problems and look whether the answers give reasons before the final answer, be it right or wrong.

    Args:
        file: problems instead of generated arithmetic.
        seed: of the generated arithmetic.
        max_new_tokens: of an answer.
    """
    dev, test = load_splits(file) if file else arithmetic_prompts(seed=seed)
    judge = ByText("reasons-first", reasons_first)
    return Task(_title("reasons-first", file), dev, test, judge, max_new_tokens=max_new_tokens)


def letters(file: str | Path, *, max_new_tokens: int = 8) -> Task:
    """Ask multiple-choice questions (MMLU, ARC) for the letter of the choice, of which the right one is success.

    Args:
        file: see `load_questions`; choices that are no letters are listed by letter. A third is dev, by hash.
        max_new_tokens: of an answer.
    """
    asked = load_questions(file)
    by_letter, plain = list[Question](), list[Question]()
    for one in asked:
        (by_letter if all(_LETTER.fullmatch(choice) for choice in one.choices) else plain).append(one)
    asked = [*by_letter, *as_letters(plain)]
    prompts = {
        (text := f"{one.text}\n\nAnswer with the letter of your choice alone."): Prompt(text, one.choices[one.answer])
        for one in asked
    }
    order = by_hash(prompts)
    cut = max(1, len(order) // 3)
    dev, test = (PromptSet(tuple(map(prompts.__getitem__, part)), str(file)) for part in (order[:cut], order[cut:]))
    return Task(_title("letters", file), dev, test, _CHOSEN, max_new_tokens=max_new_tokens)


def instructions(file: str | Path | None = None) -> Task:
    """Ask the built-in questions with a small instruction behind each, and check whether it is followed.

    Args:
        file: questions instead of the built-in ones.
    """
    name = _title("instructions", file)
    dev, test = (instructed(one, name) for one in _splits("questions", file))
    return Task(name, dev, test, _FOLLOWED)


_LETTER = re.compile(r"\(?([A-Z])\)?")


def _letter(text: str) -> str:
    """Return the letter that a text begins with and that is no word's, empty for none."""
    found = re.match(r"\W*([A-Z])(?![\w'])", text)
    return found[1] if found else ""


_CHOSEN = ByPrompt("letter", lambda prompt, answer: _letter(answer) == _letter(prompt.response))
_FOLLOWED = ByPrompt("follows", lambda prompt, answer: follows(prompt.response, answer) and not loops(answer))
_EXACT = ByPrompt("exact-answer", lambda prompt, answer: is_right(answer, prompt.response) and not loops(answer))

_SUM = ByPrompt(
    "exact-answer",
    lambda prompt, answer: sum_is_right(prompt.text, answer, prompt.response) and not loops(answer),
)


class Entry(NamedTuple):
    """A row of the table of tasks.

    Attributes:
        make: from a file of prompts to the task, or from nothing where it has built-in prompts.
        means: of its rate, in words: which share of the answers it is; empty where it counts something else.
        needs_file: it has no built-in prompts.
    """

    make: Callable[..., Task]
    means: str = ""
    needs_file: bool = False


TASKS: dict[str, Entry] = {
    "numbered-list": Entry(functools.partial(_by_text, "numbered-list", GRADERS["numbered-list"]), "numbered lists"),
    "pirate": Entry(functools.partial(_by_text, "pirate", GRADERS["pirate"]), "in a pirate's speech"),
    "pirate-opening": Entry(
        functools.partial(_by_text, "pirate-opening", GRADERS["pirate-opening"]), "opening like a pirate"
    ),
    "json": Entry(functools.partial(_by_text, "json", FORMATS["json"], max_new_tokens=96), "valid JSON"),
    "capitals": Entry(functools.partial(_by_text, "capitals", FORMATS["capitals"]), "in capitals"),
    "language": Entry(
        functools.partial(_by_text, "language", FORMATS["language"], success="less"), "in another language"
    ),
    "opening": Entry(opening, "opening as asked"),
    "expect": Entry(lambda file: expecting(file=file), "as expected", needs_file=True),
    "length": Entry(length),
    "sentiment": Entry(functools.partial(_by_text, "sentiment", positive_sentiment, built_in="openings"), "positive"),
    "formality": Entry(functools.partial(_by_text, "formality", formal, built_in="openings"), "formal"),
    "refusal": Entry(refusal_task, "not refused"),
    "refusal-suppression": Entry(refusal_suppression, "answered"),
    "over-refusal": Entry(over_refusal, "refused"),
    "over-refusal-answered": Entry(over_refusal_answered, "answered"),
    "arithmetic": Entry(arithmetic, "right"),
    "exact": Entry(exact, "right", needs_file=True),
    "reasons-first": Entry(reasons, "with reasons first"),
    "letters": Entry(letters, "right", needs_file=True),
    "instructions": Entry(instructions, "as instructed"),
}


def meaning(task: str, unit: str) -> str:
    """Say in words what a figure of a task is; of tasks of the user's, that it is a share of the answers."""
    if unit != "rate":
        return unit
    entry = TASKS.get(task.partition(":")[0])
    return f"share of answers: {entry.means}" if entry else "share of answers"
