"""Several workers that are asked for one cold thing at once: one brings it, whatever becomes of that one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientPayloadError, ClientSession, TCPConnector, web

from narseal.nix.narinfo import NarInfo
from narseal.nix.realisation import Realisation
from tests.tools.cache import entry
from tests.tools.changing import everywhere, write
from tests.tools.narseal import UPSTREAM, Process, is_countersigned, narseal_process
from tests.tools.upstream import FakeCache, Gate
from tests.tools.waiting import PATIENCE, eventually, until

WORKERS = 4
#: Connections: with so many, each worker has some (the kernel draws lots; all miss one in 10,000 times).
CLIENTS = 48
SMALL = entry("small", os.urandom(40_000)).signed(UPSTREAM)
LARGE = entry("large", os.urandom(20 << 20), compression="none").signed(UPSTREAM)
FEW = 5 << 20


@contextmanager
def serving(folder: Path, upstream: FakeCache, **more: Any) -> Iterator[Process]:
    patient = {"timeout": "240s", "stall_timeout": "240s"}
    there = {"url": upstream.url} | patient | more.pop("of_upstream", {})
    with narseal_process(folder, there, workers=WORKERS, prefetch="off", **more) as proxy:
        yield proxy


@asynccontextmanager
async def clients() -> AsyncIterator[ClientSession]:
    """Each request on a connection of its own."""
    connector = TCPConnector(limit=0, force_close=True)
    async with ClientSession(connector=connector, auto_decompress=False) as session:
        yield session


async def ask(session: ClientSession, url: str) -> tuple[int, bytes]:
    async with session.get(url) as response:
        return response.status, await response.read()


def ask_all(session: ClientSession, url: str) -> list[asyncio.Task[tuple[int, bytes]]]:
    return [asyncio.create_task(ask(session, url)) for _ in range(CLIENTS)]


async def joined(session: ClientSession, proxy: Process) -> float:
    """How many requests joined another's flight so far."""
    _, text = await ask(session, f"{proxy.url}/metrics")
    lines = [line.split() for line in text.decode().splitlines()]
    return sum(float(line[1]) for line in lines if line[0] == "narseal_flights_joined_total")


async def all_wait(session: ClientSession, proxy: Process, others: int = CLIENTS - 1) -> None:
    """Until all but the first wait for it."""

    async def met() -> bool:
        return await joined(session, proxy) >= others

    await eventually(met)


def given_up(proxy: Process) -> int:
    """How many small NARs took so long that they were asked for again, by a transfer: the machine is slow."""
    return proxy.log.read_text().count("a transfer is tried next")


async def kill_who_brings(proxy: Process, ports: list[int], number: int = signal.SIGKILL) -> int:
    """Send a signal to the worker that asked the upstream last, from the last of these ports."""
    killed: list[int] = []

    async def met() -> bool:
        table = Path("/proc/net/tcp").read_text().splitlines()[1:]
        port = f":{ports[-1]:04X}"
        rows = [row for line in table if (row := line.split())[1].endswith(port)]
        sockets = {f"socket:[{row[9]}]" for row in rows}
        for pid in proxy.workers():
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):  # it was closed meanwhile
                    if os.readlink(file) in sockets:
                        os.kill(pid, number)
                        killed.append(pid)
                        return True
        return False  # it asks again, since the machine is slow

    await eventually(met)
    return killed[0]


def portal(upstream: FakeCache, name: str, times: int = 1) -> tuple[Gate, list[int]]:
    """A gate at a file's first requests, and the ports from which they came."""
    gate, ports = Gate(), list[int]()

    async def held(request: web.Request) -> None:
        assert request.transport
        ports.append(request.transport.get_extra_info("peername")[1])
        await gate(request)

    upstream.fault(name, held, times)
    return gate, ports


