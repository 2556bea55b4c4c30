"""What a study file is made of: models, training, vectors, behaviours, methods. Unknown keys are rejected."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import pydantic

from commandv.adapters.outline import LARGEST
from commandv.errors import require_known
from commandv.known import Application, Direction, Fitter, Kind, Matcher
from commandv.models.layers import choose_layers
from commandv.positions import as_positions


def plain_name(name: str) -> str:
    """Return a name that may go into file names and tables."""
    if not 1 <= len(name) <= 80 or name.startswith(".") or name != name.strip():
        raise ValueError(f"{name[:90]!r}: expected a name of 1 to 80 characters that begins with no dot or space")
    if bad := sorted({one for one in name if one in "/\\" or not one.isprintable()}):
        raise ValueError(f"{name!r}: a name cannot hold {', '.join(map(repr, bad))}")
    return name


def _readable(read: Callable[[str], Any]) -> pydantic.AfterValidator:
    """Return what accepts a text that can be read."""

    def checked(text: str) -> str:
        read(text)
        return text

    return pydantic.AfterValidator(checked)


def among(known: Any) -> pydantic.AfterValidator:
    """Return what accepts the names of a `Literal`, and tells which of them a misspelt one is near to."""
    return _readable(lambda name: require_known("", name, get_args(known)))


ANY_DEPTH = 100  # layers against which a layer choice by name is checked before models are loaded
Name = Annotated[str, pydantic.AfterValidator(plain_name)]
Layers = Annotated[str, _readable(functools.partial(choose_layers, n_layers=ANY_DEPTH))]
Places = Annotated[str, _readable(as_positions)]
Count = Annotated[int, pydantic.Field(ge=1)]
Rate = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


class Strict(pydantic.BaseModel):
    """Frozen; unknown keys are rejected, and so are truth values, which would count as 1 and 0."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, given: Any) -> Any:
        if any(isinstance(one, bool) for one in (given if isinstance(given, list) else [given])):
            said = f"{str(given).lower()}: a truth value, expected a number or a text"
            raise ValueError(f"{said}; YAML reads yes, no, on and off as such, so put a text in quotes")
        return given


class ModelSpec(Strict):
    """A model. A fine-tuned or altered one is a directory that was made before, see `experiments/organisms`."""

    id: str  # what `load_model` takes: a hub id, a directory, a packaged model
    revision: str | None = None  # of a hub model
    dtype: str | None = None  # what `load_model` takes
    template: Literal["auto", "chat", "plain"] = "auto"  # what `load_model` takes, and so are the next three
    system: str | None = None  # system prompt
    template_options: dict[str, Any] = {}  # variables of the chat template
    same_as: str = ""  # name of the model that it is taken for


class Workers(Strict):
    """What one worker has when a study runs on a cluster, see `commandv.executors`; it decides no result."""

    cpus: Annotated[float, pydantic.Field(gt=0)] = 1.0  # and as many threads
    # null for as many as the models need, by their size, where the cluster has any
    gpus: Annotated[float, pydantic.Field(ge=0)] | None = None
    # of workers at most; null for as many as there is room for
    count: Annotated[int, pydantic.Field(ge=1)] | None = None


class Training(Strict):
    """How donors (and recipients, for the direct control) are trained; `rates` replaces the learning rate by model."""

    kind: Annotated[str, among(Kind)] = "direft"
    rank: Count = 8
    layers: Layers = "every_other"
    positions: Places = "l1"
    epochs: Count = 3
    learning_rate: Rate = 4e-3
    max_response: Count = 512
    batch_size: Count = 16
    rates: dict[str, Rate] = {}


class Vector(Strict):
    """A steering vector, found in either model from the same contrast; see `steer`."""

    contrast: str  # what `load_contrast` takes
    negative: str | None = None  # the other side, where `contrast` is one
    # so many of the prompts of either side, drawn with the cell's seed; null for all
    pairs: Annotated[int, pydantic.Field(ge=2)] | None = None
    method: Annotated[str, among(Direction)] = "caa"  # a name in `METHODS`
    positions: Places = "l1"  # tokens that are read
    trigger: str | None = None  # read at the last token of this string instead
    kind: Annotated[str, among(Application)] = "add"  # how it is applied
    # 1 for the direction of the positive side, -1 for that of the negative
    strength: Annotated[float, pydantic.Field(ge=-LARGEST, le=LARGEST)] = 1.0
    at: Places = "all"  # tokens to act on
    # for the writing converter, see `paste`; last-token rows suit what is read there
    rows: Literal["end", "text", "both"] = "end"
    rescale: Literal["norm share"] | None = None  # as in `carry_directions`


class Behaviour(Strict):
    """What is carried: one of a trained adapter, ready adapters and a steering vector."""

    task: str  # how it is measured: a name in `TASKS`, with `:FILE` where the task wants one
    examples: str | None = None  # training examples, a prompt set; donors are trained on them with each seed
    adapters: dict[str, str] = {}  # ready adapters by model instead
    training: Training = Training()  # of adapters from examples
    vector: Vector | None = None  # a steering vector instead
    also: tuple[str, ...] = ()  # further tasks measured with every arm (over-refusal beside refusal)

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Behaviour:
        if self.vector is not None and (self.examples is not None or self.adapters):
            raise ValueError("a vector and examples or adapters; give one or the other")
        return self


class Method(Strict):
    """A way to paste, beside the default."""

    fit: Annotated[str, among(Fitter)] = "ridge"  # a name in `FITTERS`
    # a name in `MATCHERS`; null for `proportional`, or `covering` where a vector is carried
    match: Annotated[str, among(Matcher)] | None = None
    layers: Layers | None = None  # a layer choice; null to take the one that calibration picks
    read_rows: Literal["end", "text", "both"] = "end"  # see `paste`
    write_rows: Literal["end", "text", "both"] | None = None  # see `paste`
    prompts: Annotated[int, pydantic.Field(ge=2)] | None = None  # use the first so many profile prompts only
