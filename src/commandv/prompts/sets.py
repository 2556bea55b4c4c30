"""Prompt sets: the built-in ones, text, CSV and JSONL files, datasets from the Hugging Face hub."""

from __future__ import annotations

import csv
import functools
import importlib.resources
import io
import operator
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from commandv.arguments import checked
from commandv.errors import InputError, did_you_mean, require_positive
from commandv.storage.files import digest
from commandv.storage.reading import first_line, no_such_file, parse_json, read_text

PROMPT_COLUMNS = ("prompt", "instruction", "question", "text", "conversations", "input", "goal")
FOLDERS = ("prompts", "behaviours", "contrasts")  # of data/; contrasts are for `load_contrast`
SHORT = {"lima": "GAIR/lima"}  # of hub datasets
FILES = (".txt", ".csv", ".jsonl")
RESPONSE_COLUMNS = ("expect", "response", "output", "answer", "target", "completion")


def is_text(value: object) -> bool:
    """Tell whether a value is a text that a file can hold: a string without half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def require_text(text: str) -> None:
    """Raise `InputError` for what is no text that a tokenizer can read."""
    if not is_text(text):
        raise InputError("a text holds half of a surrogate pair, which no tokenizer can read; decode it again")


class Prompt(NamedTuple):
    """One user turn, with the reply to it where the set has one."""

    text: str
    response: str = ""
    category: str = ""


@checked
@dataclass(frozen=True)
class PromptSet:
    """An immutable sequence of prompts with a content hash.

    Attributes:
        prompts: the prompts in file order.
        name: where they come from, for messages and provenance.
    """

    prompts: tuple[Prompt, ...]
    name: str = "prompts"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError(f"{self.name}: no prompts. Expected at least one non-empty prompt.")
        for number, prompt in enumerate(self.prompts, start=1):
            if not prompt.text.strip():
                raise InputError(f"{self.name}: prompt {number} is empty. Remove it or give it a text.")
            if not (is_text(prompt.text) and is_text(prompt.response)):
                raise InputError(
                    f"{self.name}: prompt {number} or its reply holds half of a surrogate pair, which is no text; "
                    "decode it again from where it comes from"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __getitem__(self, index: slice) -> PromptSet:
        return PromptSet(self.prompts[index], self.name)

    def __add__(self, other: PromptSet) -> PromptSet:
        return PromptSet(self.prompts + other.prompts, f"{self.name} + {other.name}")

    @property
    def texts(self) -> list[str]:
        """The user turns as plain strings."""
        return [prompt.text for prompt in self.prompts]

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal characters that depend on every prompt and reply and on their order."""
        return digest([(prompt.text, prompt.response) for prompt in self.prompts])


def require_replies(examples: PromptSet) -> None:
    """Raise `InputError` for examples of which one has no response."""
    missing = [number for number, one in enumerate(examples, start=1) if not one.response.strip()]
    if missing:
        raise InputError(
            f"{examples.name}: example {missing[0]} has no response; training needs prompt and response: .jsonl lines "
            "{prompt, response}, or a .csv with these columns"
        )


def as_prompts(prompts: PromptSet | Sequence[str]) -> PromptSet:
    """Return `prompts` as a `PromptSet`; a sequence of strings becomes a set without replies."""
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, str):
        raise InputError("got one string where a list of prompts was expected; write [prompt]")
    texts = tuple(prompts)  # which may be read once only
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise InputError(f"prompt {number} is a {type(text).__name__}; expected a string")
    return PromptSet(tuple(map(Prompt, texts)))


@checked
def mixed_forms(prompts: PromptSet) -> PromptSet:
    """Return the prompts in three forms by turns: as they are, without the mark at the end, and so in lower case.

    What a model holds at the last prompt token depends on the mark before it, and converters carry only what varies in
    their rows. Built-in prompts are neatly written; people's and benchmarks' often are not. Use these for profiles that
    carry what is read at last prompt tokens.
    """

    def form(number: int, one: Prompt) -> Prompt:
        bare = one.text.rstrip().rstrip(".?!") or one.text
        return one._replace(text=(one.text, bare, bare.lower())[number % 3])

    return PromptSet(tuple(form(*item) for item in enumerate(prompts)), f"{prompts.name} in mixed forms")


def load_prompt_sets(sources: Sequence[str], *, limit: int | None = None) -> PromptSet:
    """Load one or more prompt sets, of each the first `limit`, and join them in their order; see `load_prompts`."""
    return functools.reduce(operator.add, (load_prompts(one, limit=limit) for one in sources))


@checked
def load_prompts(source: str | Path, *, column: str | None = None, limit: int | None = None) -> PromptSet:
    """Load a prompt set.

    Args:
        source: `builtin:NAME`, see `builtin_names`; a .txt file (one prompt a line), .csv or .jsonl file; or a
            hub dataset id, optionally with a split (`GAIR/lima`, `tatsu-lab/alpaca:train`), which needs the `datasets`
            package. `lima` is short for `GAIR/lima`.
        column: the column that holds the prompt; found among the usual names when not given.
        limit: keep the first so many prompts.

    Raises:
        InputError: unknown name, missing file, malformed row (with its line number), no prompts, or a limit below 1.
    """
    source = str(source)
    require_positive(limit=limit)
    require_source(source)
    here = source.startswith("builtin:") or os.path.isfile(source)
    prompts = []
    for where, row in file_rows(source) if here else _hub_rows(source):
        prompts.append(to_prompt(row, where, column))
        if limit is not None and len(prompts) >= limit:
            break
    return PromptSet(tuple(prompts), source)


