"""What constructs interventions: the ReFT family as rows of one table, steering vectors and directional ablation.

Each constructor returns interventions whose deltas add up. `KINDS` is what training, pyreft's files and the command
line know of the ReFT family: a kind is one row of it.

Source: Wu et al., ReFT, arXiv 2404.03592, and pyreft (the family); Arditi et al., arXiv 2406.11717 (ablation).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from commandv.adapters.adapter import Intervention
from commandv.adapters.edit import require_numbers
from commandv.arguments import checked
from commandv.errors import InputError


@checked
def loreft(weight: Tensor, bias: Tensor, rotation: Tensor, activation: str = "linear") -> tuple[Intervention, ...]:
    """LoReFT: h + (act(h Wᵀ + b) - h Q) Qᵀ.

    Args:
        weight: W, [rank, d_model].
        bias: b, [rank].
        rotation: Q, [d_model, rank], orthonormal columns.
        activation: a name in `ACTIVATIONS`.
    """
    if activation == "linear":
        return (Intervention(weight - rotation.T, bias, rotation.T),)
    return (
        Intervention(weight, bias, rotation.T, activation),
        Intervention(rotation.T, torch.zeros_like(bias), -rotation.T),
    )


@checked
def noreft(
    source_weight: Tensor, source_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, activation: str = "linear"
) -> tuple[Intervention, ...]:
    """NoReFT: h + (act(h Sᵀ + s) - (h Pᵀ + p)) P; all weights [rank, d_model], all biases [rank]."""
    if activation == "linear":
        return (Intervention(source_weight - proj_weight, source_bias - proj_bias, proj_weight),)
    return (
        Intervention(source_weight, source_bias, proj_weight, activation),
        Intervention(proj_weight, proj_bias, -proj_weight),
    )


@checked
def consreft(bias: Tensor, rotation: Tensor) -> tuple[Intervention, ...]:
    """ConsReFT: h + (b - h Q) Qᵀ with b [rank] and Q [d_model, rank]."""
    return (Intervention(-rotation.T, bias, rotation.T),)


@checked
def lobireft(bias: Tensor, rotation: Tensor) -> tuple[Intervention, ...]:
    """LobiReFT: h + b Qᵀ with b [rank] and Q [d_model, rank]."""
    return (Intervention(torch.zeros_like(rotation.T), bias, rotation.T),)


@checked
def direft(weight: Tensor, bias: Tensor, rotation: Tensor, activation: str = "linear") -> tuple[Intervention, ...]:
    """DiReFT: h + act(h Wᵀ + b) Qᵀ with W [rank, d_model], b [rank], Q [d_model, rank]."""
    return (Intervention(weight, bias, rotation.T, activation),)


@checked
def nodireft(
    source_weight: Tensor, source_bias: Tensor, proj_weight: Tensor, activation: str = "linear"
) -> tuple[Intervention, ...]:
    """NodiReFT: h + act(h Sᵀ + s) P with weights [rank, d_model]; pyreft's projection bias is never used."""
    return (Intervention(source_weight, source_bias, proj_weight, activation),)


@checked
def steering_vector(vector: Tensor, strength: float = 1.0) -> tuple[Intervention, ...]:
    """A steering vector: h + strength · v with v [d_model].

    Raises:
        InputError: not one vector of floating-point numbers; complex and whole numbers are not cut down.
    """
    if vector.ndim != 1:
        raise InputError(f"a steering vector of shape {tuple(vector.shape)}, expected [d_model]")
    require_numbers(vector, "a steering vector")
    return (Intervention(torch.zeros(1, len(vector)), torch.ones(1), strength * vector[None].float()),)


@checked
def ablation(directions: Tensor) -> tuple[Intervention, ...]:
    """Directional ablation: h - (h Uᵀ) U, the projection off the span of `directions` [n, d_model] or [d_model].

    Source: Arditi et al., arXiv 2406.11717, eq. 4 (one direction).

    Raises:
        InputError: directions that are all zero, or not finite.
    """
    if not directions.is_floating_point():
        raise InputError(f"ablation: the directions are {directions.dtype}, expected floating-point numbers")
    rows = directions.float().reshape(-1, directions.shape[-1])
    if not torch.isfinite(rows).all() or not rows.any():
        raise InputError("ablation: the directions are all zero, or hold NaN or infinity; there is nothing to ablate")
    rows = torch.nn.functional.normalize(rows)
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[singular > max(rows.shape) * torch.finfo(rows.dtype).eps * singular[0]]
    return (Intervention(basis, torch.zeros(len(basis)), -basis),)


@dataclass(frozen=True)
class Part:
    """One tensor of a kind."""

    # "rows" is [rank, d_model], "vector" is [rank], "rotation" is [d_model, rank] with orthonormal columns
    shape: Literal["rows", "vector", "rotation"]
    pyreft: str  # its key in pyreft's files
    start: str  # its value when training begins: "random", "zeros", or that of the part named (as rows)
    optional: bool = False  # a file may leave it out, which means zeros


@dataclass(frozen=True)
class Kind:
    """One kind of the ReFT family."""

    title: str  # its name as papers write it; pyreft's class is this with "Intervention" behind
    formula: str  # what becomes of h
    build: Callable[..., tuple[Intervention, ...]]  # its constructor, which takes its parts by name
    # its tensors, all of which are trained, in the order in which training draws their first values
    parts: Mapping[str, Part]

    @property
    def name(self) -> str:
        """Its key in `KINDS`."""
        return self.title.lower()

    def construct(self, parts: Mapping[str, Tensor], activation: str = "linear") -> tuple[Intervention, ...]:
        """Return its interventions; a kind without an activation ignores it."""
        takes = "activation" in inspect.signature(self.build).parameters
        return self.build(**parts, **({"activation": activation} if takes else {}))


_ROTATION = Part("rotation", "rotate_layer", "random")
_PROJECTION = Part("rows", "proj_layer.weight", "random")
_CONSTANT = Part("vector", "learned_source", "zeros")
_BIAS = Part("vector", "learned_source.bias", "zeros")
_WEIGHT = Part("rows", "learned_source.weight", "zeros")

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "LoReFT",
            "h + (act(h Wᵀ + b) - h Q) Qᵀ",
            loreft,
            {
                "rotation": _ROTATION,
                "weight": Part("rows", "weight", start="rotation"),
                "bias": Part("vector", "bias", "zeros"),
            },
        ),
        Kind(
            "NoReFT",
            "h + (act(h Sᵀ + s) - (h Pᵀ + p)) P",
            noreft,
            {
                "proj_weight": _PROJECTION,
                "source_weight": Part("rows", "learned_source.weight", start="proj_weight"),
                "source_bias": _BIAS,
                "proj_bias": Part("vector", "proj_layer.bias", "zeros", optional=True),  # pyreft's add_bias=False
            },
        ),
        Kind("ConsReFT", "h + (b - h Q) Qᵀ", consreft, {"rotation": _ROTATION, "bias": _CONSTANT}),
        Kind("LobiReFT", "h + b Qᵀ", lobireft, {"rotation": _ROTATION, "bias": _CONSTANT}),
        Kind("DiReFT", "h + act(h Wᵀ + b) Qᵀ", direft, {"rotation": _ROTATION, "weight": _WEIGHT, "bias": _BIAS}),
        Kind(
            "NodiReFT",
            "h + act(h Sᵀ + s) P",
            nodireft,
            {"proj_weight": _PROJECTION, "source_weight": _WEIGHT, "source_bias": _BIAS},
        ),
    )
}
