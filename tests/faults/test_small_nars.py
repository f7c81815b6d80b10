"""Small NARs: answered out of memory, and on disk before anything says that they are."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import itertools
import os
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from aiohttp import ClientSession, TCPConnector, web

from narseal.upstream import http as http_room
from tests.faults.test_process import cache_of, check_storage, fetch, strace
from tests.tools.cache import Entry, entry
from tests.tools.narseal import UPSTREAM, Process, narseal, narseal_process
from tests.tools.tracing import Calls
from tests.tools.upstream import FakeCache
from tests.tools.waiting import PATIENCE, eventually, until

ITEMS = [entry(f"item{n}", os.urandom(30_000)).signed(UPSTREAM) for n in range(40)]
#: Microseconds in which a group is on its way to the disk.
SLOWLY = "inject=fsync:delay_enter=400000"


def stored(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "index.sqlite")) as index:
        return int(index.execute("SELECT count(*) FROM nar WHERE stored").fetchone()[0])


def ask_for_all(proxy: Process, items: list[Entry]) -> None:
    """All narinfos, then all NARs, at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:

        def ask(names: list[str]) -> list[tuple[int, bytes]]:
            return list(pool.map(lambda name: fetch(f"{proxy.url}/{name}"), names))

        assert {status for status, _ in ask([f"{i.hash}.narinfo" for i in items])} == {200}
        assert ask([i.info.url for i in items]) == [(200, i.file) for i in items]


def test_they_are_answered_before_they_are_on_disk(tmp_path: Path) -> None:
    item = ITEMS[0]
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)) as proxy:
        assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
        url = f"{proxy.url}/{item.info.url}"
        with strace(proxy, "-e", "trace=fsync", "-e", SLOWLY, "-o", "/dev/null"):
            assert fetch(url) == (200, item.file)
            assert stored(tmp_path) == 0 and not (tmp_path / "storage" / item.info.url).exists()
            assert fetch(url, Range="bytes=5-9") == (206, item.file[5:10])
            assert fetch(url) == (200, item.file)
        until((tmp_path / "storage" / f"{item.hash}.narinfo").exists)
        assert stored(tmp_path) == 1


def test_in_a_group_all_is_synced_then_renamed_then_recorded(tmp_path: Path) -> None:
    """What a loss of power at any moment leaves: nothing is in the index that is not on disk."""
    storage, trace = tmp_path / "storage", tmp_path / "trace"
    with (
        narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)) as proxy,
        strace(proxy, "-y", "-e", "trace=fsync,fdatasync,rename", "-o", str(trace)),
    ):
        ask_for_all(proxy, ITEMS)
        until(lambda: len(list(storage.glob("*.narinfo"))) == len(ITEMS))
    calls = Calls(trace)
    for item in ITEMS:
        assert calls.recorded(item) < calls.at("rename", f'/{item.hash}.narinfo"')
    renames = ["rename" in line and "/nar/" in line for line in calls.lines]
    assert (True, True) in itertools.pairwise(renames), "no two were in a group"


@pytest.mark.parametrize("call", ["openat", "write", "fsync", "rename", "close"])
@pytest.mark.parametrize("number", [3, 9, 27])
def test_killed_while_a_group_is_published(call: str, number: int, tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, *ITEMS)
    inject = f"inject={call}:signal=KILL:when={number}"
    with narseal_process(tmp_path, upstream) as proxy:
        for item in ITEMS:
            assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
        with strace(proxy, "-e", f"trace={call}", "-e", inject, "-o", "/dev/null") as tracer:
            with concurrent.futures.ThreadPoolExecutor(len(ITEMS)) as pool:
                list(pool.map(partial(_try, proxy), ITEMS))
            tracer.wait(PATIENCE)
        for item in ITEMS:
            until(partial(_try, proxy, item))
        until(lambda: stored(tmp_path) == len(ITEMS))
        until(lambda: not any((tmp_path / "storage/.narseal/incoming").iterdir()))
        until(lambda: len(list((tmp_path / "storage").glob("*.narinfo"))) == len(ITEMS))
        check_storage(tmp_path / "storage", ITEMS)
        assert "a worker died" in proxy.log.read_text()


def _try(proxy: Process, item: Entry) -> bool:
    try:
        status, body = fetch(f"{proxy.url}/{item.info.url}")
    except (OSError, http.client.HTTPException):
        return False
    assert status != 200 or body == item.file
    return status == 200


def test_what_could_not_be_kept_is_brought_again(tmp_path: Path) -> None:
    """By the next who asks, though it was answered: nothing in memory stands before that."""
    item = ITEMS[0]
    with narseal_process(tmp_path, cache_of(tmp_path, item)) as proxy:
        assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
        eio = "inject=fsync:error=EIO:when=1"
        with strace(proxy, "-e", "trace=fsync", "-e", eio, "-o", "/dev/null"):
            assert plainly(proxy, item.info.url) == (200, item.file)
            until(lambda: "small NARs are not kept" in proxy.log.read_text())
            assert stored(tmp_path) == 0
            assert not any((tmp_path / "storage/.narseal/incoming").iterdir())
        assert plainly(proxy, item.info.url) == (200, item.file)
        until(lambda: stored(tmp_path) == 1)


def plainly(proxy: Process, name: str) -> tuple[int, bytes]:
    """Status and body of a request that may be answered from memory: it is not its connection's first."""
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=PATIENCE)
    with closing(connection):
        connection.request("GET", "/nix-cache-info")
        connection.getresponse().read()
        connection.request("GET", f"/{name}")
        response = connection.getresponse()
        return response.status, response.read()


