"""Running texts through a model and keeping every block's output at chosen tokens, part by part."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from commandv.errors import FormatError, InputError, require_positive
from commandv.models.encoding import Batch, Encoded, encode, pad, run_blocks
from commandv.models.generation import batches
from commandv.models.live import reading
from commandv.models.lm import LM
from commandv.models.prefix import NOT_SHARED, Prefix, shared_prefix
from commandv.models.state import identity
from commandv.profiles.profile import END, Places
from commandv.progress import Report
from commandv.prompts.sets import Prompt, PromptSet, as_prompts, load_prompts
from commandv.storage.files import digest


@dataclass(frozen=True)
class Wanted:
    """What to run and which rows to keep; see `profile`."""

    items: tuple[Prompt, ...]  # prompts, then passages
    n_end: int  # how many of them are prompts
    places: Places  # of text rows
    rows_per_text: int  # most text rows of a passage
    batch_size: int  # sequences per forward pass
    max_length: int | None  # longer prompts are cut at their beginning
    padding: Literal["left", "right"]  # side
    hash: str  # of the texts and of what decides the places in them
    sets: tuple[dict[str, Any], ...] = ()  # the sets of prompts that they come from: name, number and hash

    @property
    def batches(self) -> int:
        """Forward passes that it takes."""
        return -(-len(self.items) // self.batch_size)

    @classmethod
    def of(
        cls,
        prompts: PromptSet | Sequence[str],
        text: PromptSet | Sequence[str] | str | None,
        *,
        places: Places = "lines",
        rows_per_text: int = 24,
        batch_size: int = 16,
        max_length: int | None = None,
        padding: Literal["left", "right"] = "right",
    ) -> Wanted:
        """Put prompts and passages together, the latter or where `load_prompts` finds them."""
        ends = as_prompts(prompts)
        text = load_prompts(text) if isinstance(text, str) else None if text is None else as_prompts(text)
        if padding not in ("left", "right") or places not in get_args(Places) or rows_per_text < 1:
            raise InputError(
                f"padding={padding!r}, places={places!r}, rows_per_text={rows_per_text}: expected 'left' or 'right', "
                f"one of {get_args(Places)}, and 1 or more"
            )
        require_positive(batch_size=batch_size)
        used = [ends] if text is None else [ends, text]
        hashes = [one.hash for one in used]
        hashed = digest(hashes, [places, rows_per_text] if text is not None else [])
        items = (*ends, *(text or ()))
        sets = tuple({"name": one.name, "n": len(one), "hash": one.hash} for one in used)
        return cls(items, len(ends), places, rows_per_text, batch_size, max_length, padding, hashed, sets)


class Work:
    """One model's share of a profile: the texts as its tokens, in parts that are run one by one.

    Attributes:
        lm: the model.
        parts: of every part its batches, of every batch the numbers of its texts.
    """

    BATCHES = 8  # of one part at most
    BYTES = 1 << 26  # of one part's rows at most, unless one batch has more

    def __init__(self, lm: LM, wanted: Wanted) -> None:
        self.lm = lm
        self.padding: Literal["left", "right"] = "right" if lm.recurrent else wanted.padding
        self._encoded: list[Encoded] = []
        self._wanted: list[list[tuple[int, int]]] = []  # per item: (token index, offset key)
        for number, item in enumerate(wanted.items):
            is_text = number >= wanted.n_end
            encoded = encode(lm, item.text, item.response if is_text else "", max_length=wanted.max_length)
            places = [(encoded.n_prompt - 1, END)]
            if is_text:
                text = item.response or item.text.strip()
                places += _shared_places(encoded, text, wanted.places, wanted.rows_per_text)
            # Nothing after the last wanted token can change what is wanted.
            last = max((index for index, _ in places), default=0)
            self._encoded.append(encoded._replace(ids=encoded.ids[: last + 1]))
            self._wanted.append(places)
        self.parts = self._grouped(wanted.batch_size)

    def __len__(self) -> int:
        return len(self._encoded)

    def _grouped(self, batch_size: int) -> list[list[list[int]]]:
        """Put batches of texts of like length together, as many as a part may have."""
        row = 2 * self.lm.n_layers * self.lm.d_model
        parts: list[list[list[int]]] = []
        size = 0
        for batch in batches([len(one.ids) for one in self._encoded], batch_size):
            own = row * sum(len(self._wanted[item]) for item in batch)
            if not parts or len(parts[-1]) == self.BATCHES or size + own > self.BYTES:
                parts.append([])
                size = 0
            parts[-1].append(batch)
            size += own
        return parts

    @property
    def members(self) -> list[list[int]]:
        """The numbers of each part's texts."""
        return [[item for batch in part for item in batch] for part in self.parts]

    @functools.cached_property
    def key(self) -> str:
        """What the model is when this is first asked."""
        return identity(self.lm).key

    @functools.cached_property
    def prefix(self) -> Prefix:
        """What all sequences begin with, before the first row that is wanted."""
        stops = [1 + min((index for index, _ in wanted), default=0) for wanted in self._wanted]
        return shared_prefix(self.lm, [one.ids for one in self._encoded], stops)

    def run(self, number: int, report: Report, split: int = 1) -> dict[str, Tensor]:
        """Run a part: `layer.N` [rows, d_model] in bfloat16 for every layer, and `keys` [rows, 2].

        `report` is told of every text that is done; each batch is run in `split` passes.

        Raises:
            FormatError: an activation that is not finite, with its layer and prompt.
        """
        collected: dict[int, list[Tensor]] = {layer: [] for layer in range(self.lm.n_layers)}
        keys: list[tuple[int, int]] = []
        for members in (piece for batch in self.parts[number] for piece in _pieces(batch, split)):
            batch = pad(self.lm, [self._encoded[i].ids for i in members], self.padding, shared=self.prefix.length)
            width = batch.input_ids.shape[1]
            rows, columns = [], []
            for row, item in enumerate(members):
                shift = width - len(self._encoded[item].ids) if self.padding == "left" else 0
                for index, offset in self._wanted[item]:
                    rows.append(row)
                    columns.append(index + shift)
                    keys.append((item, offset))
            if rows:
                at = (torch.tensor(rows), torch.tensor(columns))
                for layer, values in read_rows(self.lm, batch, at, self.prefix).items():
                    _require_finite(values, layer, self.lm.id, [members[row] for row in rows])
                    collected[layer].append(values)
            report(len(members))
        out = {f"layer.{layer}": _cat(collected.pop(layer), self.lm.d_model) for layer in list(collected)}
        out["keys"] = torch.tensor(keys, dtype=torch.int64).reshape(-1, 2)
        return out


