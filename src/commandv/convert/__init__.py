"""Converters between two residual streams, fitted on paired rows; affine ones are folded rather than materialised."""

from commandv.convert.autoencoder import Autoencoder
from commandv.convert.factor import FactorStore
from commandv.convert.fitters import Affine, Fitter, Pinv, Procrustes, ReducedRank, Ridge
from commandv.convert.fourier import FourierRidge
from commandv.convert.linear import Converter
from commandv.convert.network import Network
from commandv.convert.table import FITTERS

__all__ = [
    "FITTERS",
    "Affine",
    "Autoencoder",
    "Converter",
    "FactorStore",
    "Fitter",
    "FourierRidge",
    "Network",
    "Pinv",
    "Procrustes",
    "ReducedRank",
    "Ridge",
]
