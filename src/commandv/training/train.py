"""Training adapters of the ReFT family on {prompt, response} examples.

The model stays frozen. Logits are computed at labelled positions only; what comes before the first position that the
adapter changes runs without gradients and is reused as a cache; parameters live in units of each layer's typical
norm, which scales the learning rate by layer.

Source: Wu et al., ReFT, arXiv 2404.03592 (the kinds); arXiv 2506.19140, section 4 (rank 8, every other layer, last
token).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn

from commandv.adapters.adapter import Adapter, Intervention
from commandv.adapters.kinds import KINDS, Kind
from commandv.errors import FormatError, InputError
from commandv.files import digest, require_file, tidy, write_bytes
from commandv.models.encoding import pad
from commandv.models.identity import identity, require_own
from commandv.models.layers import LayerChoice, choose_layers, every_other
from commandv.models.load import LM
from commandv.positions import Positions, as_positions
from commandv.profiles.profiling import read_rows
from commandv.progress import track
from commandv.prompts.sets import PromptSet
from commandv.reading import parse_json
from commandv.tensors import read_safetensors
from commandv.training.examples import Example, read_examples, reply_loss

log = logging.getLogger(__name__)


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
    layers: LayerChoice | str | Iterable[int] = every_other
    positions: Positions | str = "l1"
    activation: str = "linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank={self.rank}: expected 1 or more")


def _spec(kind: Kind) -> type[ReFT]:
    """Return the class of specifications of one kind."""
    body = {"__doc__": f"{kind.title}: {kind.formula}. Its arguments are those of `ReFT`.", "__module__": __name__}
    return type(kind.title, (ReFT,), {**body, "kind": kind.name})


TRAINABLE: dict[str, type[ReFT]] = {name: _spec(kind) for name, kind in KINDS.items()}
LoReFT, NoReFT, ConsReFT = TRAINABLE["loreft"], TRAINABLE["noreft"], TRAINABLE["consreft"]
LobiReFT, DiReFT, NodiReFT = TRAINABLE["lobireft"], TRAINABLE["direft"], TRAINABLE["nodireft"]


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
        if self.epochs < 1 or self.batch_size < 1 or self.max_response < 1:
            raise InputError("epochs, batch_size and max_response: expected 1 or more")
        if not (0 <= self.held_out < 1 and 0 <= self.warmup < 1 and self.learning_rate > 0):
            raise InputError("held_out and warmup: expected shares from 0 to below 1; learning_rate: above 0")


def train(
    lm: LM,
    examples: PromptSet,
    kind: ReFT,
    settings: TrainSettings = TrainSettings(),
    *,
    name: str = "adapter",
    checkpoint: Path | None = None,
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
            with an adapter attached.
        FormatError: the checkpoint is of another training, or damaged.
    """
    if checkpoint is not None:
        require_file(checkpoint)
        tidy(checkpoint)
    require_own(lm, "training")
    if kind.rank > lm.d_model:
        raise InputError(f"rank={kind.rank} is above the model's width {lm.d_model}")
    rows = read_examples(lm, examples, settings.max_response)
    n_held_out = round(settings.held_out * len(rows))
    if len(rows) - n_held_out < 1:
        raise InputError(f"{len(rows)} examples leave none to train on with held_out={settings.held_out}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    held_out, learned = [rows[i] for i in order[:n_held_out]], [rows[i] for i in order[n_held_out:]]
    run = _Run(lm, kind, settings, learned, held_out)
    stamp = digest(identity(lm).key, examples.hash, _plain(kind, lm), asdict(settings))
    first = run.resume(checkpoint, stamp) if checkpoint is not None and checkpoint.exists() else 0
    if first == 0:
        run.losses.append(run.loss_on(held_out))
    per_epoch = math.ceil(len(learned) / settings.batch_size)
    with _frozen(lm), track(f"training {name} on {lm.id}", total=settings.epochs * per_epoch) as advance:
        advance(first * per_epoch)
        for epoch in range(first, settings.epochs):
            for batch in run.epoch(epoch):
                run.step(batch)
                advance(1)
            run.losses.append(run.loss_on(held_out))
            log.info("epoch %d of %d: held-out loss %.4f", epoch + 1, settings.epochs, run.losses[-1])
            if checkpoint is not None:
                run.save(checkpoint, stamp, epoch + 1)
    provenance = {
        "made_by": "train",
        "kind": _plain(kind, lm),
        "settings": asdict(settings),
        "examples": {"name": examples.name, "hash": examples.hash, "n": len(examples)},
        "held_out_loss": [round(loss, 5) for loss in run.losses] if held_out else [],
    }
    with torch.no_grad():
        trained = {layer: tuple(map(_detached, module())) for layer, module in run.modules.items()}
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


def _detached(one: Intervention) -> Intervention:
    return replace(one, read=one.read.clone(), bias=one.bias.clone(), write=one.write.clone())


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


class _Run:
    """The state of one training: parameters, optimiser, losses."""

    def __init__(
        self, lm: LM, kind: ReFT, settings: TrainSettings, learned: list[Example], held_out: list[Example]
    ) -> None:
        self.lm, self.settings, self.learned = lm, settings, learned
        self.positions = as_positions(kind.positions)
        self.losses: list[float] = []
        generator = torch.Generator().manual_seed(settings.seed)
        layers = choose_layers(kind.layers, lm.n_layers)
        norms = _layer_norms(lm, learned[:64])
        self.modules = {layer: _Module(kind, lm.d_model, norms[layer], generator) for layer in layers}
        for layer, module in self.modules.items():
            module.to(next(lm.blocks[layer].parameters()).device)
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
        per_epoch = math.ceil(len(learned) / settings.batch_size)
        total, warm = per_epoch * settings.epochs, settings.warmup * per_epoch * settings.epochs
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / (warm + 1), (total - step) / max(1.0, total - warm))
        )

    def epoch(self, number: int) -> list[list[Example]]:
        """Return the batches of one epoch; their order depends on the seed and the epoch alone."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1000 + number + 1)
        order = torch.randperm(len(self.learned), generator=generator).tolist()
        size = self.settings.batch_size
        return [[self.learned[i] for i in order[a : a + size]] for a in range(0, len(order), size)]

    def step(self, batch: list[Example]) -> None:
        """Take one optimiser step."""
        self.optimizer.zero_grad()
        with torch.enable_grad():
            self._loss(batch).backward()
        self.optimizer.step()
        self.scheduler.step()

    def loss_on(self, examples: list[Example]) -> float:
        """Return the mean loss per example-batch, without learning; NaN when there are no examples."""
        size = self.settings.batch_size
        with torch.no_grad():
            losses = [float(self._loss(examples[a : a + size])) for a in range(0, len(examples), size)]
        return sum(losses) / len(losses) if losses else float("nan")

    def _loss(self, batch: list[Example]) -> Tensor:
        adapter = Adapter({layer: module() for layer, module in self.modules.items()}, self.lm.ref)
        return reply_loss(self.lm, batch, adapter, self.positions)

    def save(self, file: Path, stamp: str, epoch: int) -> None:
        """Write a checkpoint atomically."""
        tensors = {
            f"module.{layer}.{name}": value.contiguous()
            for layer, module in self.modules.items()
            for name, value in module.state_dict().items()
        }
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": torch.as_tensor(value).contiguous() for name, value in state.items()}
        facts = {"stamp": stamp, "epoch": epoch, "losses": self.losses, "steps": self.scheduler.last_epoch}
        write_bytes(file, safetensors.torch.save(tensors, {"facts": json.dumps(facts)}))

    def resume(self, file: Path, stamp: str) -> int:
        """Load a checkpoint and return how many epochs it has behind it."""
        try:
            tensors, metadata = read_safetensors(file)
        except FormatError as error:
            raise FormatError(f"not a checkpoint of commandv ({error}); delete it to train anew") from error
        facts = parse_json(metadata.get("facts", ""), f"{file}: not a checkpoint of commandv")
        if not isinstance(facts, dict) or facts.get("stamp") != stamp:
            raise FormatError(
                f"{file}: a checkpoint of another training (model, examples, kind or settings differ); "
                "delete it or choose another file"
            )
        self._require_whole(file, tensors, facts)
        for layer, module in self.modules.items():
            head = f"module.{layer}."
            module.load_state_dict({k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.scheduler.last_epoch = facts["steps"]
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = rate * self.scheduler.lr_lambdas[0](facts["steps"])
        self.losses = list(facts["losses"])
        return int(facts["epoch"])

    def _require_whole(self, file: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Raise `FormatError` unless a checkpoint has just what `save` writes."""
        shapes = {
            f"module.{layer}.{name}": value.shape
            for layer, module in self.modules.items()
            for name, value in module.state_dict().items()
        }
        learned = (parameter for module in self.modules.values() for parameter in module.parameters())
        for index, parameter in enumerate(learned):
            shapes |= {f"adam.{index}.{name}": parameter.shape for name in ("exp_avg", "exp_avg_sq")}
            shapes[f"adam.{index}.step"] = torch.Size([])
        losses = facts.get("losses")
        numbers = [facts.get("epoch"), facts.get("steps"), *(losses if isinstance(losses, list) else [None])]
        whole = {name: one.shape for name, one in tensors.items() if one.dtype == torch.float32} == shapes
        if not whole or not all(isinstance(one, (int, float)) for one in numbers) or not 0 < numbers[0] <= 10**6:
            raise FormatError(f"{file}: a damaged checkpoint; delete it to train anew")


def _layer_norms(lm: LM, examples: Sequence[Example]) -> list[float]:
    """Return each layer's median norm of the residual stream at the last prompt token."""
    rows = [one.prompt for one in examples]
    batch = pad(lm, rows, "left")
    last = torch.full((len(rows),), batch.input_ids.shape[1] - 1)
    states = read_rows(lm, batch, (torch.arange(len(rows)), last))
    return [float(states[layer].float().norm(dim=1).median()) for layer in range(lm.n_layers)]
