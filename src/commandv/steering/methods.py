"""Methods: from the states of two sides to one direction per layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from commandv.adapters.edit import require_numbers
from commandv.arguments import checked
from commandv.errors import InputError, MismatchError
from commandv.steering.contrast import Contrast
from commandv.steering.reading import Reading

STRENGTHS = (10.0, 1.0, 0.1, 0.01, 0.001)  # L2 strengths that cross-validation chooses from, strong to weak
FOLDS = 4


def actadd(reading: Reading) -> Tensor:
    """Activation addition: the difference of one pair, h⁺ - h⁻.

    Source: Turner et al., arXiv 2308.10248. There the difference is added position by position from the prompt's
    beginning; here the chosen positions are averaged first.
    """
    return reading.difference


def caa(reading: Reading) -> Tensor:
    """Difference in means, mean(h⁺) - mean(h⁻); contrastive activation addition when the sides are paired.

    Source: Rimsky et al., arXiv 2312.06681, eq. 1; Arditi et al., arXiv 2406.11717, section 2.3.
    """
    return reading.difference


def pca(reading: Reading) -> Tensor:
    """First principal direction of the paired differences: argmax over |u| = 1 of Σ ((h⁺ᵢ - h⁻ᵢ) · u)².

    The differences are not centred: the published code gives them random signs, which centres them in expectation
    and keeps their mean among the directions that count. The sign is that of the mean difference, and so is the
    length: that of the mean difference along the direction.

    Source: Zou et al. (RepE), arXiv 2310.01405, section 3.1.
    """
    assert reading.rows is not None
    found = []
    for positive, negative in zip(*reading.rows, strict=True):
        differences = (positive - negative).double()
        if len(differences) < differences.shape[1]:  # the smaller Gram matrix tells as much
            _, vectors = torch.linalg.eigh(differences @ differences.T)
            found.append(differences.T @ vectors[:, -1])
        else:
            _, vectors = torch.linalg.eigh(differences.T @ differences)
            found.append(vectors[:, -1])
    return _as_long_as_difference(torch.stack(found), reading)


def probe(reading: Reading) -> Tensor:
    """Direction of a logistic probe, as long as the mean difference along it; see `fit_probe`."""
    assert reading.rows is not None
    weights = [fit_probe(*sides).weight for sides in zip(*reading.rows, strict=True)]
    return _as_long_as_difference(torch.stack(weights), reading)


def _as_long_as_difference(directions: Tensor, reading: Reading) -> Tensor:
    """Return directions [n_layers, d_model] as the projection of the mean difference on them."""
    unit = torch.nn.functional.normalize(directions.double(), dim=1)
    return (reading.difference * unit).sum(1, keepdim=True) * unit


class Method(NamedTuple):
    """One way to find directions.

    Attributes:
        find: returns the directions of all layers, float64 [n_layers, d_model], as long as the sides differ along them.
        keeps_rows: whether it needs one state per prompt and layer in memory; if not, running sums.
        needs: what it asks of the contrast.
    """

    find: Callable[[Reading], Tensor]
    keeps_rows: bool = False
    needs: Literal["two sides", "pairs", "one pair"] = "two sides"

    def require(self, contrast: Contrast, name: str) -> None:
        """Raise `InputError` for a contrast that the method cannot use."""
        n_positive, n_negative = len(contrast.positive), len(contrast.negative)
        if self.needs == "one pair" and (n_positive, n_negative) != (1, 1):
            raise InputError(
                f"{name} takes one pair; {contrast.name} has {n_positive} positive and {n_negative} negative prompts. "
                "Use caa for several"
            )
        if self.needs == "pairs" and not contrast.paired:
            raise InputError(
                f"{name} needs pairs; {contrast.name} is two sets of {n_positive} and {n_negative} prompts. Give one "
                "file of {positive, negative} lines, or paired=True (--paired) where the sets belong together"
            )


METHODS: dict[str, Method] = {
    "actadd": Method(actadd, needs="one pair"),
    "caa": Method(caa),
    "pca": Method(pca, keeps_rows=True, needs="pairs"),
    "probe": Method(probe, keeps_rows=True),
}


# -- probes -------------------------------------------------------------------------------------------------------


@checked
@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe of the residual stream: log-odds h · w + b of the positive side.

    Attributes:
        weight: w, [d_model], in units of the stream itself.
        bias: b.
        layer: whose output it reads; -1 when unknown.
        positions: at which tokens, in the notation of `Positions` or as words.
        strength: of the L2 penalty it was fitted with, on standardised states.
    """

    weight: Tensor
    bias: float
    layer: int = -1
    positions: str = "l1"
    strength: float = 0.0

    def scores(self, h: Tensor) -> Tensor:
        """Return the log-odds [...] of states `h` [..., d_model].

        Raises:
            MismatchError: states of another width, or whole numbers.
        """
        if h.shape[-1:] != self.weight.shape or not h.is_floating_point() or h.layout != torch.strided:
            raise MismatchError(
                f"states of {h.dtype} {tuple(h.shape)}, expected floating-point ones [..., {len(self.weight)}]"
            )
        return h.double() @ self.weight.double() + self.bias


