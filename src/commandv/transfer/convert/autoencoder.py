"""The learned mapper: one hidden layer, trained by gradient descent on rows read as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from commandv.adapters.network import Network
from commandv.arguments import checked
from commandv.errors import InputError, require_positive, require_seed
from commandv.storage.files import digest
from commandv.training.loop import Descent, Learned
from commandv.transfer.convert.fitters import Groups, check_pairs
from commandv.transfer.convert.kept import Kept
from commandv.transfer.convert.linear import Converter, Dense
from commandv.transfer.convert.rows import Rows

READ = 1024  # rows read together where nothing is learned


@checked
@dataclass(frozen=True)
class Autoencoder:
    """y = ȳ + s_y (relu(z E + e) O + o) for standardised z = (x - x̄) / s_x: Linear, ReLU, Linear.

    Minimises the mean squared error of standardised rows by AdamW on mini-batches, whose gradients accumulate over
    `accumulate` of them, and keeps the epoch that is best on rows of prompts it does not learn from. The decoder is
    learned without a bias; o is then what makes the mean error zero. Without ReLU (the paper's affine map) the two
    matrices multiply to one, and the converter folds like every affine one.

    Source: arXiv 2503.04429 (hidden width, optimiser, rate, batches, accumulation, epochs, 10 % validation). At these
    settings a few thousand rows are far too few: standardised R² on held-out prompts is .1 to .2 where ridge has .4
    to .5, and about .4 after 10 epochs at 1e-3 (docs/benchmarks/mappers.md). The paper trains on raw activations, where
    a few dimensions of huge scale make up the loss; standardising both sides is ours, and so are o and stopping early.
    Its batches are 16 whole texts, ours 16 rows.

    Attributes:
        hidden: units; None takes floor(sqrt(d_x d_y)).
        relu: False leaves the ReLU out.
        epochs: passes over the rows, at most.
        learning_rate: of AdamW.
        batch_size: rows whose gradient is taken together.
        accumulate: such batches per step.
        validation: share of the prompts that only choose the epoch; 0 keeps the last one.
        patience: epochs without improvement after which training stops.
        seed: of the initial weights, of the order of rows and of the choice of prompts.
        checkpoint: a directory in which training is kept after each epoch, and from which it resumes; one serves all
            layers. No part of what is fitted, so it is not recorded.
    """

    name: ClassVar[str] = "autoencoder"
    hidden: int | None = None
    relu: bool = True
    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 16
    accumulate: int = 4
    validation: float = 0.1
    patience: int = 3
    seed: int = 0
    checkpoint: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require_seed(self.seed)
        counts = ("hidden", "epochs", "batch_size", "accumulate", "patience")
        require_positive(**{name: getattr(self, name) for name in counts})
        if not (np.isfinite(self.learning_rate) and self.learning_rate > 0 and 0 <= self.validation < 1):
            raise InputError("learning_rate: expected above 0; validation: a share from 0 to below 1")

    def __call__(self, x: Tensor, y: Tensor, *, groups: Groups = None, kept: Kept | None = None) -> Converter:
        """Fit; see `Fitter`. Training keeps nothing of `x` alone."""
        check_pairs(x, y)
        rows, targets = (Rows.of(one, centre=True, standardise=True) for one in (x, y))
        return _Training(self, rows, targets, np.arange(rows.n) if groups is None else groups).run()

    def settings(self) -> dict[str, Any]:
        """Return what decides the result, JSON-able."""
        return asdict(replace(self, checkpoint=None))


class _Training:
    """One training: its rows, its weights, and the converter that they make."""

    def __init__(self, fit: Autoencoder, x: Rows, y: Rows, groups: np.ndarray) -> None:
        self.fit, self.x, self.y = fit, x, y
        self.learned, self.unseen = _split(groups, fit.validation, fit.seed)
        data = [part.tolist() for one in (x, y) for part in one.moments]
        self.stamp = digest(fit.settings(), groups.tolist(), data)
        hidden = fit.hidden or int((x.d * y.d) ** 0.5)
        generator = torch.Generator().manual_seed(fit.seed)

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:  # as torch initialises a linear layer
            return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) * fan_in**-0.5)

        self.weights = {
            "encode": uniform(x.d, hidden, fan_in=x.d),
            "shift": uniform(hidden, fan_in=x.d),
            "decode": uniform(hidden, y.d, fan_in=hidden),
        }

    def run(self) -> Converter:
        """Train, and return the best epoch's converter."""
        fit = self.fit
        descent = Descent(
            self.weights,
            torch.optim.AdamW(self.weights.values(), lr=fit.learning_rate),
            self._batches,
            self._losses,
            self._validation_loss if len(self.unseen) else None,
            patience=fit.patience,
        )
        file = None if fit.checkpoint is None else Path(fit.checkpoint) / f"autoencoder-{self.stamp}.safetensors"
        return self._converter(descent.run(fit.epochs, "training the autoencoder", stamp=self.stamp, checkpoint=file))

    def _batches(self, epoch: int) -> list[np.ndarray]:
        """Return the rows of each step; their order depends on the seed and the epoch alone."""
        fit = self.fit
        generator = torch.Generator().manual_seed(fit.seed * 1000 + epoch + 1)
        order = self.learned[torch.randperm(len(self.learned), generator=generator).numpy()]
        step = fit.batch_size * fit.accumulate
        return [order[a : a + step] for a in range(0, len(order), step)]

    def _losses(self, together: np.ndarray) -> Iterator[Tensor]:
        for a in range(0, len(together), self.fit.batch_size):
            yield self._error(together[a : a + self.fit.batch_size]) / (len(together) * self.y.d)

    def _converter(self, found: Learned) -> Converter:
        """Return the best epoch's converter, in the streams' own units."""
        fit, x, y = self.fit, self.x, self.y
        encode, shift, decode = (self.weights[name].detach().double() for name in ("encode", "shift", "decode"))
        # A column that is constant is known; what was learned of it is noise.
        low, high = torch.aminmax(y.raw, dim=0)
        scale = torch.from_numpy(y.scale) * (low < high)
        decode = decode * scale
        total = torch.zeros(y.d, dtype=torch.float64)
        for index in _blocks(np.arange(x.n)):
            total += self._hidden(index).detach().double().sum(0) @ decode
        bias = torch.from_numpy(y.mean) - total / x.n
        encode = encode / torch.from_numpy(x.scale)[:, None]
        mean = torch.from_numpy(x.mean)
        shared = {"epochs": found.epochs, "best_epoch": found.best, "hidden": len(shift)}
        facts = {"fit": fit.name, **shared, "validation_loss": [round(loss, 5) for loss in found.losses]}
        if not found.losses:
            del facts["validation_loss"]
        if not fit.relu:
            weight = encode @ decode
            return Dense(weight.float(), bias + shift @ decode - mean @ weight, facts)
        parts = {"mean": mean, "encode": encode, "shift": shift, "decode": decode, "bias": bias}
        return replace(Network.from_tensors({name: part.float() for name, part in parts.items()}, "relu"), facts=facts)

    def _hidden(self, index: np.ndarray) -> Tensor:
        z = torch.from_numpy(self.x.at(index).dense(np.float32))
        inner = torch.addmm(self.weights["shift"], z, self.weights["encode"])
        return torch.relu(inner) if self.fit.relu else inner

    def _error(self, index: np.ndarray) -> Tensor:
        """Return the sum of squared errors of some rows, standardised."""
        true = torch.from_numpy(self.y.at(index).dense(np.float32))
        return (self._hidden(index) @ self.weights["decode"] - true).square().sum()

    def _validation_loss(self) -> float:
        return sum(float(self._error(index)) for index in _blocks(self.unseen)) / (len(self.unseen) * self.y.d)


def _split(groups: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers to learn from and those, of whole prompts, to choose the epoch by."""
    names = np.unique(groups)
    chosen = np.random.default_rng(seed).permutation(names)[: min(round(share * len(names)), len(names) - 1)]
    unseen = np.isin(groups, chosen)
    return np.flatnonzero(~unseen), np.flatnonzero(unseen)


def _blocks(index: np.ndarray) -> Iterator[np.ndarray]:
    for a in range(0, len(index), READ):
        yield index[a : a + READ]
