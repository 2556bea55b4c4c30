"""Converters between two residual streams: linear maps fitted on paired rows, folded rather than materialised."""

from commandv.convert.factor import FactorStore
from commandv.convert.fitters import FITTERS, Affine, Fitter, Pinv, Procrustes, ReducedRank, Ridge
from commandv.convert.linear import Converter

__all__ = [
    "FITTERS",
    "Affine",
    "Converter",
    "FactorStore",
    "Fitter",
    "Pinv",
    "Procrustes",
    "ReducedRank",
    "Ridge",
]