async def test_a_narinfo_is_asked_for_once(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(SMALL)
    name = f"{SMALL.hash}.narinfo"
    gate, _ = portal(upstream, name)
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:
            tasks = ask_all(session, f"{proxy.url}/{name}")
            await all_wait(session, proxy)
            gate.open()
            answers = await asyncio.gather(*tasks)
        assert {status for status, _ in answers} == {200}
        assert all(is_countersigned(NarInfo.parse(body)) for _, body in answers)
        assert upstream.asked[name] == 1


async def test_a_small_nar_is_fetched_once(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(SMALL)
    gate, _ = portal(upstream, SMALL.info.url)
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:
            await ask(session, f"{proxy.url}/{SMALL.hash}.narinfo")
            tasks = ask_all(session, f"{proxy.url}/{SMALL.info.url}")
            await all_wait(session, proxy)
            gate.open()
            assert await asyncio.gather(*tasks) == [(200, SMALL.file)] * CLIENTS
        assert upstream.asked[SMALL.info.url] == 1 + given_up(proxy)


async def test_a_realisation_is_asked_for_once(tmp_path: Path, upstream: FakeCache) -> None:
    bare = Realisation(f"sha256:{'1' * 64}!out", SMALL.info.store_path)
    signed = bare.with_signatures((UPSTREAM.sign(bare.fingerprint()),))
    name = f"realisations/{bare.id}.doi".replace("!", "%21")
    upstream.files[name] = signed.render()
    gate, _ = portal(upstream, name)
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:
            tasks = ask_all(session, f"{proxy.url}/{name}")
            await all_wait(session, proxy)
            gate.open()
            assert {status for status, _ in await asyncio.gather(*tasks)} == {200}
        assert upstream.asked[name] == 1


async def test_what_nobody_has_is_asked_for_once(tmp_path: Path, upstream: FakeCache) -> None:
    """Also by those who come later, to another worker."""
    name = f"{SMALL.hash}.narinfo"
    gate, _ = portal(upstream, name)
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:
            tasks = ask_all(session, f"{proxy.url}/{name}")
            await all_wait(session, proxy)
            gate.open()
            assert {status for status, _ in await asyncio.gather(*tasks)} == {404}
            later = await asyncio.gather(*ask_all(session, f"{proxy.url}/{name}"))
            assert {status for status, _ in later} == {404}
        assert upstream.asked[name] == 1


async def test_why_a_thing_is_refused_is_what_all_are_told(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(entry("small").signed())
    name = f"{SMALL.hash}.narinfo"
    gate, _ = portal(upstream, name)
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:

            async def reason() -> tuple[int, str, str]:
                async with session.get(f"{proxy.url}/{name}") as response:
                    reason = response.headers["X-Narseal-Reason"]
                    return response.status, reason, await response.text()

            tasks = [asyncio.create_task(reason()) for _ in range(CLIENTS)]
            await all_wait(session, proxy)
            gate.open()
            (answer,) = set(await asyncio.gather(*tasks))
        assert answer[:2] == (404, "unsigned") and "small: not signed" in answer[2]
        assert upstream.asked[name] == 1


async def test_an_upstream_that_hangs_is_asked_by_one(tmp_path: Path, upstream: FakeCache) -> None:
    """And all who waited are told that it does; who asks then is one who asks anew."""
    upstream.add(SMALL)
    name = f"{SMALL.hash}.narinfo"
    gate, _ = portal(upstream, name)
    with serving(tmp_path, upstream, of_upstream={"timeout": "30s"}) as proxy:
        async with clients() as session:
            tasks = ask_all(session, f"{proxy.url}/{name}")
            await all_wait(session, proxy)
            assert {status for status, _ in await asyncio.gather(*tasks)} == {504}
            assert upstream.asked[name] == 1
            gate.open()
            assert (await ask(session, f"{proxy.url}/{name}"))[0] == 200


async def test_a_large_nar_is_fetched_once_and_followed_by_all(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """While it comes: each client has the first bytes before the upstream gave the last."""
    upstream.add(LARGE)
    goes_on = slowly(upstream)
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:
            await ask(session, f"{proxy.url}/{LARGE.hash}.narinfo")
            tasks = await following(session, f"{proxy.url}/{LARGE.info.url}")
            goes_on.set()
            for body in await asyncio.gather(*tasks):
                assert body == LARGE.file
            until((tmp_path / "storage" / LARGE.info.url).exists)
            assert (await ask(session, f"{proxy.url}/{LARGE.info.url}"))[1] == LARGE.file
        assert upstream.asked[LARGE.info.url] == 1


def slowly(
    upstream: FakeCache, data: bytes = LARGE.file, ports: list[int] | None = None
) -> asyncio.Event:
    """The large file's first bytes, and the rest once the event is set."""
    goes_on = asyncio.Event()

    async def fault(request: web.Request) -> web.StreamResponse:
        if ports is not None:
            assert request.transport
            ports.append(request.transport.get_extra_info("peername")[1])
        response = web.StreamResponse()
        response.content_length = len(data)
        await response.prepare(request)
        await response.write(data[:FEW])
        await goes_on.wait()
        await response.write(data[FEW:])
        return response

    upstream.fault(LARGE.info.url, fault)
    return goes_on


async def follow(session: ClientSession, url: str, has_some: asyncio.Event) -> bytes:
    """A body, or what there is of it when the line breaks."""
    body = bytearray()
    async with session.get(url) as response:
        assert response.status == 200
        try:
            async for data in response.content.iter_any():
                body += data
                has_some.set()
        except (ClientPayloadError, ConnectionError):
            pass
    return bytes(body)


async def following(session: ClientSession, url: str) -> list[asyncio.Task[bytes]]:
    """All clients, each of which has some of it."""
    has_some = [asyncio.Event() for _ in range(CLIENTS)]
    tasks = [asyncio.create_task(follow(session, url, some)) for some in has_some]
    for some in has_some:
        await asyncio.wait_for(some.wait(), PATIENCE)
    return tasks


async def test_nobody_gets_all_of_a_large_nar_that_is_wrong(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """What is withheld until it is verified is withheld from those who follow from elsewhere."""
    upstream.add(LARGE)
    wrong = LARGE.file[:-1] + bytes([LARGE.file[-1] ^ 1])
    goes_on = slowly(upstream, wrong)
    upstream.files[LARGE.info.url] = wrong
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:
            await ask(session, f"{proxy.url}/{LARGE.hash}.narinfo")
            tasks = await following(session, f"{proxy.url}/{LARGE.info.url}")
            goes_on.set()
            for body in await asyncio.gather(*tasks):
                assert len(body) <= len(wrong) - (1 << 20)
            assert (await ask(session, f"{proxy.url}/{LARGE.info.url}"))[0] == 404
        assert not (tmp_path / "storage" / LARGE.info.url).exists()
        assert upstream.asked[LARGE.info.url] == 1


@pytest.mark.parametrize("what", ["narinfo", "small NAR", "large NAR"])
async def test_who_brings_it_is_killed(tmp_path: Path, upstream: FakeCache, what: str) -> None:
    """Another one does then, for all who wait."""
    item = LARGE if what == "large NAR" else SMALL
    upstream.add(item)
    name = f"{item.hash}.narinfo" if what == "narinfo" else item.info.url
    gate, ports = portal(upstream, name, times=10)
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:
            if what != "narinfo":
                await ask(session, f"{proxy.url}/{item.hash}.narinfo")
            tasks = ask_all(session, f"{proxy.url}/{name}")
            await all_wait(session, proxy)
            await kill_who_brings(proxy, ports)
            before = len(ports)

            async def is_asked_anew() -> bool:
                return len(ports) > before

            await eventually(is_asked_anew)
            gate.open()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            # those of the killed one may have lost their connection
            others = [answer for answer in answers if not isinstance(answer, ClientError)]
            assert len(others) > CLIENTS // 4
            for answer in others:
                assert not isinstance(answer, BaseException) and answer[0] == 200
        assert upstream.asked[name] == 2 + given_up(proxy), proxy.log.read_text()


async def test_who_brings_a_large_nar_is_killed(tmp_path: Path, upstream: FakeCache) -> None:
    """Who has some of it has no more; who has nothing yet gets all of it from another one."""
    upstream.add(LARGE)
    ports: list[int] = []
    goes_on = slowly(upstream, ports=ports)
    url = LARGE.info.url
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:
            await ask(session, f"{proxy.url}/{LARGE.hash}.narinfo")
            tasks = await following(session, f"{proxy.url}/{url}")
            await kill_who_brings(proxy, ports)
            for body in await asyncio.gather(*tasks):
                assert len(body) <= FEW
            until(lambda: not any((tmp_path / "storage/.narseal/incoming").iterdir()))
            later = await asyncio.gather(*ask_all(session, f"{proxy.url}/{url}"))
            assert later == [(200, LARGE.file)] * CLIENTS
            goes_on.set()
        assert upstream.asked[url] == 2


async def test_a_worker_that_is_stopped_holds_up_nobody_for_ever(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Who waited in vain asks himself."""
    upstream.add(SMALL)
    name = f"{SMALL.hash}.narinfo"
    gate, ports = portal(upstream, name)
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:
            tasks = ask_all(session, f"{proxy.url}/{name}")
            await all_wait(session, proxy)
            pid = await kill_who_brings(proxy, ports, signal.SIGSTOP)
            try:

                async def most_have_it() -> bool:
                    return sum(task.done() for task in tasks) >= CLIENTS // 4

                await eventually(most_have_it)
                assert {task.result()[0] for task in tasks if task.done()} == {200}
            finally:
                os.kill(pid, signal.SIGCONT)
            gate.open()
            assert {status for status, _ in await asyncio.gather(*tasks)} == {200}


async def test_workers_of_a_changed_configuration_wait_for_none_of_the_old_one(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(SMALL, other := entry("other").signed(UPSTREAM))
    name = f"{SMALL.hash}.narinfo"
    gate, _ = portal(upstream, name)
    with serving(tmp_path, upstream) as proxy:
        async with clients() as session:
            tasks = ask_all(session, f"{proxy.url}/{name}")
            await all_wait(session, proxy)
            rule = {"match": "other", "action": "deny"}
            there = {"url": upstream.url}
            write(proxy, there, workers=WORKERS, prefetch="off", policy=[rule])
            await everywhere(proxy, other, 403)
            later = await asyncio.gather(*ask_all(session, f"{proxy.url}/{name}"))
            assert {status for status, _ in later} == {200}
            assert not any(task.done() for task in tasks)
            assert upstream.asked[name] == 2
            gate.open()
            assert {status for status, _ in await asyncio.gather(*tasks)} == {200}
        assert upstream.asked[name] == 2
