"""Judgments of costly judges: kept as they come, so that no answer is asked about twice."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from commandv.arguments import checked
from commandv.errors import FormatError, JudgeError, StorageError
from commandv.prompts.sets import Prompt
from commandv.storage.files import cache_dir, digest, storage_errors

log = logging.getLogger(__name__)


class Judgment(NamedTuple):
    """What a judge said about one answer.

    Attributes:
        place: index of the answer.
        label: NaN where what the judge said is none of its words.
        word: the judge's word, one of those that it is configured with, or empty.
    """

    place: int
    label: float
    word: str = ""


class CostlyJudge(Protocol):
    """A judge whose judgments are worth keeping."""

    @property
    def name(self) -> str:
        """For tables and caches."""

    @property
    def unit(self) -> str:
        """Of the labels."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a label depends on besides prompt and answer; JSON-serialisable, no secrets."""

    def judgments(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Iterator[list[Judgment]]:
        """Yield judgments in portions as they come, in any order.

        Raises:
            JudgeError: the judge gives up.
        """

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return a label per answer, NaN where there is no judgment, and keep nothing.

        Raises:
            JudgeError: the judge gives up.
            ModelError: the judge's model cannot be loaded, or does not take an exchange.
            InputError: the judge's model has no such label, or no chat template.
        """
        found: dict[int, float] = {}
        try:
            for portion in self.judgments(prompts, answers):
                found.update((judgment.place, judgment.label) for judgment in portion)
        except JudgeError as error:
            raise JudgeError(
                f"{error}. {len(found)} of {len(answers)} answers were judged; Cached(judge) would have kept them",
                judged=len(found),
            ) from error
        return _reported(self.name, [found[i] for i in range(len(answers))])


@checked
@dataclass(frozen=True)
class Cached:
    """A costly judge that is asked once per answer, over all runs.

    A file per judge and settings holds a hash of (settings, prompt, answer), the label and the judge's word; never the
    prompt or the answer, which may be harmful. Each portion is committed as it comes: after an error or a kill the
    next run goes on from there, and several processes may share the folder.

    Attributes:
        judge: whom to ask.
        folder: where the files are. Default: `judgments` in the cache directory.
    """

    judge: CostlyJudge
    folder: Path | None = None

    @property
    def name(self) -> str:
        """The judge's name."""
        return self.judge.name

    @property
    def unit(self) -> str:
        """Of the labels."""
        return self.judge.unit

    @property
    def file(self) -> Path:
        """Where the judgments are kept."""
        slug = re.sub(r"[^\w.-]+", "-", self.name)[-60:]
        return (self.folder or cache_dir() / "judgments") / f"{slug}-{digest(self.judge.settings)}.sqlite3"

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return one label per answer; only answers without a kept judgment reach the judge.

        Raises:
            JudgeError: the judge gives up; what it said so far is kept.
            FormatError: the file is damaged.
            StorageError: the file cannot be written.
        """
        settings, file = digest(self.judge.settings), self.file
        keys = [
            digest(settings, prompt.text, prompt.response, answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        with _opened(file) as database:
            known = _read(database, keys)
            first: dict[str, int] = {}  # equal answers are asked about once
            for i, key in enumerate(keys):
                if key not in known:
                    first.setdefault(key, i)
            missing = list(first.values())
            try:
                portions = self.judge.judgments([prompts[i] for i in missing], [answers[i] for i in missing])
                for portion in portions if missing else ():
                    rows = {keys[missing[place]]: (label, word) for place, label, word in portion}
                    _write(database, rows)
                    known.update((key, label) for key, (label, _) in rows.items())
            except JudgeError as error:
                done = sum(key in known for key in keys)
                raise JudgeError(
                    f"{error}. {done} of {len(keys)} answers are judged and kept ({file}); "
                    "run the same command again to go on from there",
                    judged=done,
                ) from error
        return _reported(self.name, [known[key] for key in keys])


def by_word(place: int, reply: str, labels: Mapping[str, float]) -> Judgment:
    """Return what the first word of a reply says; another word is not kept: it may be the judged text's."""
    found = re.match(r"\W*([\w-]+)", reply)
    word = found[1].lower() if found else ""
    known = {one.lower(): float(label) for one, label in labels.items()}
    return Judgment(place, known[word], word) if word in known else Judgment(place, math.nan)


def _reported(name: str, found: list[float]) -> list[float]:
    """Return the labels after saying how many answers are without one."""
    if nothing := sum(map(math.isnan, found)):
        log.warning("judge %s: no judgment on %d of %d answers; they are left out", name, nothing, len(found))
    return found


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Another process may be writing: wait for it. isolation_level=None: each statement is its own transaction.
        with contextlib.closing(sqlite3.connect(file, timeout=60, isolation_level=None)) as database:
            database.execute("CREATE TABLE IF NOT EXISTS judgments (key TEXT PRIMARY KEY, label REAL, word TEXT)")
            columns = [name for _, name, *_ in database.execute("PRAGMA table_info(judgments)")]
            if columns != ["key", "label", "word"]:
                raise sqlite3.DatabaseError(f"its columns are {columns}, expected key, label and word")
            yield database
    except sqlite3.OperationalError as error:  # no space, no permission, locked for a minute
        raise StorageError(f"cannot use {file}: {error}. Free some space or set another cache directory") from error
    except sqlite3.DatabaseError as error:
        raise FormatError(
            f"{file}: not a file of judgments ({error}). Remove it; the answers are judged again"
        ) from error


def _read(database: sqlite3.Connection, keys: Iterable[str]) -> dict[str, float]:
    found = {}
    for key in keys:
        row = database.execute("SELECT label FROM judgments WHERE key = ?", (key,)).fetchone()
        if row and not isinstance(row[0], (float, int, type(None))):
            raise sqlite3.DatabaseError(f"a label is {type(row[0]).__name__}, expected a number")
        if row:
            found[key] = math.nan if row[0] is None else row[0]  # SQLite stores NaN as NULL
    return found


def _write(database: sqlite3.Connection, rows: dict[str, tuple[float, str]]) -> None:
    values = [(key, label, word) for key, (label, word) in rows.items()]
    database.execute("BEGIN IMMEDIATE")
    try:
        database.executemany("INSERT OR REPLACE INTO judgments VALUES (?, ?, ?)", values)
        database.execute("COMMIT")
    except BaseException:
        database.rollback()
        raise
