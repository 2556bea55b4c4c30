"""The study file. Unknown keys are rejected, and so is a study that could not run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import pydantic

from commandv.adapters.outline import LARGEST
from commandv.errors import InputError, require_seed
from commandv.evaluation.catalogue import NO_TASKS, load_task
from commandv.evaluation.study.parts import (
    Behaviour,
    Layers,
    Method,
    ModelSpec,
    Name,
    Strict,
    Training,
    Workers,
    among,
)
from commandv.evaluation.tasks import Task
from commandv.known import Needed, Spared
from commandv.prompts.sets import PromptSet, load_prompt_sets, load_prompts
from commandv.steering.contrast import load_contrast
from commandv.storage.reading import read_yaml

if TYPE_CHECKING:
    from commandv.evaluation.arms import Arm
    from commandv.evaluation.tuning import Setting


class CellSpec(NamedTuple):
    """Which cell."""

    donor: str
    recipient: str
    behaviour: str
    seed: int

    def __str__(self) -> str:
        return f"{self.donor}-{self.recipient}-{self.behaviour}-{self.seed}"


def _seed(seed: int) -> int:
    require_seed(seed)
    return seed


class Study(Strict):
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
        rows: rows of the writing converters tried there; null for the default.
        budget: most drift allowed when the setting is chosen, nats per token; null for no limit.
        n_dev: development prompts.
        n_test: test prompts.
        n_drift: passages on which drift is measured; null for all built-in ones.
        leave_out: arms not to run; the report says so.
        batch_size: prompts per batch.
        workers: what a worker has when the study runs on a cluster.
    """

    name: Annotated[Name, pydantic.Field(pattern=r"^[\w.-]+$")]
    question: str = ""
    prompts: Annotated[tuple[str, ...], pydantic.Field(min_length=1)] = ("builtin:general",)
    limit: Annotated[int, pydantic.Field(ge=16)] | None = None
    text: str | None = "builtin:text"
    places: Literal["lines", "words"] = "lines"
    models: dict[Name, ModelSpec]
    pairs: tuple[tuple[str, str], ...]
    behaviours: dict[Name, Behaviour]
    methods: dict[Name, Method] = pydantic.Field(default={})
    seeds: tuple[Annotated[int, pydantic.AfterValidator(_seed)], ...] = (0,)
    scales: tuple[Annotated[float, pydantic.Field(gt=0, le=LARGEST)], ...] = (0.6, 1.0)
    layers: tuple[Layers, ...] = ("last_third", "all_layers")
    rows: tuple[Literal["end", "text", "both"] | None, ...] = (None,)
    budget: Annotated[float, pydantic.Field(gt=0)] | None = None
    n_dev: Annotated[int, pydantic.Field(ge=1)] = 48
    n_test: Annotated[int, pydantic.Field(ge=1)] = 100
    n_drift: Annotated[int, pydantic.Field(ge=2)] | None = None
    leave_out: tuple[Annotated[str, among(Spared)], ...] = ()
    batch_size: Annotated[int, pydantic.Field(ge=1)] = 64
    workers: Workers = Workers()

    @pydantic.field_validator("prompts", mode="before")
    @classmethod
    def _one_or_more(cls, prompts: Any) -> Any:
        return (prompts,) if isinstance(prompts, str) else prompts

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Study:
        for wanted, what in ((self.pairs, "pairs"), (self.behaviours, "behaviours"), (self.seeds, "seeds")):
            if not wanted:
                raise ValueError(f"{what}: expected at least one")
        if taken := set(self.methods) & {*get_args(Needed), *get_args(Spared), "donor"}:
            raise ValueError(f"methods: {sorted(taken)} are names of arms; choose others")
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

    def arms(self) -> dict[str, Arm]:
        """Return the arms that every cell measures, but for the study's own methods."""
        from commandv.evaluation.arms import arms_without  # as below: it takes seconds to import

        return arms_without(self.leave_out)

    def settings(self) -> list[Setting]:
        """Return the settings that are tried on the development split."""
        from commandv.evaluation.tuning import grid

        return grid(self.layers, self.scales, self.rows)

    def profile_prompts(self) -> PromptSet:
        """Return the prompts of profiles."""
        return load_prompt_sets(self.prompts, limit=self.limit)

    def unreadable(self, tasks: Mapping[str, Task] = NO_TASKS) -> list[str]:
        """Try every prompt set and task, and tell which cannot be read here, with their places in the file.

        A study that would fail on one after hours is found out before it starts. `tasks` are known besides the built-in
        ones, as in `run_study`.
        """
        sets = [("text", self.text), *(("prompts", one) for one in self.prompts)]
        sets += [(f"behaviours.{name}.examples", one.examples) for name, one in self.behaviours.items()]
        tries: list[tuple[str, Callable[[str], Any], str]] = [
            (place, load_prompts, source) for place, source in sets if source is not None
        ]
        tries += [
            (f"behaviours.{name}: task {task}", functools.partial(load_task, more=tasks), task)
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
        return self.model_copy(update={"name": f"{self.name}-rehearsal", **small, **less})


def load_study(path: Path | str) -> Study:
    """Read and validate a study file.

    Raises:
        InputError: not YAML, an unknown key, a missing or impossible value: with its place in the file.
    """
    path = Path(path)
    content = read_yaml(path, error=InputError)
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
