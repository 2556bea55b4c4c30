"""Counting the factorisations that fits ask for."""

from __future__ import annotations

import pytest

from commandv.transfer.convert.factor import Cholesky, Factor, Spectral


@pytest.fixture
def factorisations(monkeypatch) -> list[str]:
    seen: list[str] = []
    for cls in (Factor, Cholesky, Spectral):
        original = cls.of.__func__

        def counted(kind, *args, original=original):
            seen.append(kind.__name__)
            return original(kind, *args)

        monkeypatch.setattr(cls, "of", classmethod(counted))
    return seen
