"""What is brought in advance: references, and NARs; and how far that goes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from narseal.pipeline.paths import prefetch as prefetch_room
from tests.faults.test_isolation import neighbour
from tests.tools.cache import Entry, entry
from tests.tools.narseal import UPSTREAM, metric, narseal
from tests.tools.upstream import FakeCache

_MOST = 20


def chain(length: int) -> list[Entry]:
    """Each refers to the next one."""
    items = [entry("link-0", compression="none")]
    for number in range(1, length):
        below = items[-1].info.store_path
        contents = below.full("/nix/store").encode()
        items.append(entry(f"link-{number}", contents, compression="none", references=(below,)))
    return items[::-1]


async def test_references_without_end_are_followed_so_far_and_no_further(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question had everything fetched that an upstream made up."""
    monkeypatch.setattr(prefetch_room, "MOST", _MOST)
    items = chain(4 * _MOST)
    upstream.add(*items)
    there = {"url": upstream.url, "verify": "content", "public_keys": []}
    async with narseal(tmp_path, there) as client:
        for first in (0, _MOST + 1):  # each question has its own
            stopped = metric("narseal_prefetch_stopped_total")
            await client.narinfo(items[first].hash)
            await client.until(
                lambda stopped=stopped: metric("narseal_prefetch_stopped_total") > stopped  # type: ignore[misc]
            )
            asked = [upstream.asked[f"{item.hash}.narinfo"] for item in items]
            last = first + _MOST
            assert asked == [1] * (last + 1) + [0] * (len(items) - last - 1)


def closure(width: int, depth: int) -> list[Entry]:
    """Levels of paths, each of which refers to all of the next level; the first is alone."""
    levels: list[list[Entry]] = []
    for level in reversed(range(depth)):
        below = tuple(item.info.store_path for item in levels[-1]) if levels else ()
        names = [f"level-{level}-{n}" for n in range(width if level else 1)]
        levels.append([entry(n, n.encode(), references=below).signed(UPSTREAM) for n in names])
    return [item for level in reversed(levels) for item in level]


async def test_what_a_path_refers_to_is_there_when_it_is_asked_for(
    tmp_path: Path, upstream: FakeCache
) -> None:
    items = closure(5, 4)
    upstream.add(*items)
    brought = metric("narseal_prefetched_total", kind="narinfo")
    used = metric("narseal_prefetch_used_total", kind="narinfo")
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        await client.narinfo(items[0].hash)
        await client.until(lambda: all(upstream.asked[f"{i.hash}.narinfo"] for i in items))
        await client.until(
            lambda: metric("narseal_prefetched_total", kind="narinfo") == brought + len(items) - 1
        )
        for item in items:
            await client.narinfo(item.hash)
        assert metric("narseal_prefetch_used_total", kind="narinfo") == used + len(items) - 1
    assert {upstream.asked[f"{item.hash}.narinfo"] for item in items} == {1}
    assert not any(name.startswith("nar/") for name in upstream.asked)


