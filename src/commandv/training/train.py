"""Training adapters of the ReFT family on {prompt, response} examples.

The model stays frozen. Logits are computed at labelled positions only; what comes before the first position that the
adapter changes runs without gradients and is reused as a cache; parameters live in units of each layer's typical
norm, which scales the learning rate by layer.

Source: Wu et al., ReFT, arXiv 2404.03592 (the kinds); arXiv 2506.19140, section 4 (rank 8, every other layer, last
token).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from commandv.adapters.adapter import Adapter, Intervention
from commandv.adapters.kinds import KINDS, Kind
from commandv.arguments import checked
from commandv.errors import InputError, require_positive, require_seed
from commandv.models.encoding import pad
from commandv.models.layers import LayerChoice, choose_layers, every_other
from commandv.models.lm import LM
from commandv.models.state import identity, require_own
from commandv.positions import Positions, as_positions
from commandv.profiles.work import read_rows
from commandv.prompts.sets import PromptSet
from commandv.storage.files import digest
from commandv.training.examples import Example, read_examples, reply_loss, shared_beginning
from commandv.training.loop import Descent


@checked
@dataclass(frozen=True)
class ReFT:
    """What to train: one kind of the ReFT family (a row of `commandv.adapters.kinds.KINDS`), where, and how large.

    Attributes:
        rank: directions read and written per layer.
        layers: layers to act on.
        positions: tokens to act on, in the notation of `Positions`.
        activation: on what is read (a name in `ACTIVATIONS`); the kinds without a read weight ignore it.
    """

    kind: ClassVar[str]
    rank: int = 8
    layers: LayerChoice = every_other
    positions: Positions | str = "l1"
    activation: str = "linear"

    def __post_init__(self) -> None:
        require_positive(rank=self.rank)


def _spec(kind: Kind) -> type[ReFT]:
    """Return the class of specifications of one kind."""
    body = {"__doc__": f"{kind.title}: {kind.formula}. Its arguments are those of `ReFT`.", "__module__": __name__}
    return type(kind.title, (ReFT,), {**body, "kind": kind.name})


TRAINABLE: dict[str, type[ReFT]] = {name: _spec(kind) for name, kind in KINDS.items()}
LoReFT, NoReFT, ConsReFT = TRAINABLE["loreft"], TRAINABLE["noreft"], TRAINABLE["consreft"]
LobiReFT, DiReFT, NodiReFT = TRAINABLE["lobireft"], TRAINABLE["direft"], TRAINABLE["nodireft"]


@checked
@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: passes over the examples.
        learning_rate: of Adam, in units of each layer's norm; falls linearly to 0 after the warm-up.
        warmup: share of the steps over which it rises.
        batch_size: examples per step.
        max_response: labelled tokens per example.
        held_out: share of the examples on which the loss is reported and nothing is learned.
        seed: of the initial values and of the order of examples.
    """

    epochs: int = 3
    learning_rate: float = 4e-3
    warmup: float = 0.1
    batch_size: int = 16
    max_response: int = 512
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed(self.seed)
        require_positive(epochs=self.epochs, batch_size=self.batch_size, max_response=self.max_response)
        if not (0 <= self.held_out < 1 and 0 <= self.warmup < 1 and 0 < self.learning_rate < math.inf):
            raise InputError("held_out and warmup: expected shares from 0 to below 1; learning_rate: a number above 0")