@checked
def auc(one: Probe, positive: Tensor, negative: Tensor) -> float:
    """Return the share of (positive, negative) pairs of states that a probe orders rightly, ties half.

    Args:
        one: the probe.
        positive: states [n, d_model], none of which it was fitted on.
        negative: states [m, d_model], likewise.
    """
    shapes = [tuple(states.shape) for states in (positive, negative)]
    if any(len(shape) != 2 or not shape[0] for shape in shapes):
        raise InputError(f"auc of states of the shapes {shapes}: expected some of each, [n, d_model]")
    for states in (positive, negative):
        require_numbers(states, "states of a probe")
    from sklearn.metrics import roc_auc_score

    scores = torch.cat([one.scores(positive), one.scores(negative)]).numpy()
    return float(roc_auc_score(np.repeat([1, 0], [len(positive), len(negative)]), scores))


@checked
def fit_probe(positive: Tensor, negative: Tensor, *, strength: float | None = None) -> Probe:
    """Fit a logistic probe: minimise mean log(1 + exp(-y (z w + b))) + strength / 2 · |w|² with y = ±1.

    z are the states standardised dimension by dimension; the result reads the stream itself.

    Args:
        positive: states [n, d_model].
        negative: states [m, d_model].
        strength: of the penalty; None chooses the one of `STRENGTHS` with the lowest log-loss in `FOLDS`-fold
            cross-validation. State i of either side is in fold i modulo `FOLDS`, so that pairs stay together.

    Raises:
        InputError: fewer than 2 states on a side, or a strength that is not positive.
    """
    shapes = [tuple(states.shape) for states in (positive, negative)]
    if any(len(shape) != 2 or shape[0] < 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise InputError(f"a probe of states of the shapes {shapes}: expected 2 or more of each, [n, d_model]")
    for states in (positive, negative):
        require_numbers(states, "states of a probe")
    smaller = min(len(positive), len(negative))
    if strength is not None and not 0 < strength < math.inf:
        raise InputError(f"strength={strength}: expected a positive number")
    x = torch.cat([positive, negative]).double().numpy()
    y = np.repeat([1.0, -1.0], [len(positive), len(negative)])
    mean, scale = x.mean(0), x.std(0)
    scale[scale <= 1e-12 * scale.max(initial=0)] = np.inf  # a constant dimension tells nothing
    z = (x - mean) / scale
    basis = None
    if len(z) < z.shape[1]:  # the best w lies in the span of the rows
        left, singular, basis = np.linalg.svd(z, full_matrices=False)
        z = left * singular
    if strength is None:
        folds = np.concatenate([np.arange(len(positive)), np.arange(len(negative))]) % min(FOLDS, smaller)
        losses = [
            _path_losses(z[folds != k], y[folds != k], z[folds == k], y[folds == k]) for k in range(max(folds) + 1)
        ]
        strength = STRENGTHS[int(np.argmin(np.mean(losses, axis=0)))]
    solution = _logistic(z, y, strength)
    weight = (solution[:-1] if basis is None else solution[:-1] @ basis) / scale
    return Probe(torch.from_numpy(weight), float(solution[-1] - mean @ weight), strength=strength)


def _path_losses(z: np.ndarray, y: np.ndarray, z_test: np.ndarray, y_test: np.ndarray) -> list[float]:
    """Return the log-loss on unseen states for each of `STRENGTHS`."""
    solutions = [_logistic(z, y, strength) for strength in STRENGTHS]
    return [float(np.logaddexp(0, -y_test * (z_test @ one[:-1] + one[-1])).mean()) for one in solutions]


def _logistic(z: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """Return (w, b) of the penalised logistic regression of y = ±1 on rows z [n, d]."""
    from sklearn.linear_model import LogisticRegression

    # Its penalty is on the sum of the losses; ours on their mean.
    fitted = LogisticRegression(C=1 / (strength * len(y)), tol=1e-6, max_iter=1000).fit(z, y)
    return np.append(fitted.coef_[0], fitted.intercept_)
