"""The ways to fit a converter, by name."""

from __future__ import annotations

from typing import Any

from commandv.transfer.convert.autoencoder import Autoencoder
from commandv.transfer.convert.fitters import Affine, Pinv, Procrustes, ReducedRank, Ridge
from commandv.transfer.convert.fourier import FourierRidge

FITTERS: dict[str, type[Any]] = {
    cls.name: cls for cls in (Ridge, Pinv, Affine, ReducedRank, Procrustes, FourierRidge, Autoencoder)
}
