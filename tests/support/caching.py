"""A cache directory for every test, so that none sees what others have left."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def cache(request, tmp_path_factory, monkeypatch):
    """Every test has a cache directory of its own; one that runs real models has the user's, with their conversions."""
    if request.node.get_closest_marker("real"):
        return None
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COMMANDV_CACHE", str(path))
    return path
