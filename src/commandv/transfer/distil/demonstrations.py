"""Demonstrations: a behaviour as the answers that show it, and what the adapter changes at each of their tokens.

A few megabytes of text and numbers, keyed by places in the *text*, so that any recipient can use them, whatever its
tokenizer; its owner needs nothing else of the donor.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import safetensors.torch
import torch
from torch import Tensor

from commandv.arguments import checked
from commandv.errors import FormatError, InputError
from commandv.models.identity import ModelRef
from commandv.prompts.sets import is_text
from commandv.storage.directories import read_artefact, write_artefact
from commandv.storage.files import digest
from commandv.storage.hub import opened
from commandv.storage.kinds import DEMONSTRATIONS
from commandv.storage.tensors import read_safetensors

END = ""  # the text of the token that ends an answer
MOST = 30.0  # nats; log-ratios beyond are kept as this


class Changes(NamedTuple):
    """What an adapter changes in its donor's next-token distribution, at n places of the answers."""

    places: Tensor  # (number of the prompt, characters of the answer that stand before the token to come), int64 [n, 2]
    # numbers in `Demonstrations.vocabulary` of the tokens that are likeliest with the adapter or without it, int64 [n,
    # top]
    tokens: Tensor
    ratio: Tensor  # log p(token | with the adapter) - log p(token | without), [n, top]
    log_p: Tensor  # log p(token | with the adapter), [n, top]
    rest: Tensor  # the log-ratio of all other tokens together, [n]
    divergence: Tensor  # KL(with || without) in nats, [n]


@checked
@dataclass(frozen=True, eq=False)
class Demonstrations:
    """A behaviour in words.

    Attributes:
        prompts: what was asked.
        answers: what the donor answered with its adapter, without white space at either end; none is empty or loops.
        donor: which model; unknown for answers from elsewhere.
        name: of the behaviour: the adapter's.
        vocabulary: texts of the tokens in `changes`; "" is the end of an answer.
        changes: what the adapter changes in the donor; None for texts only.
        max_new_tokens: longest answer in the donor's tokens.
        dropped: how many answers were left out, by reason.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    donor: ModelRef = ModelRef()
    name: str = "behaviour"
    vocabulary: tuple[str, ...] = ()
    changes: Changes | None = None
    max_new_tokens: int = 48
    dropped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.answers) or not self.prompts:
            raise InputError(
                f"{len(self.prompts)} prompts and {len(self.answers)} answers; expected pairs, at least one"
            )
        for number, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True), start=1):
            if not (is_text(prompt) and is_text(answer) and prompt.strip() and answer.strip()):
                raise InputError(f"demonstration {number}: expected a prompt and an answer, texts that are not empty")
        if min(self.dropped.values(), default=0) < 0 or self.max_new_tokens < 1:
            raise InputError(
                f"dropped={dict(self.dropped)}, max_new_tokens={self.max_new_tokens}: expected counts, and 1 or more"
            )
        if self.changes is not None:
            _check(self.changes, len(self.prompts), len(self.vocabulary))

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        what = "texts only" if self.changes is None else f"{len(self.changes.places)} places"
        return f"Demonstrations({self.name} of {self.donor.id or 'an unknown donor'}, {len(self)} answers, {what})"

    @property
    def mean_divergence(self) -> float | None:
        """Nats by which the adapter changes its donor's next-token distribution, on average over the places."""
        return None if self.changes is None else float(self.changes.divergence.mean())

    @property
    def loop_rate(self) -> float:
        """The share of the donor's answers that looped, and were left out."""
        return self.dropped.get("looping", 0) / (len(self) + sum(self.dropped.values()))

    @property
    def hash(self) -> str:
        """16 hexadecimal characters that depend on every prompt, answer and token text and on their order."""
        return digest(self.prompts, self.answers, self.vocabulary)


