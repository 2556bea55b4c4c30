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

WAIT = 30.0  # seconds that an address has to answer, unless it is said


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
    require_listener(address, wait)
    code = f"import ray; ray.init(address={address!r}, log_to_driver=False); print('connected')"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=wait)
    except subprocess.TimeoutExpired:
        raise _no_cluster(address, f"no answer within {wait:g} s") from None
    if "connected" not in done.stdout:
        raise _no_cluster(address, (done.stderr.strip().splitlines() or ["it refused the connection"])[-1][:300])


def require_listener(address: str, wait: float) -> None:
    """Raise `WorkerError` where nobody listens at an address, of those that name a host and a port; Ray is not needed.

    Args:
        address: as `commandv.Ray` takes it.
        wait: seconds that it has to answer.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and number_of(port, most=10**6) is not None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=wait).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, problem: str) -> WorkerError:
    return WorkerError(
        f"no Ray cluster at {address} ({problem}); start one with `ray start --head`, or give its address"
    )
