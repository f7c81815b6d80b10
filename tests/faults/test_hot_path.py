"""The wire itself: the hot path answers byte for byte like aiohttp, and hostile bytes get nothing."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narseal.nix.narinfo import NarInfo
from narseal.server import request_queue
from tests.faults.test_uploads import add
from tests.tools.cache import entry
from tests.tools.narseal import UPSTREAM, Client, Process, metric, narseal, narseal_process
from tests.tools.upstream import FakeCache
from tests.tools.waiting import PATIENCE, eventually
from tests.tools.watching import resident

ITEM = entry("item").signed(UPSTREAM)


class Wire:
    """A raw connection."""

    def __init__(self, client: Client | Process, address: str = "127.0.0.1") -> None:
        self.host, self.port = client.url.removeprefix("http://").split(":")
        self.address = address

    async def __aenter__(self) -> Wire:
        self.reader, self.writer = await asyncio.open_connection(
            self.host, int(self.port), local_addr=(self.address, 0)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def send(self, *portions: bytes) -> None:
        for portion in portions:
            self.writer.write(portion)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def answer(self) -> tuple[int, bytes, bytes]:
        """Status, head and body of the next answer."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE)
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        body = await self.reader.readexactly(length)
        return int(head.split(b" ")[1]), head, body


def get(target: str, *headers: str) -> bytes:
    lines = [f"GET {target} HTTP/1.1", "Host: x", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def fields(head: bytes) -> dict[bytes, bytes]:
    """What a head says that must not depend on who answers."""
    pairs = [line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line]
    leave = (b"date", b"x-request-id", b"accept-ranges")
    return {k.lower(): v for k, v in pairs if k.lower() not in leave}


def late(upstream: FakeCache) -> tuple[asyncio.Event, asyncio.Event]:
    """Have the item's narinfo wait: set once it was asked for; to be set, then it comes."""
    asked, goes_on = asyncio.Event(), asyncio.Event()

    async def fault(_: web.Request) -> web.StreamResponse:
        asked.set()
        await goes_on.wait()
        return web.Response(body=ITEM.info.render())

    upstream.fault(f"{ITEM.hash}.narinfo", fault)
    return asked, goes_on


async def test_torn_and_pipelined_requests_are_answered_byte_for_byte(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        cold = (await client.get(f"{ITEM.hash}.narinfo"))[1]
        request = get(f"/{ITEM.hash}.narinfo", "User-Agent: curl/8 Nix/2.34")
        async with Wire(client) as wire:
            for cut in range(1, len(request)):
                await wire.send(request[:cut], request[cut:])
                status, _, body = await wire.answer()
                assert (status, body) == (200, cold)
            await wire.send(request * 20)
            for _ in range(20):
                assert (await wire.answer())[2] == cold
            mixed = request + get("/nix-cache-info") + request + get("/nothing") + request
            for cut in range(0, len(mixed), 11):
                await wire.send(mixed[:cut], mixed[cut:])
                bodies = [(await wire.answer())[2] for _ in range(5)]
                assert bodies[0] == bodies[2] == bodies[4] == cold
                assert bodies[1].startswith(b"StoreDir")
            # a body that is not read must not be taken for a request
            post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(request)
            await wire.send(post, request)
            status, head, _ = await wire.answer()
            assert (status, fields(head)[b"connection"]) == (405, b"close")
            assert await wire.reader.read() == b""
        assert metric("narseal_hot_hits_total") > 0


async def test_the_first_request_of_a_connection_is_answered_from_memory(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Not by aiohttp, whose answers have an id, and which need not have begun to wait in a worker's loop."""
    upstream.add(ITEM)
    request = get(f"/{ITEM.hash}.narinfo")
    with narseal_process(tmp_path, {"url": upstream.url}) as process:
        async with Wire(process) as wire:
            await wire.send(request)
            await wire.answer()
        for _ in range(3):
            async with Wire(process) as wire:
                for _ in range(2):
                    await wire.send(request)
                    assert b"x-request-id" not in (await wire.answer())[1].lower()


async def test_the_hot_answer_says_what_the_slow_one_says(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)

    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(ITEM.hash)
        await client.get(info.url)
        await client.until(lambda: info.url in client.published())
        await client.get(info.url)
        await client.get(f"{ITEM.hash}.narinfo")
        async with Wire(client) as wire:
            await wire.send(get("/nix-cache-info"))
            await wire.answer()
            for target in (f"/{ITEM.hash}.narinfo", f"/{info.url}"):
                before = metric("narseal_requests_total", route="narinfo", code="200")
                await wire.send(get(target))
                _, hot, hot_body = await wire.answer()
                await wire.send(get(target, "X-Odd: 1"))
                _, slow, slow_body = await wire.answer()
                assert b"X-Request-Id" in slow and b"X-Request-Id" not in hot
                assert (fields(hot), hot_body) == (fields(slow), slow_body)
                await wire.send(get(target, "Range: bytes=0-3"))
                assert (await wire.answer())[0] == 206
                assert before >= 0


async def test_a_token_changes_nothing_where_everybody_may_read(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Who uploads sends it with every question."""
    upstream.add(ITEM)
    async with narseal(tmp_path, {"url": upstream.url}) as client, Wire(client) as wire:
        for target in (f"/{ITEM.hash}.narinfo", f"/{entry('absent').hash}.narinfo"):
            answers = []
            for more in ([], ["Authorization: Basic Y2k6eA=="], ["X-Odd: 1"]):
                await wire.send(get(target, *more))
                status, head, body = await wire.answer()
                answers.append((status, fields(head), body))
            assert answers[0] == answers[1] == answers[2]
        hits = metric("narseal_hot_hits_total")
        await wire.send(get(f"/{ITEM.hash}.narinfo", "Authorization: Bearer x"))
        head = (await wire.answer())[1]
        assert b"X-Request-Id" not in head and metric("narseal_hot_hits_total") == hits + 1


async def test_a_miss_says_what_the_handlers_say(tmp_path: Path, upstream: FakeCache) -> None:
    """What is not in memory: found, absent, refused, kept back, and what an upstream fails at."""
    signed = [entry(f"item{n}").signed(UPSTREAM) for n in range(6)]
    upstream.add(*signed, lying := entry("lying"))

    async def fails(_: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    upstream.fault(f"{signed[-1].hash}.narinfo", fails, times=100)
    denied = {"match": "item1", "action": "deny"}
    targets = [f"/{item.hash}.narinfo" for item in (*signed, lying, entry("absent"))]
    targets += [f"/{item.info.url}" for item in (*signed, lying)]

    answers: dict[str, list[tuple[int, dict[bytes, bytes], bytes]]] = {}
    for way in ("plain", "odd"):  # each with nothing in memory
        async with narseal(tmp_path / way, {"url": upstream.url}, policy=[denied]) as client:
            for target in targets:
                async with Wire(client) as wire:
                    await wire.send(get(target, *(["X-Odd: 1"] if way == "odd" else [])))
                    status, head, body = await wire.answer()
                    if status != 200:
                        assert b"X-Request-Id: " in head
                    answers.setdefault(target, []).append((status, fields(head), body))
    assert {200, 403, 404, 502} <= {found[0][0] for found in answers.values()}
    for target, (plain, odd) in answers.items():
        assert plain == odd, target


async def test_who_only_looks_is_told_the_same_without_a_body(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """A HEAD of what is not in memory, and of what is: as the handlers answer it, and nothing behind that."""
    large = entry("large", os.urandom(300_000)).signed(UPSTREAM)
    upstream.add(ITEM, large)
    absent = entry("absent")
    for way in ("cold", "warm"):
        async with narseal(tmp_path / way, {"url": upstream.url}, prefetch="off") as client:
            for item in (ITEM, large):
                await client.narinfo(item.hash)
                if way == "warm":
                    url = item.info.url
                    await client.get(url)
                    await client.until(lambda url=url: url in client.published())  # type: ignore[misc]
                    await client.get(url)
            async with Wire(client) as wire:
                await wire.send(get("/nix-cache-info"))
                expected = (await wire.answer())[2]
                for item in (ITEM, large, absent):
                    for target in (f"/{item.hash}.narinfo", f"/{item.info.url}"):
                        heads = []
                        for more in ([], ["X-Odd: 1"]):
                            await wire.send(get(target, *more).replace(b"GET", b"HEAD", 1))
                            head = await wire.reader.readuntil(b"\r\n\r\n")
                            heads.append((head[:12], fields(head)))
                            await wire.send(get("/nix-cache-info"))
                            assert (await wire.answer())[2] == expected
                        assert heads[0] == heads[1], target
                        assert heads[0][0][-3:] == (b"404" if item == absent else b"200")


async def test_what_comes_behind_a_miss_waits_for_it(tmp_path: Path, upstream: FakeCache) -> None:
    others = [entry(f"other{n}").signed(UPSTREAM) for n in range(3)]
    upstream.add(ITEM, *others)
    asked, goes_on = late(upstream)
    async with narseal(tmp_path, {"url": upstream.url}) as client, Wire(client) as wire:
        await wire.send(get(f"/{ITEM.hash}.narinfo"))
        await asked.wait()
        for other in others:
            await wire.send(get(f"/{other.hash}.narinfo"))
        await wire.send(get("/nix-cache-info"))
        goes_on.set()
        for item in (ITEM, *others):
            status, _, body = await wire.answer()
            assert (status, NarInfo.parse(body).store_path) == (200, item.info.store_path)
        assert (await wire.answer())[2].startswith(b"StoreDir")


async def test_a_client_that_leaves_a_miss_is_counted_and_ends_no_flight(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    asked, goes_on = late(upstream)
    async with narseal(tmp_path, {"url": upstream.url}) as client, Wire(client) as stays:
        left = metric("narseal_requests_total", route="narinfo", code="499")
        async with Wire(client) as leaves:
            await leaves.send(get(f"/{ITEM.hash}.narinfo"))
            await asked.wait()
            await stays.send(get(f"/{ITEM.hash}.narinfo"))

        async def is_counted() -> bool:
            return metric("narseal_requests_total", route="narinfo", code="499") == left + 1

        await eventually(is_counted)
        goes_on.set()
        assert (await stays.answer())[0] == 200
    assert upstream.asked[f"{ITEM.hash}.narinfo"] == 1


async def test_a_server_that_stops_answers_the_misses_that_it_has(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    asked, goes_on = late(upstream)
    with narseal_process(tmp_path, {"url": upstream.url}) as proxy:
        async with Wire(proxy) as wire:
            await wire.send(get(f"/{ITEM.hash}.narinfo"))
            await asked.wait()
            proxy.process.terminate()
            await eventually(lambda: refuses(proxy))
            goes_on.set()
            status, head, body = await wire.answer()
            assert (status, b"Connection: close" in head) == (200, True)
            assert NarInfo.parse(body).store_path == ITEM.info.store_path
            assert await wire.reader.read() == b""
        assert await asyncio.to_thread(proxy.process.wait, PATIENCE) == 0


async def test_a_worker_that_is_replaced_answers_the_misses_that_it_has(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    asked, goes_on = late(upstream)
    with narseal_process(tmp_path, {"url": upstream.url}) as proxy:
        async with Wire(proxy) as idle, Wire(proxy) as wire:
            await idle.send(get("/nix-cache-info"))
            await idle.answer()
            await wire.send(get(f"/{ITEM.hash}.narinfo"))
            await asked.wait()
            config = tmp_path / "narseal.toml"
            config.write_text(f"priority = 31\n{config.read_text()}")
            proxy.process.send_signal(signal.SIGHUP)
            # once it looked which connections can be closed, of which this is one
            assert await asyncio.wait_for(idle.reader.read(), PATIENCE) == b""
            goes_on.set()
            status, head, _ = await wire.answer()
            assert (status, b"Connection: close" in head) == (200, True)


async def refuses(proxy: Process) -> bool:
    """Whether there is nobody who takes a new connection."""
    try:
        async with Wire(proxy):
            return False
    except ConnectionError:
        return True


async def test_requests_of_one_instant_are_begun_in_turns(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """What one client sends in 200 connections does not stand before another's."""
    came: list[str] = []

    async def ask(wire: Wire) -> None:
        assert (await wire.answer())[0] == 404
        came.append(wire.address)

    async with narseal(tmp_path, {"url": upstream.url}) as client, AsyncExitStack() as stack:
        addresses = ["127.0.0.2"] * 200 + ["127.0.0.3"]
        wires = [await stack.enter_async_context(Wire(client, address)) for address in addresses]
        for wire in wires:  # each is known by now
            await wire.send(get("/x"))
            await wire.answer()
        for wire in wires:
            wire.writer.write(get("/y"))
        await asyncio.gather(*map(ask, wires))
    assert came.index("127.0.0.3") < 150


@pytest.mark.parametrize("how", ["now", "in_time"])
async def test_what_waits_for_its_turn_is_answered_though_the_server_stops(
    how: str, tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_queue, "_TOGETHER", 1)  # they wait for long
    limits = {"shutdown_timeout": f"{PATIENCE:.0f}s"}
    async with AsyncExitStack() as stack:
        async with narseal(tmp_path, {"url": upstream.url}, limits=limits) as client:
            wires = [await stack.enter_async_context(Wire(client)) for _ in range(200)]
            for wire in wires:
                await wire.send(get("/x"))
                await wire.answer()
            for wire in wires:
                wire.writer.write(get("/y") + get("/z"))
            assert (await wires[0].answer())[0] == 404
            getattr(client.stop, how)()
            for wire in wires[1:]:
                assert (await wire.answer())[0] == 404


async def test_an_upload_that_is_on_its_way_is_taken_though_the_server_stops(
    tmp_path: Path,
) -> None:
    """What came of its body behind the signal was passed over."""
    token = add(tmp_path)
    upload = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    limits = {"shutdown_timeout": f"{PATIENCE:.0f}s"}
    head = (
        f"PUT /{ITEM.info.url} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Length: {len(ITEM.file)}\r\nExpect: 100-continue\r\n\r\n"
    )
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(narseal(tmp_path, upload=upload, limits=limits))
        wire = await Wire(client).__aenter__()
        await wire.send(head.encode())
        assert b" 100 " in await wire.reader.readuntil(b"\r\n\r\n")
        await wire.send(ITEM.file[:10])
        stopping = asyncio.create_task(stack.aclose())

        async def stops() -> bool:
            try:
                await Wire(client).__aenter__()
            except OSError:
                return True
            return False

        await eventually(stops)
        await wire.send(ITEM.file[10:])
        assert (await wire.answer())[0] == 201
        await stopping


async def test_a_client_that_reads_nothing_takes_no_memory(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Each of its requests is small and plain, and each answer is a thousand times as long."""
    item = entry("large", os.urandom(60_000)).signed(UPSTREAM)
    upstream.add(item)
    with narseal_process(tmp_path, {"url": upstream.url}) as proxy:
        pid = proxy.workers()[0]
        async with Wire(proxy) as wire:
            for target in (f"/{item.hash}.narinfo", f"/{item.info.url}"):
                await wire.send(get(target))
                assert (await wire.answer())[0] == 200
            before = resident(pid)
            request = get(f"/{item.info.url}")
            with suppress(TimeoutError, ConnectionError):  # it may be cut off
                async with asyncio.timeout(10):
                    for _ in range(3000):  # a packet each: 180 MB if all were answered
                        await wire.send(request)
                        await asyncio.sleep(0.001)
            assert resident(pid) - before < 32 << 20


HOSTILE = [
    "/nar/..%2f..%2fetc%2fpasswd", "/nar/../../etc/passwd", "/nar/%00", "/nar/%0a",
    "/../etc/passwd", "//etc/passwd", "/nar//etc/passwd", f"/{'0' * 32}.narinfo%00",
    f"/{'0' * 32}.narinfo/..", f"/{'e' * 32}.narinfo", f"/{'0' * 31}.narinfo",
    f"/{'0' * 33}.narinfo", f"/{'0' * 32}.NARINFO", "/log/../../etc/passwd",
    "/log/%2e%2e%2fetc%2fpasswd", f"/log/{'0' * 32}-%2e%2e%2fx", f"/debuginfo/{'g' * 40}",
    "/realisations/x.doi", f"/realisations/sha256:{'0' * 64}%21..%2fx.doi",
    f"/build-trace-v2/{'0' * 32}-x.drv/..%2f..%2fx.doi", f"/nar/{'0' * 52}.nar.exe",
    f"/nar/{'0' * 52}.nar.xz%20", "/.narseal/lock", "/.narseal/incoming/x", "/index.sqlite",
    f"/nar/{'0' * 52}.nar;x", "/nar/" + "0" * 3000, "/%ff%fe", "/nar/\u0000".replace("\0", "%00"),
]  # fmt: skip


PAYLOADS = [
    "..", "%2e%2e", "..%2f", "%2e%2e%2f", "..%5c", "%252e%252e%252f", "%c0%ae%c0%ae", ".%00.", "%00",
    "%0a", "%0d%0aX:y", "%20", "~", "*", "?", "%3f", ";", "..;", "\\..\\", "%7e", "%ff", "'", '"', "<x>",
    "${x}", "%24%7bx%7d", "a" * 500, "%2fetc%2fpasswd", "etc/passwd", ".narseal/lock",
]  # fmt: skip
PREFIXES = ["/", "/nar/", "/log/", "/debuginfo/", "/realisations/", "/build-trace-v2/",
            f"/{'0' * 32}.ls", f"/{'0' * 32}.narinfo", f"/nar/{'0' * 52}.nar", "/pubkey/"]  # fmt: skip
HOSTILE += [prefix + payload for prefix in PREFIXES for payload in PAYLOADS]


async def test_no_hostile_path_reaches_a_file(tmp_path: Path, upstream: FakeCache) -> None:
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        for target in HOSTILE:
            async with Wire(client) as wire:
                await wire.send(get(target))
                status, _, body = await wire.answer()
                # a query changes nothing: /?x is the status page, a narinfo with ? is that narinfo
                known = target.startswith("/?") or ("?" in target and status in (404, 502))
                assert known or status in (400, 404), target
                assert b"root:" not in body
        assert not any("passwd" in name for name in upstream.asked)


BROKEN_HTTP = [
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: a\nY: b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(200)) + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 10_000 + b"\r\n\r\n",
    b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
]


@pytest.mark.parametrize("number", range(len(BROKEN_HTTP)))
async def test_broken_http_is_400_and_the_end(
    number: int, tmp_path: Path, upstream: FakeCache
) -> None:
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        async with Wire(client) as wire:
            await wire.send(BROKEN_HTTP[number])
            assert (await wire.answer())[0] == 400
            assert await asyncio.wait_for(wire.reader.read(), PATIENCE) == b""
        assert (await client.get("healthz"))[0] == 200


async def test_headers_that_change_the_answer_do_not_take_the_hot_path(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        _, body, headers = await client.get(f"{ITEM.hash}.narinfo")
        target = f"/{ITEM.hash}.narinfo"
        async with Wire(client) as wire:
            for more, status in (
                (f"If-None-Match: {headers['ETag']}", 304), ("Range: bytes=0-0", 206),
                ("Host: y", 400),
            ):  # fmt: skip
                await wire.send(get(target))
                assert (await wire.answer())[2] == body
                await wire.send(get(target, more))
                if status == 304:
                    head = await wire.reader.readuntil(b"\r\n\r\n")
                    assert b" 304 " in head
                else:
                    assert (await wire.answer())[0] == status
        async with Wire(client) as wire:
            await wire.send(get(target, "Connection: close"))
            assert (await wire.answer())[2] == body
            assert await asyncio.wait_for(wire.reader.read(), PATIENCE) == b""
        async with Wire(client) as wire:
            await wire.send(get(target).replace(b"HTTP/1.1", b"HTTP/1.0"))
            assert (await wire.answer())[2] == body


async def test_a_dribbled_head_is_cut_off_at_its_deadline(
    tmp_path: Path, upstream: FakeCache
) -> None:
    async with (
        narseal(tmp_path, {"url": upstream.url}, limits={"header_timeout": "2s"}) as client,
        Wire(client) as silent,
        Wire(client) as dribbling,
        Wire(client) as good,
    ):
        await good.send(get("/healthz"))
        await good.answer()
        await dribbling.send(get("/healthz"))
        await dribbling.answer()
        endless = itertools.chain(b"GET /", itertools.repeat(ord("x")))

        async def cut_off() -> bool:
            if not dribbling.writer.is_closing():
                dribbling.writer.write(bytes([next(endless)]))
            await asyncio.sleep(0.1)
            # closed, or reset because of a byte that was on its way
            return dribbling.reader.at_eof() or dribbling.reader.exception() is not None

        await eventually(cut_off)
        assert await silent.reader.read() == b""
        await good.send(get("/healthz"))  # idle between requests is not a dribble
        assert (await good.answer())[0] == 200


async def test_connections_of_one_address_are_bounded(tmp_path: Path, upstream: FakeCache) -> None:
    async with narseal(
        tmp_path, {"url": upstream.url}, limits={"connections_per_address": 5}
    ) as client:
        wires = [await Wire(client).__aenter__() for _ in range(8)]
        answered = 0
        for wire in wires:
            try:
                await wire.send(get("/healthz"))
                answered += (await wire.answer())[0] == 200
            except (asyncio.IncompleteReadError, ConnectionError):
                continue
        assert answered == 5
        for wire in wires:
            wire.writer.close()


async def test_any_bytes_leave_the_server_standing(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(ITEM)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        good = (await client.get(f"{ITEM.hash}.narinfo"))[1]
        request = get(f"/{ITEM.hash}.narinfo")
        samples: list[bytes] = []

        @settings(max_examples=150, suppress_health_check=list(HealthCheck), database=None)
        @given(st.integers(0, len(request)), st.binary(max_size=8), st.integers(0, 8))
        def collect(at: int, more: bytes, less: int) -> None:
            samples.append(request[:at] + more + request[at + less :])

        collect()
        for sample in samples:
            async with Wire(client) as wire:
                await wire.send(sample)
                wire.writer.write_eof()
                answer = await asyncio.wait_for(wire.reader.read(), PATIENCE)
                assert not answer or answer.startswith(b"HTTP/1.")
        async with Wire(client) as wire:
            await wire.send(request)
            assert (await wire.answer())[2] == good


HEAD = 16 << 10


def padded(size: int, begin: bytes = b"GET /nix-cache-info HTTP/1.1\r\nHost: x\r\n") -> bytes:
    """A request whose head has so many bytes, in fields that are short enough each."""
    head = begin
    while (left := size - len(head) - 2) > 0:
        line = min(left, 4000)
        line = line if left - line == 0 or left - line >= 10 else line - 10
        head += b"X-Y: ".ljust(line - 2, b"y") + b"\r\n"
    return head + b"\r\n"


@pytest.mark.parametrize("portion", [1 << 18, 4096, 1000, 7])
async def test_a_head_is_bounded_as_a_whole(
    portion: int, tmp_path: Path, upstream: FakeCache
) -> None:
    limits = {"header_timeout": f"{PATIENCE:.0f}s"}
    async with narseal(tmp_path, {"url": upstream.url}, limits=limits) as client:
        good = padded(HEAD)
        assert len(good) == HEAD
        for request, expected in ((good, 200), (padded(HEAD + 1), 431), (padded(200_000), 431)):
            async with Wire(client) as wire:
                pieces = [request[at : at + portion] for at in range(0, len(request), portion)]
                await wire.send(*pieces)
                assert (await wire.answer())[0] == expected
                if expected == 431:
                    assert await wire.reader.read() == b""
                else:  # each of a connection anew
                    await wire.send(*pieces)
                    assert (await wire.answer())[0] == expected


async def test_bodies_do_not_count_as_heads(tmp_path: Path, upstream: FakeCache) -> None:
    """Whatever they hold, however they are torn, and with a head behind them."""
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        body = (b"x" * 50 + b"\r\n\r\n") * 3000
        sized = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        for request in (sized, chunked):
            for portion in (1 << 18, 5000):
                async with Wire(client) as wire:
                    pieces = [request[at : at + portion] for at in range(0, len(request), portion)]
                    with suppress(ConnectionError):  # who does not read it says so at once
                        await wire.send(*pieces)
                    assert (await wire.answer())[0] == 405


async def test_what_comes_behind_chunks_is_answered(tmp_path: Path) -> None:
    """Wherever the body ends in what is given to the parser at a time; some 16 KiB of it were taken for the next head."""
    token = add(tmp_path)
    upload = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    async with narseal(tmp_path, upload=upload) as client:
        put = f"PUT /nix-cache-info HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        for size in range(24_000, 24_700, 10):
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (size, bytes(size))
            request = put.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + body
            async with Wire(client) as wire:
                await wire.send(request + get("/pubkey") * 2)
                assert [(await wire.answer())[0] for _ in range(3)] == [200] * 3, size


async def test_heads_that_wait_for_their_turn_are_bounded(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Behind an answer that takes long, no more than one large head."""
    upstream.add(ITEM)
    asked, goes_on = asyncio.Event(), asyncio.Event()

    async def fault(_: web.Request) -> web.StreamResponse:
        asked.set()
        await goes_on.wait()
        return web.Response(status=404)

    upstream.fault(f"{ITEM.hash}.narinfo", fault)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        for more in ((), ("X-Y: aiohttp's",)):
            async with Wire(client) as wire:
                await wire.send(get(f"/{ITEM.hash}.narinfo", *more))
                await asked.wait()
                with suppress(ConnectionError):
                    for _ in range(4):
                        await wire.send(padded(8000))
                    # the connection ended
                    assert await asyncio.wait_for(wire.reader.read(), PATIENCE) == b""
        goes_on.set()