def require_source(source: str) -> None:
    """Raise `InputError` where there can be no such prompt set: no built-in one, no file, no name of a hub dataset."""
    if source.startswith("builtin:"):
        _require_builtin(source.removeprefix("builtin:"))
    elif os.path.isfile(source) or source.partition(":")[0].lower() in SHORT:
        return
    elif "/" not in source and Path(source).suffix not in FILES:
        near = did_you_mean(f"builtin:{source}", [f"builtin:{one}" for one in builtin_names()])
        raise InputError(
            f"{source}: no such file{near}; expected builtin:NAME, a .txt, .csv or .jsonl file, or a hub dataset "
            "(OWNER/NAME)"
        )
    elif Path(source).suffix in FILES or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise InputError(f"{source}: {no_such_file(Path(source))}")


def _require_builtin(name: str) -> None:
    known = builtin_names()
    if name not in known:
        near = did_you_mean(name, known)
        raise InputError(f"builtin:{name}: no such built-in prompt set{near}; there are {', '.join(known)}")


@functools.cache
def _builtin_files() -> dict[str, list[str]]:
    """Return the files of each built-in set: `NAME.jsonl`, or its parts `NAME-1.jsonl`, `NAME-2.jsonl` ..."""
    data, found = importlib.resources.files("commandv.prompts") / "data", defaultdict[str, list[str]](list)
    for folder in FOLDERS:
        for file in sorted(one.name for one in (data / folder).iterdir() if one.name.endswith(".jsonl")):
            found[re.sub(r"(-\d+)?\.jsonl$", "", file)].append(f"{folder}/{file}")
    return found


def builtin_names(*folders: str) -> list[str]:
    """Return the names of what comes with the library in these of `FOLDERS`; in all when none is given."""
    wanted = folders or FOLDERS
    return sorted(name for name, files in _builtin_files().items() if files[0].split("/")[0] in wanted)


def _builtin_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    _require_builtin(name)
    for file in _builtin_files()[name]:
        text = (importlib.resources.files("commandv.prompts") / "data" / file).read_text("utf-8")
        yield from _jsonl_rows(text, file)


def file_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line number, row) of a .txt, .csv or .jsonl file, or of a built-in set, `builtin:NAME`."""
    if str(source).startswith("builtin:"):
        yield from _builtin_rows(str(source).removeprefix("builtin:"))
        return
    path = Path(source)
    kind = path.suffix.lower()
    if os.path.isfile(path) and kind not in FILES:  # a line of a .json or .tsv file would become a prompt
        raise InputError(f"{path}: a file of type {path.suffix!r}, expected {', '.join(FILES)}; convert or rename it")
    text = read_text(path, error=InputError)
    if kind == ".jsonl":
        yield from _jsonl_rows(text, str(path))
    elif kind == ".csv":
        yield from _csv_rows(text, str(path))
    else:
        for number, line in enumerate(re.split(r"\r\n?|\n", text), start=1):
            if line.strip():
                yield f"{path}, line {number}", {"prompt": line.strip()}


def _csv_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or ())
        if len(set(columns)) < len(columns):
            raise InputError(f"{name}: two columns of one name among {', '.join(columns)}; rename one")
        for row in reader:
            where = f"{name}, line {reader.line_num}"  # of a row over several lines the last one
            if None in row:
                raise InputError(f"{where}: more fields than the {len(columns)} columns; quote texts that hold commas")
            yield where, row
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.reader.line_num}: not valid CSV ({error})") from error


def _jsonl_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would split at U+2028 within a prompt
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        row = parse_json(line, where, error=InputError)
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with a prompt, got {type(row).__name__}")
        yield where, row


def _hub_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    name, _, split = source.partition(":")
    name = SHORT.get(name.lower(), name)
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{source}: not a file, and reading it from the hub needs the datasets package: pip install 'commandv[hub]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the package raises whatever its parts do, for names that are none, too
        reason = first_line(error)
        raise InputError(f"{source}: neither a file nor a hub dataset that can be loaded: {reason}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row


def to_prompt(row: dict[str, Any], where: str, column: str | None = None) -> Prompt:
    """Make a prompt of a row, by the usual names of columns; a number for a reply becomes its text."""
    wanted = (column,) if column else PROMPT_COLUMNS
    key = next((name for name in wanted if name in row), None)
    if key is None:
        raise InputError(f"{where}: no column {' / '.join(wanted)}; the row has {', '.join(map(str, row))}")
    value = row[key]
    response = next((row[name] for name in RESPONSE_COLUMNS if row.get(name) not in (None, "", [])), "")
    if key == "instruction" and isinstance(value, str) and isinstance(row.get("input"), str) and row["input"].strip():
        value = f"{value}\n\n{row['input']}"  # Alpaca keeps what an instruction is about beside it
    if isinstance(value, list) and value:  # LIMA keeps a conversation as a list of turns
        value, response = value[0], value[1] if len(value) > 1 else ""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: the prompt ({key}) is empty or not a text")
    if isinstance(response, (int, float)) and not isinstance(response, bool):
        response = str(response)
    if not isinstance(response, str):
        raise InputError(f"{where}: the response is {type(response).__name__}, expected a text")
    return Prompt(value, response, str(row.get("category") or ""))
