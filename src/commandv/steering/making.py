"""Steering adapters: a direction per layer, and the ways to apply it, all of the one form (`commandv.adapters`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from commandv.adapters.adapter import Adapter, Intervention
from commandv.adapters.kinds import ablation, steering_vector
from commandv.arguments import checked
from commandv.errors import InputError, require_known
from commandv.models.identity import ModelRef
from commandv.models.layers import LayerChoice, choose_layers
from commandv.models.lm import LM
from commandv.models.state import require_own
from commandv.positions import EVERYWHERE, Positions, as_positions
from commandv.profiles.profile import Profile
from commandv.steering.contrast import Contrast
from commandv.steering.methods import METHODS, Method, Probe, fit_probe
from commandv.steering.reading import Reading, Stream, Triggers, profile_stream, read_contrast

# -- ways to apply a direction ------------------------------------------------------------------------------------


@checked
def mean_ablation_along(directions: Tensor, mean: Tensor) -> tuple[Intervention, ...]:
    """Mean-ablation along directions: h - (h - mean) Uᵀ U, so that every state has the mean's part in their span.

    Args:
        directions: [n, d_model] or [d_model]; U is an orthonormal basis of their span.
        mean: [d_model].
    """
    (one,) = ablation(directions)
    return (replace(one, bias=-(one.read.double() @ mean.double()).float()),)


@checked
def clamp(direction: Tensor, level: float, *, at_most: bool = False) -> tuple[Intervention, ...]:
    """Clamp the part along a direction to at least a level: h + relu(level - h · u) u, with u = v / |v|.

    Args:
        direction: v, [d_model].
        level: in units of the stream.
        at_most: keep it at most there instead: h - relu(h · u - level) u.
    """
    sign = -1.0 if at_most else 1.0
    unit = sign * torch.nn.functional.normalize(direction.float(), dim=0)[None]
    return (Intervention(-unit, torch.tensor([sign * level]).float(), unit, "relu"),)


def _add(v: Tensor, length: float, _stream: Stream | None) -> tuple[Intervention, ...]:
    return steering_vector(torch.nn.functional.normalize(v, dim=0), length)


def _ablate(v: Tensor, share: float, _stream: Stream | None) -> tuple[Intervention, ...]:
    return tuple(replace(one, write=share * one.write) for one in ablation(v))


def _mean_ablate(v: Tensor, share: float, stream: Stream | None) -> tuple[Intervention, ...]:
    assert stream is not None
    return tuple(replace(one, write=share * one.write) for one in mean_ablation_along(v, stream.mean))


def _clamp(v: Tensor, length: float, stream: Stream | None) -> tuple[Intervention, ...]:
    assert stream is not None
    start = (stream.low if length >= 0 else stream.high) @ torch.nn.functional.normalize(v.double(), dim=0)
    return clamp(v, float(start) + length, at_most=length < 0)


# name -> (direction, length or share, stream) -> interventions; see `from_directions` for what they mean.
APPLICATIONS: dict[str, Callable[[Tensor, float, Stream | None], tuple[Intervention, ...]]] = {
    "add": _add,
    "ablate": _ablate,
    "mean-ablate": _mean_ablate,
    "clamp": _clamp,
}
BY_LENGTH = ("add", "clamp")  # their strength is a length along the direction, that of the others a share


@checked
def from_directions(
    directions: Mapping[int, Tensor],
    model: ModelRef,
    *,
    kind: str = "add",
    strength: float = 1.0,
    relative: bool = False,
    at: Positions | str = EVERYWHERE,
    typical: Reading | Profile | None = None,
    name: str = "steering",
) -> Adapter:
    """Return the adapter that applies one direction v (or, for ablations, several) per layer, with u = v / |v|.

    Args:
        directions: layer -> v [d_model], or [n, d_model] for `ablate` and `mean-ablate`.
        model: the model they are for.
        kind: `add`: h + length · u. `ablate`: h - strength · (h · u) u. `mean-ablate`: h - strength · ((h - mean) ·
            u) u. `clamp`: the part along u at least low · u + length, with low the mean of the negative side (of a
            profile, of everything); for a negative length at most high · u + length, with high that of the positive.
        strength: 1 makes the length that of v, or ablates wholly.
        relative: make the length `strength` times the typical norm of a state at that layer instead.
        at: the tokens to act on.
        typical: what the stream is like: what `relative`, `mean-ablate` and `clamp` go by.
        name: what it does, for people.

    Raises:
        InputError: an unknown kind, a direction of zeros, `relative` for an ablation, or nothing to go by.
    """
    require_known("kind", kind, APPLICATIONS)
    if not math.isfinite(strength):
        raise InputError(f"strength={strength}: expected a finite number")
    if relative and kind not in BY_LENGTH:
        raise InputError(f"kind {kind!r} takes no relative strength; its strength is the share that is taken away")
    if typical is None and (relative or kind in ("mean-ablate", "clamp")):
        raise InputError(f"kind {kind!r}{' with relative strength' if relative else ''} needs typical=, a profile")
    where = as_positions(at)
    made = {}
    for layer, v in sorted(directions.items()):
        if not torch.isfinite(v).all() or not v.any():
            raise InputError(f"{name}: the direction at layer {layer} is zero or not finite; the sides do not differ")
        if kind in BY_LENGTH and v.ndim != 1:
            raise InputError(f"{name}: {kind} takes one direction per layer, got shape {tuple(v.shape)}")
        stream = _stream(typical, layer)
        amount = strength
        if kind in BY_LENGTH:
            amount *= stream.norm if relative and stream else float(v.double().norm())
        many = APPLICATIONS[kind](v.float(), amount, stream)
        made[layer] = tuple(replace(one, positions=where) for one in many)
    return Adapter(made, model, name)


def _stream(typical: Reading | Profile | None, layer: int) -> Stream | None:
    if typical is None:
        return None
    return typical.stream(layer) if isinstance(typical, Reading) else profile_stream(typical, layer)


# -- from a contrast ----------------------------------------------------------------------------------------------


@checked
def directions(
    lm: LM,
    contrast: Contrast,
    method: str = "caa",
    positions: Positions | str = "l1",
    *,
    trigger: Triggers = None,
    batch_size: int = 16,
) -> Tensor:
    """Return every layer's direction from one pass, float64 [n_layers, d_model]; arguments as in `steer`.

    A direction is as long as the means of the two sides lie apart along it, so that adding it once moves the negative
    side's mean to the positive side's.
    """
    require_own(lm, "reading directions")
    chosen = _method(method, contrast)
    reading = read_contrast(
        lm, contrast, as_positions(positions), trigger=trigger, keep_rows=chosen.keeps_rows, batch_size=batch_size
    )
    return chosen.find(reading)


@checked
def steer(
    lm: LM,
    contrast: Contrast,
    *,
    method: str = "caa",
    positions: Positions | str = "l1",
    trigger: Triggers = None,
    layers: LayerChoice = "middle_third",
    kind: str = "add",
    strength: float = 1.0,
    relative: bool = False,
    at: Positions | str = EVERYWHERE,
    batch_size: int = 16,
    name: str = "",
) -> Adapter:
    """Make a steering adapter from a contrast, in one pass.

    `actadd` and `caa` keep running sums only, so that memory is bounded by the batch; `pca` and `probe` keep one state
    per prompt and layer.

    Args:
        lm: the model.
        contrast: prompts of two sides.
        method: `actadd` (one pair), `caa` (difference in means), `pca` (of paired differences), `probe` (logistic).
        positions: tokens to read: `l1` (last prompt token), `l4`, `all`, `g8` (first tokens of replies). A prompt's
            state is the mean over them.
        trigger: read at the last token of this string in each prompt instead; a pair of strings where the sides have
            different ones.
        layers: layers to act on: a choice by name or the layers. Each acts at full strength.
        kind: `add`, `ablate`, `mean-ablate` or `clamp`; see `from_directions`.
        strength: 1 adds what the sides differ by.
        relative: take the strength as a share of the stream's typical norm at each layer.
        at: tokens to act on.
        batch_size: sequences per forward pass.
        name: what it does, for people. Default: the contrast's name.

    Raises:
        InputError: an unknown method or kind, a contrast that the method cannot use, positions outside a prompt, a
            trigger that is not there, sides that do not differ, or an adapter that is attached.
    """
    require_own(lm, "steering")
    chosen, where = _method(method, contrast), choose_layers(layers, lm.n_layers)
    require_known("kind", kind, APPLICATIONS)
    place = as_positions(positions)
    reading = read_contrast(lm, contrast, place, trigger=trigger, keep_rows=chosen.keeps_rows, batch_size=batch_size)
    found = chosen.find(reading)
    made = from_directions(
        {layer: found[layer] for layer in where}, lm.ref, kind=kind, strength=strength, relative=relative, at=at,
        typical=reading, name=name or contrast.name,
    )  # fmt: skip
    provenance = {
        "made_by": "steer",
        "method": method,
        "contrast": {
            "name": contrast.name,
            "hash": contrast.hash,
            "n": [len(contrast.positive), len(contrast.negative)],
        },
        "positions": str(place),
        "trigger": list(trigger) if isinstance(trigger, tuple) else trigger,
        "kind": kind,
        "strength": strength,
        "relative": relative,
        "layers": [
            {"layer": layer, "length": float(found[layer].norm()), "typical_norm": float(reading.norms[layer])}
            for layer in where
        ],
    }
    return replace(made, provenance=provenance)


@checked
def probes(
    lm: LM,
    contrast: Contrast,
    *,
    positions: Positions | str = "l1",
    trigger: Triggers = None,
    layers: LayerChoice = "all_layers",
    strength: float | None = None,
    batch_size: int = 16,
) -> dict[int, Probe]:
    """Fit a logistic probe per layer that tells the sides of a contrast apart, from one pass.

    Args:
        lm: the model.
        contrast: prompts of two sides.
        positions: tokens to read, as in `steer`.
        trigger: as in `steer`.
        layers: layers to probe.
        strength: of the L2 penalty; None for cross-validation, see `fit_probe`.
        batch_size: sequences per forward pass.
    """
    where, place = choose_layers(layers, lm.n_layers), as_positions(positions)
    reading = read_contrast(lm, contrast, place, trigger=trigger, keep_rows=True, batch_size=batch_size)
    assert reading.rows is not None
    positive, negative = reading.rows
    words = f"trigger {trigger!r}" if trigger is not None else str(place)
    return {
        layer: replace(fit_probe(positive[layer], negative[layer], strength=strength), layer=layer, positions=words)
        for layer in where
    }


def _method(name: str, contrast: Contrast) -> Method:
    require_known("method", name, METHODS)
    METHODS[name].require(contrast, name)
    return METHODS[name]
