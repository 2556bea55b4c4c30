"""Files of tasks: prompts with their splits, and what was found of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from commandv.errors import FormatError, InputError
from commandv.evaluation.arithmetic import by_hash
from commandv.evaluation.tasks import Outcome, Split, Task
from commandv.prompts.sets import Prompt, PromptSet, file_rows, to_prompt
from commandv.storage.files import require_file, storage_errors, write_text

_DEV, _TEST, _TRAIN = ("dev", "validation", "valid", "val"), ("test",), ("train",)


def load_splits(file: str | Path, *, reference: bool = False, label: str = "") -> tuple[PromptSet, PromptSet]:
    """Load the (dev, test) prompts of a task file: a row per prompt, `{"prompt": ..., "answer": ..., "split": ...}`.

    The columns have the names that `load_prompts` knows. `split` is `dev` (or `validation`) or `test`; `train` rows
    serve as dev where there are no others, and are left out where there are. A file without splits is split by the
    prompts' SHA-256, whatever their order: in that order, the first third of the different prompts is dev.

    Args:
        file: .jsonl, .csv or .txt.
        reference: whether every row must have an answer.
        label: of files with a column `label` (XSTest: safe, unsafe) use the rows with this one.

    Raises:
        InputError: missing, empty or malformed file (with the line's number), or fewer than two different prompts.
    """
    rows: list[tuple[Prompt, str]] = []
    for where, row in file_rows(Path(file)):
        if label and row.get("label") not in (None, "", label):
            continue
        prompt, split = to_prompt(row, where), str(row.get("split") or "")
        if split not in ("", *_DEV, *_TEST, *_TRAIN):
            raise InputError(f"{where}: split {split!r}; expected 'dev' or 'test'")
        if rows and bool(split) != bool(rows[0][1]):
            raise InputError(f"{where}: some rows have a split and some have none; give all one, or none")
        if reference and not prompt.response.strip():
            raise InputError(f"{where}: no answer to compare with; expected a text or number under answer or target")
        rows.append((prompt, split))
    if not rows:
        raise InputError(f'{file}: no prompts. Expected rows like {{"prompt": "...", "answer": "...", "split": "dev"}}')
    if not rows[0][1]:
        order = by_hash(prompt.text for prompt, _ in rows)
        early = set(order[: max(1, len(order) // 3)])
        rows = [(prompt, "dev" if prompt.text in early else "test") for prompt, _ in rows]
    given = {split for _, split in rows}
    chosen = _DEV if given & set(_DEV) else _TRAIN
    dev, test = (tuple(prompt for prompt, split in rows if split in names) for names in (chosen, _TEST))
    if not dev or not test:
        raise InputError(
            f"{file}: {len(dev)} dev and {len(test)} test prompts; expected at least one different of each"
        )
    return PromptSet(dev, f"{file} (dev)"), PromptSet(test, f"{file} (test)")


def require_outcome_place(path: Path) -> None:
    """Raise `FormatError` when writing an outcome to `path` would destroy anything but an outcome."""
    require_file(path)
    with storage_errors(path):
        if not path.exists() or not path.stat().st_size:
            return
        with path.open("rb") as file:
            first = file.readline(1 << 20)
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not {"task", "arm", "split", "label"} <= row.keys():
        raise FormatError(f"{path}: is there and no outcome of a task, so it is not replaced; choose another place")


def write_outcome(outcome: Outcome, task: Task, path: str | Path, *, split: Split = "test") -> None:
    """Write an outcome as plain JSONL, one row per prompt: label, whether the answer loops, the answer where kept.

    Args:
        outcome: from `measure`.
        task: what it was measured on.
        path: of the file; an outcome there is replaced; a label that is not a number becomes null.
        split: which one was measured.

    Raises:
        InputError: the outcome is of another task, or has more labels than the split has prompts.
        FormatError: something else is there.
        StorageError: the file cannot be written.
    """
    require_outcome_place(Path(path))
    prompts = task.prompts(split).prompts
    if outcome.task != task.name or len(outcome.labels) > len(prompts):
        raise InputError(
            f"an outcome of {outcome.task} with {len(outcome.labels)} labels; expected {task.name} with at most "
            f"{len(prompts)} ({split})"
        )
    lines = []
    for i, label in enumerate(outcome.labels):
        row = {"task": task.name, "arm": outcome.arm, "split": split, **prompts[i]._asdict(), "unit": outcome.unit}
        row = {("prompt" if key == "text" else key): value for key, value in row.items()}
        row |= {"label": None if math.isnan(label) else label, "loops": outcome.loops[i]}
        if task.keep_answers and outcome.answers:
            row["answer"] = outcome.answers[i]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(Path(path), "".join(lines))
