"""Converters between two residual streams, fitted on paired rows; affine ones are folded rather than materialised."""

from commandv.adapters.network import Network
from commandv.transfer.convert.autoencoder import Autoencoder
from commandv.transfer.convert.fitters import Affine, Fitter, Pinv, Procrustes, ReducedRank, Ridge
from commandv.transfer.convert.fourier import FourierRidge
from commandv.transfer.convert.linear import AffineMap, Converter, Dense
from commandv.transfer.convert.table import FITTERS

__all__ = [
    "FITTERS",
    "Affine",
    "AffineMap",
    "Autoencoder",
    "Converter",
    "Dense",
    "Fitter",
    "FourierRidge",
    "Network",
    "Pinv",
    "Procrustes",
    "ReducedRank",
    "Ridge",
]
