"""Which donor layer goes to which recipient layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from commandv.arguments import checked
from commandv.errors import InputError
from commandv.profiles.profile import Profile, paired_rows

ERROR_ROWS = 1024  # prompts on which `lowest_error` fits and judges
ERROR_STRENGTH = 0.3  # of its ridge, relative to the mean eigenvalue


class LayerPair(NamedTuple):
    """A donor layer and the recipient layer that takes its place, both 0-based block outputs."""

    donor: int
    recipient: int


Matcher = Callable[[Profile, Profile, Iterable[int]], list[LayerPair]]


@checked
def proportional(donor: Profile, recipient: Profile, layers: Iterable[int]) -> list[LayerPair]:
    """Match l to floor(alpha · l) with alpha = recipient depth / donor depth (arXiv 2506.19140, section 3.1)."""
    return [LayerPair(layer, layer * recipient.n_layers // donor.n_layers) for layer in layers]


@checked
def nearest(donor: Profile, recipient: Profile, layers: Iterable[int]) -> list[LayerPair]:
    """Match l to the layer nearest to alpha · l, as the paper's released code does.

    Where alpha · l lies half-way between two layers the lower one wins. The released map comes out wrong for models
    of equal depth; here those match one to one.
    """
    pairs = []
    for layer in layers:
        exact = layer * recipient.n_layers / donor.n_layers
        best = min(range(recipient.n_layers), key=lambda own: (abs(own - exact), own))
        pairs.append(LayerPair(layer, best))
    return pairs


def covering(donor: Profile, recipient: Profile, layers: Iterable[int]) -> list[LayerPair]:
    """Match every recipient layer r to the donor layer floor(r / alpha), so that none goes without and none gets two.

    For directions, which exist at every layer of the donor: unlike an adapter's deltas they should not add up where a
    deeper donor has several layers for one of the recipient.
    """
    own, wanted = range(recipient.n_layers), set(layers)
    pairs = [LayerPair(layer * donor.n_layers // recipient.n_layers, layer) for layer in own]
    return [pair for pair in pairs if pair.donor in wanted]


@checked
def lowest_error(donor: Profile, recipient: Profile, layers: Iterable[int]) -> list[LayerPair]:
    """Match each donor layer to the recipient layer that predicts it best on unseen prompts.

    A ridge of fixed strength reads the donor's last-token rows from the recipient's; the mean squared error, each
    dimension in units of its variance, is taken on a quarter of the prompts (at most `ERROR_ROWS` in all).
    The paper reports that maps chosen by error do worse than `proportional` (arXiv 2506.19140, section 5).
    """
    layers = list(layers)
    i, j, _ = paired_rows(donor, recipient, "end")
    keep = np.random.default_rng(0).permutation(len(i))[:ERROR_ROWS]
    fitted = np.arange(len(keep)) < max(1, len(keep) * 3 // 4)
    targets = [_standardised(donor.layer(layer), i[keep], fitted) for layer in layers]
    errors = []
    for own in range(recipient.n_layers):
        x = _standardised(recipient.layer(own), j[keep], fitted)
        gram = x[fitted] @ x[fitted].T
        weights = np.linalg.solve(
            gram + ERROR_STRENGTH * np.trace(gram) / len(gram) * np.eye(len(gram)), np.eye(len(gram))
        )
        hat = (x[~fitted] @ x[fitted].T) @ weights
        errors.append([float(((hat @ y[fitted] - y[~fitted]) ** 2).mean()) for y in targets])
    best = np.argmin(np.array(errors), axis=0)
    return [LayerPair(layer, int(own)) for layer, own in zip(layers, best, strict=True)]


def _standardised(rows: Tensor, index: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Return rows [n, d] in units of the fitted rows' standard deviation, around their mean."""
    values = rows[torch.from_numpy(index)].double().numpy()
    spread = values[fitted].std(0)
    return (values - values[fitted].mean(0)) / np.where(spread > 0, spread, 1)


@checked
def explicit(pairs: Mapping[int, int]) -> Matcher:
    """Return a matcher that follows a given map from donor layer to recipient layer.

    Raises:
        InputError: a layer that is no whole number; when used, if an adapter's layer is not in the map or a layer does
            not exist.
    """

    def matcher(donor: Profile, recipient: Profile, layers: Iterable[int]) -> list[LayerPair]:
        found = []
        for layer in layers:
            if layer not in pairs:
                raise InputError(f"the layer map says nothing of donor layer {layer}; it has {sorted(pairs)}")
            if not 0 <= pairs[layer] < recipient.n_layers:
                raise InputError(
                    f"the layer map sends {layer} to {pairs[layer]}, outside 0 .. {recipient.n_layers - 1}"
                )
            found.append(LayerPair(layer, pairs[layer]))
        return found

    return matcher


MATCHERS: dict[str, Matcher] = {
    "proportional": proportional,
    "nearest": nearest,
    "covering": covering,
    "lowest-error": lowest_error,
}
