"""What a first fetch costs, and what one client's first fetches cost another client."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import aiohttp

from tests.bench.floor import FLOOR, floor
from tests.bench.peers import ncps
from tests.bench.servers import ALL_CORES, AT_HOST, HOST_KEY, median, nginx
from tests.bench.sides import Sides
from tests.bench.table import Row
from tests.tools.cache import Entry, entry, write_cache
from tests.tools.narseal import UPSTREAM, Process, narseal_process

_READERS = 25
_PATHS = 2000
_GREEDY = 200
_PROBES = 100
_HERDS = 300
#: What the machine's being busy makes of a question in which narseal has no part.
_BYSTANDER = "a file of the upstream's nginx, asked for without narseal"
_HERD = 32


def measure() -> list[Row]:
    """Small narinfos and NARs that nobody asked for before, beside nginx's proxy_pass of them."""
    items = [entry(f"item{n}", b"%d" % n).signed(HOST_KEY) for n in range(_PATHS)]
    sides = Sides()

    def take(side: str, kind: str, url: str, pid: int | None = None) -> None:
        names = [i.info.url if kind == "NAR" else f"{i.hash}.narinfo" for i in items]
        sides.take(side, kind, lambda: asyncio.run(_all(url, names)), pid, len(names))

    with cache(items, AT_HOST) as (folder, upstream):
        there = {"url": upstream, "public_keys": [str(HOST_KEY.public)]}
        for round_ in range(3):
            with (
                nginx(f"location / {{ proxy_pass {upstream}; }}", ALL_CORES) as relay,
                narseal_process(folder / f"n{round_}", there) as proxy,
            ):
                for kind in ("narinfo", "NAR"):
                    take("narseal", kind, proxy.url, proxy.workers()[0])
                    take("nginx proxy_pass", kind, relay)
            with floor(upstream, folder, HOST_KEY.public) as (url, pid, _):
                take(FLOOR, "narinfo", url, pid)
            with ncps(folder / f"ncps{round_}", items[0].hash) as peer:
                if peer:  # its NARs are not cold then: it brings them behind its narinfos
                    take("ncps", "narinfo", peer.url, peer.pid)
    return [
        row
        for kind, aim in (("narinfo", "≥ 3,000/s, ≤ 0.35 ms"), ("NAR", ""))
        for row in sides.rows(
            f"cold small {kind}s/s, {_READERS} readers", kind,
            {"nginx proxy_pass": aim, FLOOR: "", "ncps": "> 1"}, "{:,.0f}",
        )
    ]  # fmt: skip


def measure_isolation() -> list[Row]:
    """A client that asks one thing after another, beside one that asks for cold paths without end."""
    items = [entry(f"item{n}", b"%d" % n).signed(UPSTREAM) for n in range(20_000)]
    with cache(items) as (folder, upstream), narseal_process(folder / "n", {"url": upstream}) as p:
        alone, beside = asyncio.run(_beside(p, upstream, iter(items)))
    return [
        Row(f"{kind}, p50, beside a client with {_GREEDY} connections for cold paths, against alone",
            f"{beside[kind]:.2f} ms", f"{alone[kind]:.2f} ms", beside[kind] / alone[kind],
            "" if kind == _BYSTANDER else "≤ 2")
        for kind in alone
    ]  # fmt: skip


def measure_herd() -> list[Row]:
    """Four workers, each path asked for on many connections at once: how often the upstream is asked for it."""
    items = [entry(f"item{n}", os.urandom(20_000)).signed(UPSTREAM) for n in range(_HERDS)]
    rows = []
    with cache(items, "access_log {folder}/asked;") as (folder, upstream):
        there = {"url": upstream}
        with narseal_process(folder / "n", there, workers=4, prefetch="off") as proxy:
            for kind in ("narinfo", "NAR"):
                names = [i.info.url if kind == "NAR" else f"{i.hash}.narinfo" for i in items]
                took = sorted(asyncio.run(_herd(proxy.url, names)))
                asked = (folder / "asked").read_text()
                often = sum(asked.count(f"/{name} ") for name in names) / len(names)
                rows.append(
                    Row(f"cold small {kind}, asked for on {_HERD} connections to 4 workers: questions to its upstream"
                        f" (all answered after {median(took) * 1000:.1f} ms, p99 {took[-len(took) // 100] * 1000:.1f} ms)",
                        f"{often:.2f}", "", None, "1")
                )  # fmt: skip
    return rows