@checked
def train(
    lm: LM,
    examples: PromptSet,
    kind: ReFT,
    settings: TrainSettings = TrainSettings(),
    *,
    name: str = "adapter",
    checkpoint: str | Path | None = None,
) -> Adapter:
    """Train an adapter so that the model answers prompts as the examples do.

    Args:
        lm: the model; its weights do not change.
        examples: prompts with responses.
        kind: what to train, e.g. `DiReFT(rank=8, layers=every_other, positions="l1")`.
        settings: how.
        name: what the adapter does, for people.
        checkpoint: a file that is written after each epoch and from which the same training resumes.

    Returns:
        The adapter; its provenance holds the settings and the held-out loss after each epoch, before any at index 0.

    Raises:
        InputError: an example without a response, too few examples, a rank above the model's width, or a model
            with an adapter attached; or the loss is NaN.
        FormatError: the checkpoint is of another training, or damaged.
    """
    require_own(lm, "training")
    if kind.rank > lm.d_model:
        raise InputError(f"rank={kind.rank} is above the model's width {lm.d_model}")
    rows = read_examples(lm, examples, settings.max_response)
    n_held_out = round(settings.held_out * len(rows))
    if len(rows) - n_held_out < 1:
        raise InputError(f"{len(rows)} examples leave none to train on with held_out={settings.held_out}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    held_out, learned = [rows[i] for i in order[:n_held_out]], [rows[i] for i in order[n_held_out:]]
    modules = _modules(lm, kind, settings, learned)
    stamp = digest(identity(lm).key, examples.hash, _plain(kind, lm), asdict(settings))
    with _frozen(lm):
        found = _descent(lm, modules, learned, held_out, settings).run(
            settings.epochs,
            f"training {name} on {lm.id}",
            stamp=stamp,
            checkpoint=None if checkpoint is None else Path(checkpoint),
        )
    provenance = {
        "made_by": "train",
        "kind": _plain(kind, lm),
        "settings": asdict(settings),
        "examples": {"name": examples.name, "hash": examples.hash, "n": len(examples)},
        "held_out_loss": [round(loss, 5) for loss in found.losses],
    }
    with torch.no_grad():
        trained = {
            layer: tuple(
                replace(one, read=one.read.clone(), bias=one.bias.clone(), write=one.write.clone()) for one in module()
            )
            for layer, module in modules.items()
        }
    return Adapter(trained, lm.ref, name, provenance)


@contextlib.contextmanager
def _frozen(lm: LM) -> Iterator[None]:
    """Spare the gradients of the model's own weights, which training does not use."""
    learning = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _plain(kind: ReFT, lm: LM) -> dict[str, Any]:
    return {
        "kind": kind.kind,
        "rank": kind.rank,
        "layers": choose_layers(kind.layers, lm.n_layers),
        "positions": str(as_positions(kind.positions)),
        "activation": kind.activation,
    }


class _Module(nn.Module):
    """The trainable parameters of one layer, in units of the layer's norm."""

    def __init__(self, spec: ReFT, d_model: int, norm: float, generator: torch.Generator) -> None:
        super().__init__()
        self.norm, self.positions, self.activation = norm, as_positions(spec.positions), spec.activation
        self.kind = KINDS[spec.kind]
        starts: dict[str, Tensor] = {}
        for name, part in self.kind.parts.items():
            if part.shape == "rotation":
                starts[name] = torch.linalg.qr(torch.randn(d_model, spec.rank, generator=generator)).Q.T.contiguous()
            elif part.shape == "vector":
                starts[name] = torch.zeros(spec.rank)
            elif part.start in starts:
                starts[name] = starts[part.start].clone()
            # Zeros start as the identity, but there relu has no slope and would never learn.
            elif part.start == "random" or spec.activation == "relu":
                starts[name] = (torch.rand(spec.rank, d_model, generator=generator) * 2 - 1) / math.sqrt(d_model)
            else:
                starts[name] = torch.zeros(spec.rank, d_model)
            self.register_parameter(name, nn.Parameter(starts[name]))
            if part.shape == "rotation":
                # Torch completes the basis from its global generator: seed that for a moment, and leave it as it was.
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
                    nn.utils.parametrizations.orthogonal(self, name)

    def forward(self) -> tuple[Intervention, ...]:
        """Return the interventions in the stream's own units: delta(h) = norm · f(h / norm)."""
        parts = {name: getattr(self, name) for name in self.kind.parts}
        parts = {name: part.T if self.kind.parts[name].shape == "rotation" else part for name, part in parts.items()}
        return tuple(self._in_stream_units(one) for one in self.kind.construct(parts, self.activation))

    def _in_stream_units(self, one: Intervention) -> Intervention:
        if one.activation == "linear":  # norm · (h / norm Rᵀ + b) W = (h Rᵀ + norm · b) W
            return replace(one, bias=one.bias * self.norm, positions=self.positions)
        return replace(one, read=one.read / self.norm, write=one.write * self.norm, positions=self.positions)


def _modules(lm: LM, kind: ReFT, settings: TrainSettings, learned: Sequence[Example]) -> dict[int, _Module]:
    """Return what is trained, layer by layer, at its first values."""
    generator = torch.Generator().manual_seed(settings.seed)
    norms = _layer_norms(lm, learned[:64])
    return {
        layer: _Module(kind, lm.d_model, norms[layer], generator).to(next(lm.blocks[layer].parameters()).device)
        for layer in choose_layers(kind.layers, lm.n_layers)
    }


def _descent(
    lm: LM,
    modules: dict[int, _Module],
    learned: list[Example],
    held_out: list[Example],
    settings: TrainSettings,
) -> Descent[list[Example]]:
    positions = next(iter(modules.values())).positions
    size, per_epoch = settings.batch_size, math.ceil(len(learned) / settings.batch_size)
    total, warm = per_epoch * settings.epochs, settings.warmup * per_epoch * settings.epochs
    beginning = shared_beginning(lm, [*learned, *held_out], positions)

    def batches(epoch: int) -> list[list[Example]]:
        generator = torch.Generator().manual_seed(settings.seed * 1000 + epoch + 1)
        order = torch.randperm(len(learned), generator=generator).tolist()
        return [[learned[i] for i in order[a : a + size]] for a in range(0, len(order), size)]

    def loss(batch: list[Example]) -> Tensor:
        adapter = Adapter({layer: module() for layer, module in modules.items()}, lm.ref)
        return reply_loss(lm, batch, adapter, positions, beginning)

    def validate() -> float:
        losses = [float(loss(held_out[a : a + size])) for a in range(0, len(held_out), size)]
        return sum(losses) / len(losses)

    parameters = {
        f"{layer}.{name}": value for layer, module in modules.items() for name, value in module.named_parameters()
    }
    return Descent(
        parameters,
        torch.optim.Adam(parameters.values(), lr=settings.learning_rate),
        batches,
        lambda batch: [loss(batch)],
        validate if held_out else None,
        lambda step: min((step + 1) / (warm + 1), (total - step) / max(1.0, total - warm)),
    )


def _layer_norms(lm: LM, examples: Sequence[Example]) -> list[float]:
    """Return each layer's median norm of the residual stream at the last prompt token."""
    rows = [one.prompt for one in examples]
    batch = pad(lm, rows, "left")
    last = torch.full((len(rows),), batch.input_ids.shape[1] - 1)
    states = read_rows(lm, batch, (torch.arange(len(rows)), last))
    return [float(states[layer].float().norm(dim=1).median()) for layer in range(lm.n_layers)]
