"""Mapping whole states of one model into another's stream, and putting them there while it runs."""

from commandv.mapping.mappers import (
    MAPPED,
    MEAN_ABLATION,
    ROTATED,
    SHUFFLED,
    Mapper,
    fit_mapper,
    layer_pair,
    mapper_arms,
    unseen,
)
from commandv.mapping.pairing import Pairing, pair_tokens
from commandv.mapping.replacing import Along, Counterparts, pairing, read_counterparts, replaced

__all__ = [
    "MAPPED",
    "MEAN_ABLATION",
    "ROTATED",
    "SHUFFLED",
    "Along",
    "Counterparts",
    "Mapper",
    "Pairing",
    "fit_mapper",
    "layer_pair",
    "mapper_arms",
    "pair_tokens",
    "pairing",
    "read_counterparts",
    "replaced",
    "unseen",
]
