"""Converters between two residual streams, fitted on paired rows; affine ones are folded rather than materialised."""

from commandv.transfer.convert.autoencoder import Autoencoder
from commandv.transfer.convert.factor import FactorStore
from commandv.transfer.convert.fitters import Affine, Fitter, Pinv, Procrustes, ReducedRank, Ridge
from commandv.transfer.convert.fourier import FourierRidge
from commandv.transfer.convert.linear import Converter
from commandv.transfer.convert.network import Network
from commandv.transfer.convert.table import FITTERS

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
