"""The listening sockets: TCP by SO_REUSEPORT, one for each worker; Unix; or systemd's."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from narseal.errors import ConfigError

_BACKLOG = 1024
_FIRST_SYSTEMD = 3


def listen(address: str, workers: int) -> list[list[socket.socket]]:
    """The sockets of each worker for `host:port`, `unix:/path` or `systemd`.

    They stay open in the supervisor: what connects while a worker restarts waits in its queue.
    """
    if address == "systemd":
        return [_from_systemd()] * workers
    if address.startswith("unix:"):
        return [[_unix(Path(address.removeprefix("unix:")))]] * workers
    host, _, port = address.rpartition(":")
    if int(port):
        # With SO_REUSEPORT the kernel would share the connections with another narseal.
        _tcp(host.strip("[]"), int(port), address, shared=False).close()
    first = _tcp(host.strip("[]"), int(port), address)
    bound = first.getsockname()[1]
    others = [_tcp(host.strip("[]"), bound, address) for _ in range(workers - 1)]
    return [[sock] for sock in (first, *others)]


def url_of(sock: socket.socket, *, tls: bool) -> str:
    """The address that a client would use."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)  # noqa: S104 - not a bind
    bracketed = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{bracketed}:{port}"


def notify_systemd(message: str) -> None:
    """sd_notify(3), where systemd asked for it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
            sock.sendto(message.encode(), address.replace("@", "\0", 1))


def _tcp(host: str, port: int, address: str, *, shared: bool = True) -> socket.socket:
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(where)
        sock.listen(_BACKLOG)
    except OSError as error:
        raise ConfigError(f"listen {address}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock


def _unix(path: Path) -> socket.socket:
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()  # of a narseal before
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(path))
        path.chmod(0o666)
        sock.listen(_BACKLOG)
    except OSError as error:
        raise ConfigError(f"listen unix:{path}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock


def _from_systemd() -> list[socket.socket]:
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        raise ConfigError('listen = "systemd": no sockets came; is there a .socket unit?')
    count = int(os.environ.get("LISTEN_FDS", "0"))
    sockets = [socket.socket(fileno=_FIRST_SYSTEMD + index) for index in range(count)]
    for sock in sockets:
        sock.setblocking(False)
    return sockets
