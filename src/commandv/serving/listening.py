"""The address a server listens on, taken before anything slow is imported or loaded."""

from __future__ import annotations

import errno
import ipaddress
import socket

from commandv.errors import InputError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before anything slow is loaded; port 0 takes a free one."""
    if not 0 <= port <= 65535:
        raise InputError(f"port {port}: expected 0 to 65535")
    try:
        return socket.create_server((host, port), family=_family(host), backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is taken, by another server perhaps; stop that one, or choose another --port"
            ) from error
        raise InputError(f"cannot listen on {host}, port {port}: {error.strerror or error}; check --host") from error


def address(listening: socket.socket) -> str:
    """Return where a listening server is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _family(host: str) -> socket.AddressFamily:
    try:
        return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return socket.AF_INET
