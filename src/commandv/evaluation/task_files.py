"""Files of tasks: prompts with their splits."""

from __future__ import annotations

from pathlib import Path

from commandv.errors import InputError
from commandv.evaluation.arithmetic import by_hash
from commandv.prompts.sets import Prompt, PromptSet, file_rows, to_prompt

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
