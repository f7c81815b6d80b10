"""Servers that stand still for measuring: nginx, narseal, whatever else listens on a port."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.tools.cache import key
from tests.tools.narseal import Process, narseal_process
from tests.tools.ports import free_ports

SERVER_CORE = {0}
ALL_CORES = {0, 1}
#: The peers' binaries; where they are not named, nothing is measured beside them.
NCPS = os.environ.get("NCPS")
HARMONIA = os.environ.get("HARMONIA")
#: ncps holds an upstream only to keys named after its host, which it cannot read if a port is in them:
#: its upstreams stand at port 80 of an address that no other run of the benchmarks has.
HOST = f"127.99.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
HOST_KEY = key(f"{HOST}-1")
#: What a server block says to stand there, too.
AT_HOST = f"listen {HOST}:80 backlog=1024;" if NCPS else ""
LOAD = ["taskset", "-c", "1"]
_NGINX = """
worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 100000000;
  types {{ text/x-nix-narinfo narinfo; application/x-nix-nar nar xz zst; }}
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port} backlog=1024; {body} }}
}}
"""


@contextmanager
def nginx(body: str, cores: set[int] = SERVER_CORE) -> Iterator[str]:
    """A one-worker nginx with this server block; its URL."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        [port] = free_ports(1)
        config = folder / "nginx.conf"
        config.write_text("user root;" + _NGINX.format(folder=folder, port=port, body=body))
        with served(["nginx", "-c", str(config)], port, cores, folder / "out"):
            yield f"http://127.0.0.1:{port}"


@contextmanager
def served(
    command: list[str], port: int, cores: set[int], log: Path, **environment: str
) -> Iterator[int]:
    """A program on these cores, once it listens on this port; its process id."""
    with log.open("w") as out:
        process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command],
            env=os.environ | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for(port, process, log)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def pinned_narseal(folder: Path, *upstreams: dict[str, Any], **more: Any) -> Iterator[Process]:
    """A one-worker narseal on the server's core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, SERVER_CORE)  # its children inherit it
    try:
        running = narseal_process(folder, *upstreams, **more)
        proxy = running.__enter__()
    finally:
        os.sched_setaffinity(0, before)
    try:
        yield proxy
    finally:
        running.__exit__(None, None, None)


def wrk(url: str, seconds: int = 6) -> float:
    """Requests a second, by one wrk thread on the other core."""
    text = subprocess.run(
        [*LOAD, "wrk", "-t1", "-c32", f"-d{seconds}s", url], check=True, capture_output=True,
        text=True,
    ).stdout  # fmt: skip
    assert "Non-2xx" not in text, text
    match = re.search(r"Requests/sec:\s+([0-9.]+)", text)
    assert match, text
    return float(match[1])


def download(url: str) -> float:
    """Seconds to download a file with curl on the other core."""
    text = subprocess.run(
        [*LOAD, "curl", "-sf", "-o", "/dev/null", "-w", "%{time_total}", url], check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    return float(text)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def cpu_seconds(pid: int) -> float:
    """What a process and the children that it waited for took of processors so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            tried = process.poll() is not None or time.monotonic() > deadline
            assert not tried, f"{process.args!r} does not listen: {log.read_text()[-4000:]}"
            time.sleep(0.02)
        else:
            return
