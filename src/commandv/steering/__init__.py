"""Steering: directions from what a model's own states tell apart, applied natively or carried into another model."""

from commandv.steering.carrying import carry_directions, carry_probes
from commandv.steering.contrast import Contrast, load_contrast
from commandv.steering.making import (
    APPLICATIONS,
    clamp,
    directions,
    from_directions,
    mean_ablation_along,
    probes,
    steer,
)
from commandv.steering.methods import METHODS, Method, Probe, auc, fit_probe
from commandv.steering.reading import (
    Reading,
    Stream,
    mean_states,
    profile_stream,
    prompt_states,
    read_contrast,
    states,
)

__all__ = [
    "APPLICATIONS",
    "METHODS",
    "Contrast",
    "Method",
    "Probe",
    "Reading",
    "Stream",
    "auc",
    "carry_directions",
    "carry_probes",
    "clamp",
    "directions",
    "fit_probe",
    "from_directions",
    "load_contrast",
    "mean_ablation_along",
    "mean_states",
    "probes",
    "profile_stream",
    "prompt_states",
    "read_contrast",
    "states",
    "steer",
]
