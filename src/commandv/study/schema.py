"""The study file. Unknown keys are rejected, and so is a study that could not run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import yaml

from commandv.convert import FITTERS
from commandv.errors import InputError
from commandv.evaluate.catalogue import load_task
from commandv.evaluate.controls import ARMS, CONTROLS
from commandv.match import MATCHERS, choose_layers
from commandv.positions import as_positions
from commandv.prompts import PromptSet, load_prompt_sets, load_prompts
from commandv.steering import APPLICATIONS, METHODS, load_contrast
from commandv.training import TRAINABLE

ANY_DEPTH = 100  # layers against which a layer choice by name is checked before models are loaded


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Shape(_Strict):
    """The true shape of a model, so that a study can be rehearsed with random weights where the real ones are not."""

    d_model: int
    n_layers: int
    heads: int
    kv_heads: int
    intermediate: int


class FineTuning(_Strict):
    """LoRA fine-tuning; see `LoRASettings`. Without a seed of its own it has the cell's."""

    examples: str
    seed: int | None = None
    rank: int = 8
    epochs: int = 3
    learning_rate: float = 1e-3
    max_response: int = 64
    batch_size: int = 16


class ModelSpec(_Strict):
    """A model, a fine-tuned version, or a sibling made from either.

    Attributes:
        id: what `load_model` takes.
        revision: of a hub model.
        dtype: what `load_model` takes.
        lora: a LoRA to merge into it: a directory in PEFT's format or a hub id.
        finetune: fine-tune it first.
        rotate: width of a stream to rotate it into, the function unchanged.
        noise: Gaussian noise on every matrix, as a share of its root mean square.
        drop: blocks to leave out.
        shape: its true shape, for rehearsals.
    """

    id: str
    revision: str | None = None
    dtype: str | None = None
    lora: str | None = None
    finetune: FineTuning | None = None
    rotate: int | None = None
    noise: Annotated[float, pydantic.Field(ge=0)] = 0.0
    drop: tuple[int, ...] = ()
    shape: Shape | None = None


class Training(_Strict):
    """How donors (and recipients, for the direct control) are trained; `rates` replaces the learning rate by model."""

    kind: str = "direft"
    rank: int = 8
    layers: str = "every_other"
    positions: str = "l1"
    epochs: int = 3
    learning_rate: float = 4e-3
    max_response: int = 512
    batch_size: int = 16
    rates: dict[str, float] = {}

    @pydantic.field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        return _one_of(kind, TRAINABLE)

    @pydantic.field_validator("layers")
    @classmethod
    def _layers(cls, layers: str) -> str:
        return _layer_choice(layers)


class Vector(_Strict):
    """A steering vector, found in either model from the same contrast; see `steer`.

    Attributes:
        contrast: what `load_contrast` takes.
        negative: the other side, where `contrast` is one.
        pairs: so many of the prompts of either side, drawn with the cell's seed; null for all.
        method: a name in `METHODS`.
        positions: tokens that are read.
        trigger: read at the last token of this string instead.
        kind: how it is applied.
        strength: 1 for the direction of the positive side, -1 for that of the negative.
        at: tokens to act on.
        rows: for the writing converter, see `paste`; last-token rows suit what is read there.
        rescale: as in `carry_directions`.
    """

    contrast: str
    negative: str | None = None
    pairs: Annotated[int, pydantic.Field(ge=2)] | None = None
    method: str = "caa"
    positions: str = "l1"
    trigger: str | None = None
    kind: str = "add"
    strength: float = 1.0
    at: str = "all"
    rows: Literal["end", "text", "both"] = "end"
    rescale: Literal["norm share"] | None = None

    @pydantic.field_validator("method")
    @classmethod
    def _method(cls, name: str) -> str:
        return _one_of(name, METHODS)

    @pydantic.field_validator("kind")
    @classmethod
    def _kind(cls, name: str) -> str:
        return _one_of(name, APPLICATIONS)

    @pydantic.field_validator("positions", "at")
    @classmethod
    def _positions(cls, text: str) -> str:
        as_positions(text)
        return text


