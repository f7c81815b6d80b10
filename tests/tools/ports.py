"""Ports of loopback for servers that cannot be told to choose one themselves."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

#: Below what Linux gives to outgoing connections (ip_local_port_range), so that none of those
#: takes a port while its server is being started, or started again.
_RANGE = range(12_000, 32_000)
_LOCKS = Path(tempfile.gettempdir()) / f"narseal-tests-ports-{os.geteuid()}"
#: Open descriptors of lock files: a port belongs to this process until it ends.
_held: list[int] = []


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on, each this process's own for as long as it lives.

    Whoever else asks here, in another run of the tests, gets others: each port has a lock file.
    """
    _LOCKS.mkdir(mode=0o700, exist_ok=True)
    found: list[int] = []
    for port in random.sample(_RANGE, len(_RANGE)):
        if len(found) == count:
            return found
        if _take(port):
            found.append(port)
    raise RuntimeError(f"fewer than {count} ports are free")


def _take(port: int) -> bool:
    """Whether a port is ours now."""
    lock = os.open(_LOCKS / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        socket.create_server(("", port)).close()  # some servers listen on all addresses
    except OSError:
        os.close(lock)
        return False
    _held.append(lock)
    return True
