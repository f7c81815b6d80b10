"""Trouble of one upstream, or of one client, is not trouble of another (findings, group 5)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from narseal.nix.realisation import parse_at
from tests.faults.test_bombs import with_references
from tests.faults.test_rule import trace
from tests.tools.cache import Entry, entry, store_path
from tests.tools.narseal import UPSTREAM, Client, narseal
from tests.tools.upstream import FakeCache, Fault, fake_cache
from tests.tools.waiting import PATIENCE

BIG = entry("big", bytes(range(256)) * (20 << 10), compression="none").signed(UPSTREAM)


@pytest.fixture
async def caches() -> AsyncIterator[tuple[FakeCache, FakeCache]]:
    async with fake_cache() as first, fake_cache() as second:
        yield first, second


def held(let_go: asyncio.Event, body: bytes | None = None) -> Fault:
    """Nothing until it is let go of; then the file, or that there is none."""

    async def fault(_: web.Request) -> web.StreamResponse:
        await let_go.wait()
        return web.Response(status=404) if body is None else web.Response(body=body)

    return fault


def wrong_prefix(cache: FakeCache, item: Entry, at: int) -> Fault:
    """So many wrong bytes, then the line breaks; of the length that is right."""

    async def fault(request: web.Request) -> web.StreamResponse:
        if "Range" in request.headers:
            return web.Response(status=503)
        response = web.StreamResponse()
        response.content_length = len(item.file)
        await response.prepare(request)
        await response.write(b"x" * at)
        assert request.transport is not None
        request.transport.close()
        return response

    return fault


def wrong_length(item: Entry, at: int) -> Fault:
    """Announces twice the size, sends right bytes, breaks off."""

    async def fault(request: web.Request) -> web.StreamResponse:
        if "Range" in request.headers:
            return web.Response(status=503)
        response = web.StreamResponse()
        response.content_length = 2 * len(item.file)
        await response.prepare(request)
        await response.write(item.file[:at])
        assert request.transport is not None
        request.transport.close()
        return response

    return fault


@pytest.mark.parametrize("kind", ["prefix", "length"])
@pytest.mark.parametrize("size", [1000, 200_000, 3 << 20])
async def test_a_bad_mirror_does_not_disable_an_honest_one(
    tmp_path: Path, caches: tuple[FakeCache, FakeCache], kind: str, size: int
) -> None:
    """F7: both were refused for an hour, because together they gave wrong bytes."""
    bad, good = caches
    bad.add(BIG)
    good.add(BIG)
    fault = wrong_prefix(bad, BIG, size) if kind == "prefix" else wrong_length(BIG, size)
    bad.fault(BIG.info.url, fault, times=100)
    upstreams = ({"url": bad.url, "priority": 1}, {"url": good.url, "priority": 2})
    async with narseal(tmp_path, *upstreams) as client:
        info = await client.narinfo(BIG.hash)
        for _ in range(20):  # what readers saw of wrong bytes ends broken, and is judged behind
            try:
                status, body, _ = await client.get(info.url)
            except OSError:
                continue
            except Exception as error:
                assert "Payload" in type(error).__name__
                continue
            if status == 200:
                break
            await asyncio.sleep(0.1)
        else:
            pytest.fail("the honest mirror was not used")
        assert body == BIG.file
        assert (await client.narinfo(BIG.hash)).fingerprint() == BIG.info.fingerprint()
        other = entry("other", b"o", compression="none").signed(UPSTREAM)
        good.add(other)
        there = await client.narinfo(other.hash)
        assert (await client.get(there.url))[1] == other.file


def without_range(cache: FakeCache, item: Entry, at: int) -> Fault:
    """Knows no Range, and breaks off once."""

    async def fault(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(item.file)
        await response.prepare(request)
        await response.write(item.file[:at])
        assert request.transport is not None
        request.transport.close()
        return response

    return fault


@pytest.mark.parametrize("size", [1000, 3 << 20])
async def test_an_upstream_without_ranges_may_break_off_once(
    tmp_path: Path, caches: tuple[FakeCache, FakeCache], size: int
) -> None:
    """F44: 502 "200 OK"."""
    upstream, _ = caches
    upstream.add(BIG)

    async def whole(_: web.Request) -> web.StreamResponse:
        return web.Response(body=BIG.file)

    upstream.fault(BIG.info.url, without_range(upstream, BIG, size))
    upstream.fault(BIG.info.url, whole)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(BIG.hash)
        assert (await client.get(info.url))[1] == BIG.file
        for _ in range(2):  # cold and from memory
            assert (await client.get(f"{BIG.hash}.narinfo"))[2]["Accept-Ranges"] == "bytes"


async def test_an_upstream_that_drips_holds_up_no_other(
    tmp_path: Path, caches: tuple[FakeCache, FakeCache]
) -> None:
    """F19: it took every transfer of the worker, also after its readers had left."""
    slow, good = caches
    dripping = [
        entry(f"d{n}", b"%d" % n * 100_000, compression="none").signed(UPSTREAM) for n in range(8)
    ]
    healthy = entry("healthy", b"h", compression="none").signed(UPSTREAM)
    slow.add(*dripping)
    good.add(healthy)
    dripped = 0

    async def drip(request: web.Request) -> web.StreamResponse:
        nonlocal dripped
        response = web.StreamResponse()
        response.content_length = 100_000
        await response.prepare(request)
        try:
            while True:
                await response.write(b"n")
                await asyncio.sleep(0.05)
        except ConnectionError:
            dripped += 1
            return response

    for item in dripping:
        slow.fault(item.info.url, drip, times=100)
    upstreams = ({"url": slow.url, "stall_timeout": "1s"}, {"url": good.url})
    async with narseal(tmp_path, *upstreams, limits={"transfers": 2}) as client:
        asking = []
        for item in dripping:
            info = await client.narinfo(item.hash)
            asking.append(asyncio.create_task(client.get(info.url)))
        info = await client.narinfo(healthy.hash)
        assert (await client.get(info.url))[1] == healthy.file
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await client.until(lambda: dripped >= len(dripping))


async def test_an_upstream_that_hangs_holds_up_no_others_narinfos(
    tmp_path: Path, caches: tuple[FakeCache, FakeCache]
) -> None:
    """All lookups waited for it; what the other has was not asked for meanwhile."""
    hanging, good = caches
    wanted = [entry(f"w{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(12)]
    good.add(*wanted)
    let_go = asyncio.Event()

    for item in wanted:
        hanging.fault(f"{item.hash}.narinfo", held(let_go), times=10)
    upstreams = (
        {"url": hanging.url, "priority": 1, "hedge_after": "10ms", "timeout": "60s"},
        {"url": good.url, "priority": 2},
    )
    async with narseal(tmp_path, *upstreams, limits={"lookups": 2}) as client:
        found = await asyncio.gather(*(client.narinfo(item.hash) for item in wanted))
        assert [info.nar_hash for info in found] == [item.info.nar_hash for item in wanted]
        let_go.set()


@asynccontextmanager
async def neighbour(client: Client) -> AsyncIterator[Client]:
    """Another client, who comes from an address of its own."""
    connector = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, auto_decompress=False
    ) as session:
        yield Client(client.url, session, client.storage)


@pytest.mark.parametrize("kind", ["narinfos", "NARs"])
async def test_a_client_who_asks_for_much_leaves_room_for_another(
    kind: str, tmp_path: Path, caches: tuple[FakeCache, FakeCache]
) -> None:
    """Of one upstream, which hangs: the slots for it went to whoever came first."""
    cache, _ = caches
    large = bytes(300_000)  # else a NAR is no transfer
    greedy = [
        entry(f"g{n}", b"%d" % n + large, compression="none").signed(UPSTREAM) for n in range(12)
    ]
    wanted = entry("wanted", b"w" + large, compression="none").signed(UPSTREAM)
    cache.add(*greedy, wanted)
    let_go = asyncio.Event()

    there = {"url": cache.url, "timeout": "300s", "stall_timeout": "300s"}
    async with (
        narseal(tmp_path, there, limits={"lookups": 4, "transfers": 4}) as client,
        neighbour(client) as other,
    ):
        names = [f"{item.hash}.narinfo" for item in greedy]
        if kind == "NARs":
            names = [(await client.narinfo(item.hash)).url for item in greedy]
        asked = [item.info.url if kind == "NARs" else f"{item.hash}.narinfo" for item in greedy]
        for name in asked:
            cache.fault(name, held(let_go), times=10)
        before = cache.asked.total()
        asking = [asyncio.create_task(client.get(name)) for name in names]
        await client.until(lambda: cache.asked.total() - before == 2)  # half of them
        info = await other.narinfo(wanted.hash)
        assert (await other.get(info.url))[1] == wanted.file
        assert not any(task.done() for task in asking)
        let_go.set()
        await asyncio.gather(*asking)


async def test_realisations_and_their_paths_wait_for_no_turn_of_each_other(
    tmp_path: Path, caches: tuple[FakeCache, FakeCache]
) -> None:
    """More at once than one client has turns; the paths come from the upstream only then."""
    cache, _ = caches
    items = [entry(f"p{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(40)]
    cache.add(*items)
    addresses = []
    for item in items:
        address = f"build-trace-v2/{store_path(f'{item.info.store_path.name}.drv')}/out.doi"
        told = parse_at(address, trace(item.info.store_path))
        told = told.with_signatures((UPSTREAM.sign(told.fingerprint()),))
        cache.files[address] = told.render()
        addresses.append(address)
    let_go = asyncio.Event()

    for item in items:
        name = f"{item.hash}.narinfo"
        cache.fault(name, held(let_go, cache.files[name]), times=10)
    rules = [{"match": "*", "require": "signature", "keys": ["upstream-1"]}]
    there = {"url": cache.url, "timeout": "300s"}
    async with narseal(tmp_path, there, policy=rules) as client:
        paths = [asyncio.create_task(client.narinfo(item.hash)) for item in items]
        await client.until(lambda: cache.asked.total() == 40)
        asking = [asyncio.create_task(client.get(address)) for address in addresses]
        await client.until(lambda: cache.asked.total() == 80)
        let_go.set()
        async with asyncio.timeout(120):  # half of limits.content_hold
            assert {status for status, _, _ in await asyncio.gather(*asking)} == {200}
            await asyncio.gather(*paths)


async def test_an_upstream_that_hangs_keeps_no_turns(
    tmp_path: Path, caches: tuple[FakeCache, FakeCache]
) -> None:
    """Realisations of two clients were all the questions that a worker answers at a time."""
    hanging, good = caches
    wanted = entry("wanted", b"w", compression="none").signed(UPSTREAM)
    good.add(wanted)
    let_go = asyncio.Event()

    names = [f"build-trace-v2/{store_path(f'd{n}.drv')}/out.doi" for n in range(70)]
    for name in names:
        hanging.fault(name, held(let_go), times=10)
    there = ({"url": good.url}, {"url": hanging.url, "timeout": "300s"})
    async with narseal(tmp_path, *there) as client, neighbour(client) as other:
        asking = [asyncio.create_task(client.get(name)) for name in names[:35]]
        asking += [asyncio.create_task(other.get(name)) for name in names[35:]]
        await client.until(lambda: hanging.asked.total() >= 60)
        info = await client.narinfo(wanted.hash)
        assert (await other.get(info.url))[1] == wanted.file
        let_go.set()
        await asyncio.gather(*asking)


async def test_what_was_refused_holds_no_memory(
    tmp_path: Path, caches: tuple[FakeCache, FakeCache]
) -> None:
    """Twelve narinfos that are denied are more than one upstream may have in memory at a time."""
    cache, _ = caches
    denied = [with_references(f"denied-{n}").signed(UPSTREAM) for n in range(12)]
    wanted = with_references("wanted").signed(UPSTREAM)
    cache.add(*denied, wanted)
    rules = [{"match": "wanted", "action": "allow"}]
    async with narseal(tmp_path, {"url": cache.url}, policy=rules, policy_default="deny") as client:
        for item in denied:
            assert (await client.get(f"{item.hash}.narinfo"))[0] == 403
        assert (await client.get(f"{wanted.hash}.narinfo"))[0] == 200


async def test_what_another_client_queued_comes_in_ones_own_share(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Else whoever joins what a greedy client has queued waits for all that it asked for before."""
    items = [
        entry(f"queued{n}", os.urandom(600_000), compression="none").signed(UPSTREAM)
        for n in range(6)
    ]
    upstream.add(*items)
    goes_on = asyncio.Event()

    async def waits(_: web.Request) -> web.StreamResponse | None:
        await goes_on.wait()
        return None

    urls = [item.info.url for item in items]
    for url in urls:
        upstream.fault(url, waits)
    more = {"limits": {"transfers": 4}, "prefetch": "off"}
    async with (
        narseal(tmp_path, {"url": upstream.url}, **more) as client,
        neighbour(client) as other,
    ):
        for item in items:
            await client.narinfo(item.hash)
        tasks = [asyncio.create_task(client.get(url)) for url in urls]
        await client.until(lambda: sum(upstream.asked[url] for url in urls) == 2)
        queued = [url for url in urls if not upstream.asked[url]]
        tasks.append(asyncio.create_task(other.get(queued[-1])))
        await client.until(lambda: upstream.asked[queued[-1]])
        assert not any(task.done() for task in tasks)
        goes_on.set()
        assert {answer[0] for answer in await asyncio.gather(*tasks)} == {200}
    assert {upstream.asked[url] for url in urls} == {1}