class Behaviour(_Strict):
    """What is carried: one of a trained adapter, ready adapters and a steering vector.

    Attributes:
        task: how it is measured: a name in `TASKS`, with `:FILE` where the task wants one.
        examples: training examples, a prompt set; donors are trained on them with each seed.
        adapters: ready adapters by model instead.
        training: of adapters from examples.
        vector: a steering vector instead.
        also: further tasks measured with every arm (over-refusal beside refusal).
    """

    task: str
    examples: str | None = None
    adapters: dict[str, str] = {}
    training: Training = Training()
    vector: Vector | None = None
    also: tuple[str, ...] = ()

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Behaviour:
        if self.vector is not None and (self.examples is not None or self.adapters):
            raise ValueError("a vector and examples or adapters; give one or the other")
        return self


class Method(_Strict):
    """A way to paste, beside the default.

    Attributes:
        fit: a name in `FITTERS`.
        match: a name in `MATCHERS`; null for `proportional`, or `covering` where a vector is carried.
        layers: a layer choice; null to take the one that calibration picks.
        read_rows: see `paste`.
        write_rows: see `paste`.
        prompts: use the first so many profile prompts only.
    """

    fit: str = "ridge"
    match: str | None = None
    layers: str | None = None
    read_rows: Literal["end", "text", "both"] = "end"
    write_rows: Literal["end", "text", "both"] | None = None
    prompts: int | None = None

    @pydantic.field_validator("fit")
    @classmethod
    def _fit(cls, name: str) -> str:
        return _one_of(name, FITTERS)

    @pydantic.field_validator("match")
    @classmethod
    def _match(cls, name: str | None) -> str | None:
        return name if name is None else _one_of(name, MATCHERS)


class CellSpec(NamedTuple):
    """Which cell."""

    donor: str
    recipient: str
    behaviour: str
    seed: int

    def __str__(self) -> str:
        return f"{self.donor}-{self.recipient}-{self.behaviour}-{self.seed}"