def _pieces(batch: list[int], count: int) -> list[list[int]]:
    step = -(-len(batch) // count)
    return [batch[i : i + step] for i in range(0, len(batch), step)]


def _cat(rows: list[Tensor], width: int) -> Tensor:
    if len(rows) == 1:
        return rows[0]
    return torch.cat(rows) if rows else torch.zeros(0, width, dtype=torch.bfloat16)


def read_rows(lm: LM, batch: Batch, at: tuple[Tensor, Tensor], prefix: Prefix = NOT_SHARED) -> dict[int, Tensor]:
    """Run a padded batch and return every block's output at (row, column) places, bfloat16 [places, d_model].

    No place may lie in the prefix.
    """
    found: dict[int, Tensor] = {}
    rows, columns = at[0], at[1] - prefix.length

    def keep(layer: int, h: Tensor) -> None:
        found[layer] = h[rows.to(h.device), columns.to(h.device)].to(torch.bfloat16).cpu()

    readers = {layer: functools.partial(keep, layer) for layer in range(lm.n_layers)}
    with torch.inference_mode(), reading(lm, readers):
        run_blocks(lm, prefix.rest(batch), prefix.past(len(batch.input_ids)))
    return {layer: found.pop(layer).clone() for layer in list(found)}  # no inference tensors, and never two of all


def _require_finite(values: Tensor, layer: int, id: str, items: list[int]) -> None:
    finite = torch.isfinite(values).all(dim=1)
    if not finite.all():
        item = items[int((~finite).nonzero()[0])]
        raise FormatError(
            f"{id}: NaN or infinity in the output of layer {layer} for prompt {item + 1}. The weights are broken, or "
            "the dtype overflows: load the model with dtype='float32' or 'bfloat16'"
        )


def _shared_places(encoded: Encoded, text: str, places: Places, limit: int) -> list[tuple[int, int]]:
    """Return (token index, offset) at places of `text`, at most `limit`, spread evenly.

    The offsets are chosen from the text alone, before looking at this tokenizer, so that two models choose alike.
    """
    pattern = r"(?<=\n)(?=[^\n])" if places == "lines" else r"(?<=\S)(?=\s|$)"
    stops = [match.start() for match in re.finditer(pattern, text)]
    if len(stops) > limit:
        stops = [stops[i * len(stops) // limit] for i in range(limit)]
    last_token = {end: index for index, end in enumerate(encoded.text_ends) if end >= 0}
    return [(last_token[offset], offset) for offset in stops if offset in last_token]