async def test_many_references_are_brought_by_few_tasks(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """A task for each of a thousand had kept the loop from everybody else."""
    goes_on = asyncio.Event()
    top, *rest = closure(200, 2)
    upstream.add(top, *rest)

    async def held(_: web.Request) -> web.StreamResponse:
        await goes_on.wait()
        return web.Response(status=404)

    for item in rest:
        upstream.fault(f"{item.hash}.narinfo", held)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        await client.narinfo(top.hash)
        names = [task.get_name() for task in asyncio.all_tasks()]
        assert names.count("narinfos in advance") == 32
        goes_on.set()
        await client.until(lambda: all(upstream.asked[f"{i.hash}.narinfo"] for i in rest))


async def test_the_questions_have_turns(tmp_path: Path, upstream: FakeCache) -> None:
    """Who asks for a path of many references does not hold up what another's path refers to."""
    goes_on = asyncio.Event()
    order: list[str] = []
    many, below = closure(100, 2), entry("below").signed(UPSTREAM)
    top = entry("top", references=(below.info.store_path,)).signed(UPSTREAM)
    upstream.add(*many, top, below)

    async def held(request: web.Request) -> web.StreamResponse:
        order.append(request.path)
        await goes_on.wait()
        return web.Response(status=404)

    for item in (*many[1:], below):
        upstream.fault(f"{item.hash}.narinfo", held)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        await client.narinfo(many[0].hash)
        await client.until(lambda: len(order) == 32)
        await client.narinfo(top.hash)
        goes_on.set()
        await client.until(lambda: len(order) == len(many))
    assert order.index(f"/{below.hash}.narinfo") < 70


async def test_who_looks_first_and_asks_then_has_the_rest_brought(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Nix asks by HEAD whether the top of a closure is there, and then for it; over one connection."""
    items = closure(4, 3)
    upstream.add(*items)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        for _ in range(3):
            assert (await client.head(f"{items[0].hash}.narinfo"))[0] == 200
        assert not any(upstream.asked[f"{item.hash}.narinfo"] for item in items[1:])
        await client.narinfo(items[0].hash)
        await client.until(lambda: all(upstream.asked[f"{i.hash}.narinfo"] for i in items))
    assert {upstream.asked[f"{item.hash}.narinfo"] for item in items} == {1}


async def test_nars_come_in_advance_once_a_client_fetches_one(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Those whose narinfos it asked for, and not those that another client looked at."""
    items = closure(5, 3)
    others = [entry(f"other{n}").signed(UPSTREAM) for n in range(4)]
    upstream.add(*items, *others)
    used = metric("narseal_prefetch_used_total", kind="nar")
    async with narseal(tmp_path, {"url": upstream.url}) as client, neighbour(client) as other:
        infos = [await client.narinfo(item.hash) for item in items]
        for item in others:
            await other.narinfo(item.hash)
        assert (await client.get(infos[-1].url))[1] == items[-1].file
        await client.until(lambda: all(info.url in client.published() for info in infos))
        for item, info in zip(items, infos, strict=True):
            assert (await client.get(info.url))[1] == item.file
        assert metric("narseal_prefetch_used_total", kind="nar") == used + len(items) - 1
    assert {upstream.asked[item.info.url] for item in items} == {1}
    assert {upstream.asked[item.info.url] for item in others} == {0}


async def test_nothing_is_brought_for_who_only_looks(tmp_path: Path, upstream: FakeCache) -> None:
    items = closure(3, 3)
    upstream.add(*items)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        assert (await client.head(f"{items[0].hash}.narinfo"))[0] == 200
        assert (await client.get(f"status/{items[1].info.store_path}"))[0] == 200
        await client.narinfo(items[-1].hash)  # which refers to nothing
        await client.get("healthz")
    asked = {items[0].hash, items[1].hash, items[-1].hash}
    assert {name.removesuffix(".narinfo") for name in upstream.asked} == asked


@pytest.mark.parametrize("prefetch", ["off", "references"])
async def test_less_is_brought_where_that_is_configured(
    prefetch: str, tmp_path: Path, upstream: FakeCache
) -> None:
    items = closure(3, 2)
    upstream.add(*items)
    async with narseal(tmp_path, {"url": upstream.url}, prefetch=prefetch) as client:
        info = await client.narinfo(items[0].hash)
        if prefetch == "references":
            await client.until(lambda: all(upstream.asked[f"{i.hash}.narinfo"] for i in items))
        for item in items[1:]:
            await client.narinfo(item.hash)
        await client.get(info.url)
        await client.until(lambda: info.url in client.published())
    assert {name for name in upstream.asked if name.startswith("nar/")} == {items[0].info.url}
    assert {upstream.asked[f"{item.hash}.narinfo"] for item in items} == {1}


async def test_what_nobody_asks_for_in_the_end_is_bounded(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch_room, "_UNUSED", 10)
    roots = [closure_of(n) for n in range(8)]
    upstream.add(*(item for items in roots for item in items))
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        stopped = metric("narseal_prefetch_stopped_total")
        for items in roots:
            await client.narinfo(items[0].hash)

        def brought() -> int:
            return sum(upstream.asked[f"{i.hash}.narinfo"] for items in roots for i in items[1:])

        await client.until(lambda: metric("narseal_prefetch_stopped_total") > stopped)
        await client.until(lambda: brought() >= 10)
        assert brought() < 10 + 3 * 4


def closure_of(number: int) -> list[Entry]:
    """A path and three that it refers to."""
    below = [entry(f"below-{number}-{n}").signed(UPSTREAM) for n in range(3)]
    paths = tuple(item.info.store_path for item in below)
    return [entry(f"root-{number}", references=paths).signed(UPSTREAM), *below]
