"""Keeping a test off the network, and finding out when it tries."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def refused(monkeypatch: Any) -> Iterator[None]:
    """Refuse every connection but local sockets, and fail at the end if one was tried: frameworks swallow the error."""
    import huggingface_hub

    # The environment is read once, when the hub's client is imported; here that has happened.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes that a test starts
    attempts, connect = [], socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> Any:
        if self.family != socket.AF_UNIX:
            attempts.append(address)
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    def no_names(host: Any, *_: Any, **__: Any) -> Any:
        attempts.append(host)
        raise OSError(f"a test tried to look up {host}")

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    yield
    assert not attempts
