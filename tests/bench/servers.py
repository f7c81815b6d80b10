"""nginx and narseal, each on the server's core; load comes from the other."""

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

from tests.tools.narseal import Process, narseal_process
from tests.tools.ports import free_ports

SERVER_CORE = {0}
LOAD = ["taskset", "-c", "1"]
_NGINX = """
worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
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
        process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), "nginx", "-c", str(config)]
        )
        try:
            _wait_for(port)
            yield f"http://127.0.0.1:{port}"
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


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert time.monotonic() < deadline, "nginx did not start"
            time.sleep(0.02)
        else:
            return