def _check(changes: Changes, n_prompts: int, n_tokens: int) -> None:
    places, tokens = changes.places, changes.tokens
    n, top = tokens.shape if tokens.ndim == 2 else (-1, -1)
    shapes = [tuple(one.shape) for one in changes]
    if shapes != [(n, 2), (n, top), (n, top), (n, top), (n,), (n,)] or not n or not top:
        raise FormatError(f"changes of shapes {shapes}: expected [n, 2], [n, top] three times, and [n] twice")
    if not all(torch.isfinite(one).all() for one in changes[2:]):
        raise FormatError("changes hold NaN or infinity")
    if places.min() < 0 or places[:, 0].max() >= n_prompts or tokens.min() < 0 or tokens.max() >= n_tokens:
        raise FormatError("changes of prompts or tokens that are not there")


class _Config(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    format: str
    format_version: int
    commandv: str
    files: dict[str, Any]
    name: str
    donor: ModelRef
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    vocabulary: tuple[str, ...]
    max_new_tokens: int
    dropped: dict[str, int]
    places: int
    mean_divergence: float | None
    loop_rate: float
    hash: str


@checked
def save_demonstrations(one: Demonstrations, path: str | Path) -> Path:
    """Write demonstrations as a directory of `config.json` and one safetensors file; earlier ones there are replaced.

    Raises:
        FormatError: `path` holds something else.
        StorageError: the disk is full or not writable; nothing at `path` changes.
    """
    path = Path(path)
    changes = one.changes
    config = {
        "commandv": importlib.metadata.version("commandv"),
        "name": one.name,
        "donor": asdict(one.donor),
        "prompts": one.prompts,
        "answers": one.answers,
        "vocabulary": one.vocabulary,
        "max_new_tokens": one.max_new_tokens,
        "dropped": one.dropped,
        "places": 0 if changes is None else len(changes.places),
        "mean_divergence": one.mean_divergence,
        "loop_rate": one.loop_rate,
        "hash": one.hash,
    }
    tensors = {"none": torch.zeros(1)} if changes is None else _packed(changes)
    write_artefact(path, DEMONSTRATIONS, config, [("tensors", safetensors.torch.save(tensors))])
    return path


def _packed(changes: Changes) -> dict[str, Tensor]:
    small = {name: one.half() for name, one in changes._asdict().items() if one.is_floating_point()}
    return {"places": changes.places.int(), "tokens": changes.tokens.int(), **small}


@checked
def load_demonstrations(source: str | Path, *, revision: str | None = None) -> Demonstrations:
    """Read demonstrations: a directory, or a data set on the hub.

    Args:
        source: the directory, or the hub's `user/name`.
        revision: branch, tag or commit on the hub.

    Raises:
        FormatError: not demonstrations, of an unknown version, damaged, or with another hash than when written.
        HubError: not on the hub, not allowed, or not reachable.
    """
    return opened(source, "dataset", _read, revision=revision)


def _read(path: Path) -> Demonstrations:

    def build(raw: dict[str, Any], files: dict[str, Path]) -> Demonstrations:
        try:
            config = _Config.model_validate(raw)
            content = read_safetensors(files["tensors"]).content
            changes = None
            if config.places:
                ints = {name: content[name].long() for name in ("places", "tokens")}
                changes = Changes(**{name: ints.get(name, content[name].float()) for name in Changes._fields})
            made = Demonstrations(
                config.prompts, config.answers, config.donor, config.name, config.vocabulary, changes,
                config.max_new_tokens, config.dropped,
            )  # fmt: skip
        except FileNotFoundError:  # replaced this moment
            raise
        except (pydantic.ValidationError, KeyError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else None
            said = f"config.json, {'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
            raise FormatError(
                f"{path}: damaged demonstrations, or of a newer commandv ({said}); copy them again"
            ) from error
        if made.hash != config.hash:
            raise FormatError(
                f"{path}: the texts in config.json have changed since it was written (hash {made.hash}, expected "
                f"{config.hash}); copy it again, or make them anew"
            )
        return made

    return read_artefact(path, DEMONSTRATIONS, build)