class Study(_Strict):
    """A study file.

    Attributes:
        name: of the study.
        question: that it answers, one sentence.
        prompts: profile prompts (a prompt set or several), `limit` of each. What never stands in them, such as a
            trigger, is nothing that converters can know of.
        limit: see `prompts`; null for all.
        text: passages for text rows; null for none.
        places: of text rows in them, see `profile`.
        models: by short names.
        pairs: (donor, recipient) by these names.
        behaviours: by name.
        methods: ways to paste that are measured beside the default and the controls.
        seeds: of donor training and of random controls.
        scales: tried on the development split.
        layers: layer choices tried on the development split.
        budget: most drift allowed when the setting is chosen, nats per token; null for no limit.
        n_dev: development prompts.
        n_test: test prompts.
        n_drift: passages on which drift is measured; null for all built-in ones.
        leave_out: controls not to run; the report says so.
        batch_size: prompts per batch.
    """

    name: Annotated[str, pydantic.Field(pattern=r"^[\w.-]+$")]
    question: str = ""
    prompts: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = ("builtin:general",)
    limit: Annotated[int, pydantic.Field(ge=16)] | None = None
    text: str | None = "builtin:text"
    places: Literal["lines", "words"] = "lines"
    models: dict[str, ModelSpec]
    pairs: tuple[tuple[str, str], ...]
    behaviours: dict[str, Behaviour]
    methods: dict[str, Method] = {}
    seeds: tuple[int, ...] = (0,)
    scales: tuple[Annotated[float, pydantic.Field(gt=0)], ...] = (0.6, 1.0)
    layers: tuple[str, ...] = ("last_third", "all_layers")
    budget: Annotated[float, pydantic.Field(gt=0)] | None = None
    n_dev: Annotated[int, pydantic.Field(ge=1)] = 48
    n_test: Annotated[int, pydantic.Field(ge=1)] = 100
    n_drift: Annotated[int, pydantic.Field(ge=2)] | None = None
    leave_out: tuple[str, ...] = ()
    batch_size: Annotated[int, pydantic.Field(ge=1)] = 64

    @pydantic.field_validator("prompts", mode="before")
    @classmethod
    def _one_or_more(cls, prompts: Any) -> Any:
        return (prompts,) if isinstance(prompts, str) else prompts

    @pydantic.field_validator("layers")
    @classmethod
    def _layers(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_layer_choice, layers))

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Study:
        for wanted, what in ((self.pairs, "pairs"), (self.behaviours, "behaviours"), (self.seeds, "seeds")):
            if not wanted:
                raise ValueError(f"{what}: expected at least one")
        for name in self.leave_out:
            _one_of(name, CONTROLS)
        taken = set(self.methods) & {*ARMS, "unmodified", "donor"}
        if taken:
            raise ValueError(f"methods: {sorted(taken)} are names of the default and its controls; choose others")
        for pair in self.pairs:
            for model in pair:
                if model not in self.models:
                    raise ValueError(f"pairs: {model!r} is not among the models {sorted(self.models)}")
            for name, behaviour in self.behaviours.items():
                self._adapters_at_hand(name, behaviour, *pair)
        return self

    def _adapters_at_hand(self, name: str, behaviour: Behaviour, donor: str, recipient: str) -> None:
        if behaviour.examples is not None or behaviour.vector is not None:
            return
        if donor not in behaviour.adapters:
            raise ValueError(f"behaviours.{name}: neither examples, a vector nor an adapter for the donor {donor!r}")
        if recipient not in behaviour.adapters and "direct" not in self.leave_out:
            raise ValueError(
                f"behaviours.{name}: the direct control needs examples or an adapter for the recipient {recipient!r}; "
                "give one, or say leave_out: [direct]"
            )

    def cells(self) -> list[CellSpec]:
        """Return every cell, seed by seed, so that a study that is cut off has whole seeds."""
        return [
            CellSpec(*pair, behaviour, seed)
            for seed in self.seeds
            for pair in self.pairs
            for behaviour in self.behaviours
        ]

    def profile_prompts(self) -> PromptSet:
        """Return the prompts of profiles."""
        return load_prompt_sets(self.prompts, limit=self.limit)

    def unreadable(self) -> list[str]:
        """Try every prompt set and task, and tell which cannot be read here, with their places in the file.

        A study that would fail on one after hours is found out before it starts.
        """
        sets = [("text", self.text), *(("prompts", one) for one in self.prompts)]
        sets += [(f"behaviours.{name}.examples", one.examples) for name, one in self.behaviours.items()]
        sets += [
            (f"models.{name}.finetune", one.finetune.examples) for name, one in self.models.items() if one.finetune
        ]
        tries: list[tuple[str, Callable[[str], Any], str]] = [
            (place, load_prompts, source) for place, source in sets if source is not None
        ]
        tries += [
            (f"behaviours.{name}: task {task}", load_task, task)
            for name, one in self.behaviours.items()
            for task in (one.task, *one.also)
        ]
        vectors = {name: one.vector for name, one in self.behaviours.items() if one.vector}
        tries += [
            (f"behaviours.{name}.vector", functools.partial(load_contrast, negative=one.negative), one.contrast)
            for name, one in vectors.items()
        ]
        problems = []
        for place, load, source in tries:
            try:
                load(source)
            except (InputError, OSError) as error:
                problems.append(f"{place}: {error}")
        return problems

    def rehearsed(self) -> Study:
        """Return the study in small: built-in prompts, a few of each, one seed; models, pairs and methods stay."""
        behaviours = {
            name: Behaviour(
                task="numbered-list",
                examples="builtin:drift",
                training=Training(epochs=1, max_response=8, layers="last_third"),
            )
            for name in self.behaviours
        }
        few = {
            name: one.model_copy(update={"prompts": 32}) if one.prompts else one for name, one in self.methods.items()
        }
        small = {"prompts": ("builtin:general",), "limit": 48, "text": None, "behaviours": behaviours, "methods": few}
        less = {"seeds": self.seeds[:1], "scales": self.scales[:1], "layers": self.layers[:1], "n_dev": 2, "n_test": 4}
        plain = {name: one.model_copy(update={"lora": None, "finetune": None}) for name, one in self.models.items()}
        return self.model_copy(update={"name": f"{self.name}-rehearsal", "models": plain, **small, **less})


def load_study(path: Path | str) -> Study:
    """Read and validate a study file.

    Raises:
        InputError: not YAML, an unknown key, a missing or impossible value: with its place in the file.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such study file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of settings, got {type(content).__name__}")
    try:
        return Study.model_validate(content)
    except pydantic.ValidationError as error:
        problems = [_problem(one) for one in error.errors()]
        raise InputError(f"{path}: " + "; ".join(problems)) from None


def _problem(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "unknown key; remove it or correct its spelling"
    return f"{place}: {message}" if place else message


def _one_of(name: str, known: Any) -> str:
    if name not in known:
        raise ValueError(f"{name!r}: expected one of {', '.join(known)}")
    return name


def _layer_choice(layers: str) -> str:
    choose_layers(layers, ANY_DEPTH)
    return layers
