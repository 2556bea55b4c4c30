"""The one training loop: descent by epochs, kept after each in a file from which it goes on to the same result."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from commandv.errors import FormatError, InputError
from commandv.progress import track
from commandv.storage.files import require_file, tidy, write_bytes
from commandv.storage.reading import parse_json
from commandv.storage.tensors import read_safetensors

log = logging.getLogger(__name__)

MOST_EPOCHS = 10**6
BatchT = TypeVar("BatchT")


class Learned(NamedTuple):
    """What became of a descent, whose parameters hold the values of the epoch `best`."""

    losses: list[float]  # after each epoch, before any at index 0; empty where nothing is validated
    epochs: int  # that were run
    best: int  # the epoch whose values are kept: the last one unless patience says otherwise


@dataclass(frozen=True)
class Descent(Generic[BatchT]):
    """What is learned from what."""

    parameters: Mapping[str, Tensor]  # by name; changed in place
    optimizer: torch.optim.Optimizer  # Adam or AdamW over these parameters, in their order
    # the batches of an epoch (from 0), a step each; may depend on nothing but the epoch
    batches: Callable[[int], Sequence[BatchT]]
    # of a batch, whose gradients add up; each is let go before the next is computed
    losses: Callable[[BatchT], Iterable[Tensor]]
    validate: Callable[[], float] | None = None  # the loss on what is not learned from, after each epoch; None for none
    rate: Callable[[int], float] | None = None  # factor on the learning rate at a step (from 0); None for 1
    # epochs without a better validation loss after which it stops and the best epoch's values are taken; None goes to
    # the end and takes the last one's
    patience: int | None = None

    def run(self, epochs: int, title: str, *, stamp: str, checkpoint: Path | None = None) -> Learned:
        """Descend, or go on from a checkpoint; parameters then hold what was learned.

        Args:
            epochs: passes over the batches, at most.
            title: for progress and messages.
            stamp: of all that decides the result; a checkpoint of another one is refused.
            checkpoint: file that is replaced after each epoch.

        Raises:
            InputError: the loss, or a parameter, is NaN or infinite; the last checkpoint is whole.
            FormatError: the checkpoint is of another training, or damaged.
            StorageError: it cannot be written; the one before is kept.
        """
        if checkpoint is not None:
            require_file(checkpoint)
            tidy(checkpoint)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        state = _State(self)
        if checkpoint is not None and checkpoint.exists():
            state.read(checkpoint, stamp)
            log.info("%s: goes on after epoch %d", title, state.epoch)
        elif self.validate is not None:
            state.losses.append(self._validated(title, 0))
        with track(title, total=epochs * len(self.batches(0))) as advance:
            advance(state.step)
            while state.epoch < epochs and not state.stopped:
                for batch in self.batches(state.epoch):
                    for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate if self.rate is None else rate * self.rate(state.step)
                    self._step(batch, title, state)
                    state.step += 1
                    advance(1)
                state.epoch += 1
                self._finish(title, state)
                if checkpoint is not None:
                    state.write(checkpoint, stamp)
        if self.patience is not None:
            for name, value in self.parameters.items():
                value.data.copy_(state.best[name])
        return Learned(state.losses, state.epoch, state.best_epoch if self.patience is not None else state.epoch)

    def _step(self, batch: BatchT, title: str, state: _State) -> None:
        self.optimizer.zero_grad()
        with torch.enable_grad():
            for loss in self.losses(batch):
                if not torch.isfinite(loss):
                    raise _diverged(title, f"the loss is {float(loss.detach())}", state.epoch + 1)
                loss.backward()
        self.optimizer.step()

    def _finish(self, title: str, state: _State) -> None:
        """Validate an epoch, and take its values where they are the best so far."""
        for name, value in self.parameters.items():
            if not torch.isfinite(value).all():
                raise _diverged(title, f"{name} holds NaN or infinity", state.epoch)
        if self.validate is not None:
            state.losses.append(self._validated(title, state.epoch))
            log.info("%s: epoch %d, held-out loss %.4f", title, state.epoch, state.losses[-1])
        if self.patience is not None and (self.validate is None or state.losses[-1] < state.losses[state.best_epoch]):
            state.best_epoch = state.epoch
            state.best = {name: value.detach().clone() for name, value in self.parameters.items()}

    def _validated(self, title: str, epoch: int) -> float:
        assert self.validate is not None
        with torch.no_grad():
            loss = self.validate()
        if not math.isfinite(loss):
            raise _diverged(title, f"the held-out loss is {loss}", epoch)
        return loss


class _State:
    """Where a descent stands: all that a checkpoint holds."""

    def __init__(self, descent: Descent[Any]) -> None:
        self.descent = descent
        self.epoch = self.step = self.best_epoch = 0
        self.losses: list[float] = []
        self.best: dict[str, Tensor] = {}
        if descent.patience is not None:
            self.best = {name: value.detach().clone() for name, value in descent.parameters.items()}

    @property
    def stopped(self) -> bool:
        """True when the last epochs have brought nothing."""
        descent = self.descent
        waits = descent.patience is not None and descent.validate is not None
        return waits and self.epoch - self.best_epoch >= (descent.patience or 0)

    def write(self, file: Path, stamp: str) -> None:
        """Write a checkpoint in the place of the one before."""
        tensors = {f"now.{name}": value.detach() for name, value in self.descent.parameters.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for index, state in self.descent.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        counts = {"epoch": self.epoch, "step": self.step, "best_epoch": self.best_epoch}
        facts = json.dumps({"stamp": stamp, **counts, "losses": self.losses})
        write_bytes(
            file, safetensors.torch.save({k: v.contiguous().cpu() for k, v in tensors.items()}, {"facts": facts})
        )

    def read(self, file: Path, stamp: str) -> None:
        """Go on from a checkpoint."""
        try:
            tensors, metadata = read_safetensors(file)
            facts = parse_json(metadata.get("facts", ""), str(file))
        except FormatError as error:
            raise FormatError(f"not a checkpoint of commandv ({error}); delete it to train anew") from error
        if not isinstance(facts, dict) or facts.get("stamp") != stamp:
            raise FormatError(
                f"{file}: a checkpoint of another training (model, data, kind or settings differ); "
                "choose another file, or delete it to train anew"
            )
        if not self._is_whole(tensors, facts):
            raise FormatError(f"{file}: a damaged checkpoint; delete it to train anew")
        for name, value in self.descent.parameters.items():
            value.data.copy_(tensors[f"now.{name}"])
        self.best = {name: value.to(self.best[name].device) for name, value in _under("best", tensors).items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("adam", tensors).items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
        optimizer = self.descent.optimizer
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        self.epoch, self.step, self.best_epoch = facts["epoch"], facts["step"], facts["best_epoch"]
        self.losses = list(facts["losses"])

    def _is_whole(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bool:
        """Tell whether a checkpoint has just what `write` writes."""
        shapes: dict[str, torch.Size] = {}
        for index, (name, value) in enumerate(self.descent.parameters.items()):
            shapes |= {f"now.{name}": value.shape, f"adam.{index}.step": torch.Size([])}
            shapes |= {f"adam.{index}.{moment}": value.shape for moment in ("exp_avg", "exp_avg_sq")}
        shapes |= {f"best.{name}": value.shape for name, value in self.best.items()}
        counts, losses = [facts.get(name) for name in ("epoch", "step", "best_epoch")], facts.get("losses")
        return (
            {name: one.shape for name, one in tensors.items() if one.dtype == torch.float32} == shapes
            and all(type(one) is int and 0 <= one <= MOST_EPOCHS**2 for one in counts)
            and isinstance(losses, list)
            and all(isinstance(one, float) for one in losses)
            and len(losses) == (0 if self.descent.validate is None else facts["epoch"] + 1)
            and facts["best_epoch"] <= facts["epoch"] <= MOST_EPOCHS
        )


def _under(head: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, without the beginning."""
    return {name.removeprefix(f"{head}."): value for name, value in tensors.items() if name.startswith(f"{head}.")}


def _diverged(title: str, what: str, epoch: int) -> InputError:
    return InputError(
        f"{title}: {what} in epoch {epoch}; take a lower learning rate, or load models in float32 or bfloat16. "
        "A checkpoint, where one is written, holds the epoch before"
    )