async def _herd(url: str, names: list[str]) -> list[float]:
    """Ask for each on all connections at once; seconds until all have it."""
    took = []
    async with _client(_HERD) as session:
        for name in names:
            start = time.perf_counter()
            await asyncio.gather(*(_get(session, f"{url}/{name}") for _ in range(_HERD)))
            took.append(time.perf_counter() - start)
    return took


@contextmanager
def cache(items: list[Entry], more: str = "") -> Iterator[tuple[Path, str]]:
    """A folder, and an upstream that has the items."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_cache(folder / "cache", *items)
        more = more.format(folder=folder)
        with nginx(f"root {folder}/cache; {more}", ALL_CORES) as upstream:
            yield folder, upstream


async def _all(url: str, names: list[str]) -> float:
    """Ask for each once; how many a second."""
    waiting = iter(names)

    async def ask(session: aiohttp.ClientSession) -> None:
        for name in waiting:
            await _get(session, f"{url}/{name}")

    async with _client(_READERS) as session:
        start = time.monotonic()
        await asyncio.gather(*(ask(session) for _ in range(_READERS)))
        return len(names) / (time.monotonic() - start)


async def _beside(
    proxy: Process, upstream: str, items: Iterator[Entry]
) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of a modest client's waiting, in milliseconds: alone, and beside a greedy one."""
    async with _client(1, "127.0.0.2") as modest:
        hot = next(items)
        await _get(modest, f"{proxy.url}/{hot.hash}.narinfo")

        async def probe() -> dict[str, float]:
            took: dict[str, list[float]] = {}
            for item in islice(items, _PROBES):
                for kind, url in (
                    ("a cached narinfo", f"{proxy.url}/{hot.hash}.narinfo"),
                    ("a cold narinfo", f"{proxy.url}/{item.hash}.narinfo"),
                    ("a cold NAR", f"{proxy.url}/{item.info.url}"),
                    (_BYSTANDER, f"{upstream}/{hot.hash}.narinfo"),
                ):
                    took.setdefault(kind, []).append(await _get(modest, url))
            return {kind: median(times) * 1000 for kind, times in took.items()}

        await probe()
        alone = await probe()
        for_modest = [*islice(items, _PROBES)]
        urls = [f"{proxy.url}/{item.hash}.narinfo" for item in items]
        items = iter(for_modest)
        # in a process of its own: its load is not to delay who measures
        greedy = multiprocessing.get_context("spawn").Process(target=_ask_all, args=(urls,))
        greedy.start()
        try:
            await asyncio.sleep(3)  # it has begun by then
            beside = await probe()
            assert greedy.is_alive(), "there were too few paths for it"
        finally:
            greedy.terminate()
            greedy.join()
        return alone, beside


def _ask_all(urls: list[str]) -> None:
    """Ask for each, on many connections."""

    async def ask_all() -> None:
        waiting = iter(urls)

        async def ask(session: aiohttp.ClientSession) -> None:
            for url in waiting:
                await _get(session, url)

        async with _client(_GREEDY, "127.0.0.3") as session:
            await asyncio.gather(*(ask(session) for _ in range(_GREEDY)))

    asyncio.run(ask_all())


def _client(connections: int, address: str = "127.0.0.1") -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, local_addr=(address, 0))
    )


async def _get(session: aiohttp.ClientSession, url: str) -> float:
    start = time.perf_counter()
    async with session.get(url) as response:
        assert response.status == 200, await response.text()
        await response.read()
    return time.perf_counter() - start