async def test_of_what_waits_for_a_slow_disk_there_is_a_bound(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """What finds no room in memory takes a transfer, which waits for the disk itself."""
    trace = tmp_path / "trace"
    items = [entry(f"many{n}", os.urandom(200_000)).signed(UPSTREAM) for n in range(400)]
    upstream.add(*items)

    async def ask(client: ClientSession, name: str) -> bytes:
        async with client.get(f"{proxy.url}/{name}") as response:
            assert response.status == 200
            return await response.read()

    async def take_transfers() -> bool:
        """Several threads wait for the disk: what is in memory is published by one."""
        return sum("/incoming/" in line for line in trace.read_text().splitlines()) > 2

    with narseal_process(tmp_path, {"url": upstream.url}) as proxy:
        async with ClientSession(connector=TCPConnector(limit=0)) as client:
            await asyncio.gather(*(ask(client, f"{item.hash}.narinfo") for item in items))
            never = "inject=fsync:delay_enter=1000000000:when=1"  # in each thread
            with strace(proxy, "-y", "-e", "trace=fsync", "-e", never, "-o", str(trace)):
                tasks = [asyncio.create_task(ask(client, item.info.url)) for item in items]
                await eventually(take_transfers)
            assert await asyncio.gather(*tasks) == [item.file for item in items]
        await eventually(lambda: all_stored(tmp_path, len(items)))


async def all_stored(folder: Path, count: int) -> bool:
    return stored(folder) == count


async def test_small_nars_that_break_off_or_are_slow_cut_off_nobody(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """A transfer resumes them; the upstream's narinfos are there meanwhile, and after it."""
    items, others = ITEMS[:30], ITEMS[30:]
    upstream.add(*ITEMS)
    for item in items:
        upstream.fault(item.info.url, upstream.cut(item.info.url, 10_000))
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        infos = [await client.narinfo(item.hash) for item in items]
        got = await asyncio.gather(*(client.get(info.url) for info in infos))
        assert [(status, body) for status, body, *_ in got] == [(200, i.file) for i in items]
        for item in others:
            await client.narinfo(item.hash)


async def test_small_nars_that_stall_hold_up_no_others(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither another upstream's, nor their own upstream's narinfos."""
    monkeypatch.setattr(http_room, "_AT_ONCE", 2 * PATIENCE)
    goes_on = asyncio.Event()

    async def stalls(_: web.Request) -> web.StreamResponse | None:
        await goes_on.wait()
        return None

    items = [entry(f"stalls{n}").signed(UPSTREAM) for n in range(80)]
    upstream.add(*items, ITEMS[1])
    for item in items:
        upstream.fault(item.info.url, stalls, times=2)
    healthy = cache_of(tmp_path, ITEMS[0])
    more = {"prefetch": "off", "limits": {"lookups": 32}}
    async with narseal(tmp_path, {"url": upstream.url}, healthy, **more) as client:
        infos = [await client.narinfo(item.hash) for item in (*items, ITEMS[0])]
        tasks = [asyncio.create_task(client.get(info.url)) for info in infos[:-1]]
        try:
            await client.until(lambda: sum(upstream.asked[i.info.url] for i in items) == 32)
            assert (await client.get(infos[-1].url))[:2] == (200, ITEMS[0].file)
            await client.narinfo(ITEMS[1].hash)
            assert not any(task.done() for task in tasks)
        finally:
            goes_on.set()
            await asyncio.gather(*tasks)


async def test_a_file_that_many_ask_for_at_once_is_fetched_once(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it is looked up which files are refused, of which there are many."""
    monkeypatch.setattr(http_room, "_AT_ONCE", 2 * PATIENCE)  # what is late comes as a transfer
    upstream.add(*ITEMS, wrong := entry("wrong").signed(UPSTREAM))
    upstream.files[wrong.info.url] = b"something else"
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        infos = [await client.narinfo(item.hash) for item in ITEMS]
        assert await client.refusal((await client.narinfo(wrong.hash)).url)
        await asyncio.gather(*(client.get(info.url) for info in infos * 4))
        await client.until(lambda: all(info.url in client.published() for info in infos))
    assert {upstream.asked[item.info.url] for item in ITEMS} == {1}


async def test_small_files_that_are_large_hold_up_no_others(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Their NARs are decoded by those who decode large ones."""
    larges = [
        entry(f"large{n}", bytes(100 << 20) + b"%d" % n, compression="zstd").signed(UPSTREAM)
        for n in range(16)
    ]
    stored = entry("stored", os.urandom(300_000)).signed(UPSTREAM)
    assert len(larges[0].file) < 64 << 10
    upstream.add(*larges, stored)
    async with narseal(tmp_path, {"url": upstream.url}, prefetch="off") as client:
        infos = [await client.narinfo(item.hash) for item in (*larges, stored)]
        url = infos.pop().url
        await client.get(url)
        await client.until(lambda: url in client.published())
        tasks = [asyncio.create_task(client.get(info.url)) for info in infos]
        await client.until(lambda: all(upstream.asked[item.info.url] for item in larges))
        assert (await client.get(url))[1] == stored.file
        assert sum(task.done() for task in tasks) < 8  # of those that short work has threads for
        assert [body for _, body, _ in await asyncio.gather(*tasks)] == [i.file for i in larges]
