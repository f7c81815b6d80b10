"""A thousand clients who ask one worker in the same instant, each for another cold narinfo."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

from tests.bench.cold import cache
from tests.bench.peers import ncps
from tests.bench.servers import ALL_CORES, AT_HOST, HOST_KEY, median, nginx
from tests.bench.sides import Sides
from tests.bench.table import Row
from tests.tools.cache import entry
from tests.tools.narseal import narseal_process

_CLIENTS = 1000
_PATIENCE = 120
_MEMORY = f"worker's memory while {_CLIENTS:,} clients ask"


def measure() -> list[Row]:
    """Seconds until the answer is there, and megabytes of memory, beside nginx's proxy_pass."""
    items = [entry(f"item{n}", b"%d" % n).signed(HOST_KEY) for n in range(_CLIENTS + 1)]
    first, *names = [f"{item.hash}.narinfo" for item in items]
    sides = Sides()

    def take(side: str, url: str, pid: int | None = None) -> None:
        asyncio.run(_ask(url, [first]))  # it runs for a while already
        before = _begin(pid) if pid else 0.0
        took: list[float] = []
        sides.take(side, "p50", lambda: median(_into(took, url, names)), pid, len(names))
        sides.take(side, "p99", lambda: sorted(took)[-len(took) // 100])
        if pid:
            sides.take(side, "memory", lambda: _megabytes(pid, "VmHWM"))
            sides.take(side, "growth", lambda: _megabytes(pid, "VmHWM") - before)

    with cache(items, AT_HOST) as (folder, upstream):
        there = {"url": upstream, "public_keys": [str(HOST_KEY.public)]}
        for round_ in range(3):
            with narseal_process(folder / f"n{round_}", there) as proxy:
                take("narseal", proxy.url, proxy.workers()[0])
            with nginx(f"location / {{ proxy_pass {upstream}; }}", ALL_CORES) as relay:
                take("nginx proxy_pass", relay)
            with ncps(folder / f"ncps{round_}", items[0].hash) as peer:
                if peer:
                    take("ncps", peer.url, peer.pid)
    label = f"{_CLIENTS:,} clients at once, each for another cold narinfo"
    return [
        *sides.rows(f"{label}, p50", "p50", {"nginx proxy_pass": "≤ 1 s", "ncps": "< 1"}, "{:.2f} s"),
        *sides.rows(f"{label}, p99", "p99", {"nginx proxy_pass": "", "ncps": "< 1"}, "{:.2f} s"),
        sides.row(f"{_MEMORY}, at most", "memory", "≤ 130 MB", "{:.0f} MB"),
        *sides.rows(f"{_MEMORY}, at most", "memory", {"ncps": ""}, "{:.0f} MB"),
        sides.row(f"{_MEMORY}, growth", "growth", "", "{:.0f} MB"),
        *sides.rows(f"{_MEMORY}, growth", "growth", {"ncps": ""}, "{:.0f} MB"),
    ]  # fmt: skip


def _into(took: list[float], url: str, names: list[str]) -> list[float]:
    took += asyncio.run(_ask(url, names))
    return took


async def _ask(url: str, names: list[str]) -> list[float]:
    """Connect for each, from an address of its own, and then ask on all; seconds until each answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    loop = asyncio.get_running_loop()
    clients = [
        await loop.create_connection(
            _Client, host, int(port), local_addr=(f"127.98.{n // 250}.{n % 250 + 1}", 0)
        )
        for n, _ in enumerate(names)
    ]
    start = time.perf_counter()
    for (transport, _), name in zip(clients, names, strict=True):
        transport.write(f"GET /{name} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
    async with asyncio.timeout(_PATIENCE):
        took = [await client.answered - start for _, client in clients]
    for transport, _ in clients:
        transport.close()
    return took


class _Client(asyncio.Protocol):
    """Notes when the whole of its one answer is there."""

    def __init__(self) -> None:
        self.answered = asyncio.get_running_loop().create_future()
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, _, body = self._data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
        if len(body) == int(length[1]) if length else body.endswith(b"\r\n0\r\n\r\n"):
            assert b" 200 " in head[:16], self._data
            self.answered.set_result(time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_exception(exc or ConnectionError(f"closed after {self._data!r}"))


def _begin(pid: int) -> float:
    """Megabytes that a process has now; its highest memory (VmHWM) is counted from here on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _megabytes(pid, "VmRSS")


def _megabytes(pid: int, name: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024
