"""Finding a Ray cluster: one that this process starts, one it is connected to, or one at an address."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator

from commandv.errors import InputError, WorkerError
from commandv.storage.reading import first_line, number_of


@contextlib.contextmanager
def connected(address: str | None, wait: float) -> Iterator[None]:
    """Be connected to a cluster; one that is connected already, by whoever, is used and left alone."""
    try:
        import ray
    except ImportError as error:
        raise InputError("Ray is not installed; pip install 'commandv[ray]'") from error
    if ray.is_initialized():
        yield
        return
    if address is not None:
        _require_answer(address, wait)
    try:
        ray.init(
            address=address or "local", log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING
        )
    except Exception as error:  # a bare one where its processes do not start in time
        raise WorkerError(
            f"Ray does not start here ({first_line(error)}); run the same again when the machine is less busy, or "
            "without Ray"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str, wait: float) -> None:
    """Try an address in a process of its own: a client that finds no cluster may wait for minutes, or end its process.

    Raises:
        WorkerError: no cluster answers there in time.
    """
    problem = ""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and number_of(port, most=10**6) is not None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=wait).close()
        except (OSError, OverflowError) as error:
            problem = str(error)
    if not problem:
        code = f"import ray; ray.init(address={address!r}, log_to_driver=False); print('connected')"
        try:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=wait)
            if "connected" not in done.stdout:
                problem = (done.stderr.strip().splitlines() or ["it refused the connection"])[-1][:300]
        except subprocess.TimeoutExpired:
            problem = f"no answer within {wait:g} s"
    if problem:
        raise WorkerError(
            f"no Ray cluster at {address} ({problem}); start one with `ray start --head`, or give its address"
        )
