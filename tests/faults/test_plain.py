"""The upstream client and servers that answer wrongly, over real sockets, on both loops.

Whatever a server sends: nobody gets another's answer, and nobody waits beyond the deadline.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop

from narseal.config import UpstreamConfig
from narseal.errors import Refused, UpstreamTimeout, UpstreamTrouble
from narseal.upstream import HttpUpstream, http, plain
from tests.bench.servers import nginx
from tests.tools.narseal import UPSTREAM
from tests.tools.waiting import PATIENCE, eventually

LIMIT = 1 << 20
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def sized(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    """A good answer."""
    head = b"".join(field + b"\r\n" for field in fields)
    return b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n%s" % (status, head, len(body), body)


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Any:
    """asyncio's own, and the one that workers have."""

    @pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
    @wraps(test)
    def run(*args: Any, loop: str, **options: Any) -> None:
        factory = uvloop.new_event_loop if loop == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(test(*args, **options))

    signature = inspect.signature(test)
    added = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])
    return run


@dataclass
class Talk:
    """A server's side of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int

    async def request(self) -> str:
        """The next request's target; "" at the end."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError):
            return ""
        assert head.startswith(b"GET /") and b"\r\nHost: " in head, head
        return head.split()[1].decode().lstrip("/")

    async def send(self, data: bytes) -> None:
        with suppress(OSError):
            self.writer.write(data)
            await self.writer.drain()


@dataclass
class Host:
    """A server, and who is connected to it."""

    url: str = ""
    came: int = 0
    open: set[Talk] = field(default_factory=set)


@asynccontextmanager
async def serving(
    work: Callable[[Talk], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[Host]:
    """Does `work` with each connection, then closes it."""
    host = Host()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        host.came += 1
        talk = Talk(reader, writer, host.came)
        try:
            with suppress(asyncio.CancelledError):  # at the end
                await work(talk)
        finally:
            writer.transport.abort() if tls else writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    host.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(PATIENCE):
            yield host
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def asking(url: str, **more: Any) -> AsyncIterator[HttpUpstream]:
    config = UpstreamConfig(url=url, public_keys=(UPSTREAM.public,), **more)
    upstream = HttpUpstream(config, lookups=256)
    try:
        yield upstream
    finally:
        await upstream.close()


def answering(**answers: bytes) -> Callable[[Talk], Awaitable[None]]:
    """Serves these, and `own` for whoever asks for that; after `…, close` it closes."""

    async def work(talk: Talk) -> None:
        while target := await talk.request():
            await talk.send(answers.get(target, sized(b"own")))
            if target.endswith("_close"):
                return

    return work


#: What is sent for a file; what that is: its bytes, None if it is absent, or a part of the error.
ROWS: dict[str, tuple[bytes, bytes | str | None]] = {
    "sized": (sized(b"abc"), b"abc"),
    "empty": (sized(b""), b""),
    "chunked": (CHUNKED + b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", b"abc"),
    "chunks with extensions": (CHUNKED + b'3;a="b;c";d\r\nabc\r\n0;x\r\n\r\n', b"abc"),
    "trailers": (CHUNKED + b"3\r\nabc\r\n0\r\nContent-Encoding: xz\r\n\r\n", b"abc"),
    "until the end, close": (OK + b"\r\nabc", b"abc"),
    "of HTTP/1.0, close": (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc"),
    "of HTTP/1.0 with a size": (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
    "Connection: close": (sized(b"abc", b"Connection: close"), b"abc"),
    "interim": (b"HTTP/1.1 103 Early\r\nContent-Encoding: xz\r\n\r\n" * 3 + sized(b"abc"), b"abc"),
    "without a reason": (b"HTTP/1.1 200\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
    "fields that are no text": (sized(b"abc", b"X: \xff\xfe"), b"abc"),
    "absent": (sized(b"not here", status=b"404 Not Found"), None),
    "forbidden": (sized(b"no", status=b"403 Forbidden"), None),
    "broken down": (sized(b"no", status=b"503 Busy"), "503"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", "204"),
    "a second answer": (sized(b"abc") + sized(b"evil"), b"abc"),
    "a second answer of chunks": (CHUNKED + b"3\r\nabc\r\n0\r\n\r\n" + sized(b"evil"), b"abc"),
    "longer than its size": (sized(b"abc") + b"defg", b"abc"),
    "half an answer more": (sized(b"abc") + OK + b"X: y", b"abc"),
    "204 with a body": (b"HTTP/1.1 204 X\r\nContent-Length: 4\r\n\r\n" + b"evil", "204"),
    "shorter than its size, close": (OK + b"Content-Length: 9\r\n\r\nabc", "too early"),
    "chunks that break off, close": (CHUNKED + b"3\r\nabc\r\n", "too early"),
    "a chunk that breaks off, close": (CHUNKED + b"9\r\nabc", "too early"),
    "half a head, close": (OK + b"Content-Le", "too early"),
    "nothing, close": (b"", "too early"),
    "only interim, close": (b"HTTP/1.1 100 Continue\r\n\r\n", "too early"),
    "a size twice": (OK + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", "no HTTP"),
    "two sizes": (OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", "no HTTP"),
    "a list of sizes": (OK + b"Content-Length: 3, 3\r\n\r\nabc", "no HTTP"),
    "a signed size": (OK + b"Content-Length: +3\r\n\r\nabc", "no HTTP"),
    "a negative size": (OK + b"Content-Length: -3\r\n\r\nabc", "no HTTP"),
    "a size beyond counting": (OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nabc", "no HTTP"),
    "a size and chunks": (
        OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "no HTTP",
    ),
    "chunks and a size": (
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", "no HTTP",
    ),
    "another transfer coding": (
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding",
    ),
    "a coding after chunks": (
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\nabc",
        "Transfer-Encoding",
    ),
    "a chunk beyond counting": (CHUNKED + b"f" * 17 + b"\r\nabc\r\n0\r\n\r\n", "no HTTP"),
    "a chunk of another size": (CHUNKED + b"2\r\nabc\r\n0\r\n\r\n", "no HTTP"),
    "a chunk of no size": (CHUNKED + b"x\r\nabc\r\n0\r\n\r\n", "no HTTP"),
    "a folded field": (sized(b"abc", b"X: y\r\n z"), "no HTTP"),
    "a space before the colon": (OK + b"Content-Length : 3\r\n\r\nabc", "no HTTP"),
    "NUL in a field": (sized(b"abc", b"X: a\0b"), "no HTTP"),
    "bare line feeds": (b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc", "no HTTP"),
    "switching protocols": (b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", "no HTTP"),
    "HTTP/2": (b"HTTP/2.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", "HTTP/2.0"),
    "HTTP/0.9": (b"abc", "no HTTP"),
    "a request": (b"GET / HTTP/1.1\r\n\r\n", "no HTTP"),
    "TLS": (b"\x15\x03\x01\x00\x02\x02\x46", "no HTTP"),
    "129 fields": (sized(b"abc", *[b"X: y"] * 128), "fields"),
    "a large field": (sized(b"abc", b"X: " + b"y" * (100 << 10)), "none of the body"),
    "a large reason": (sized(b"abc", status=b"200 " + b"y" * (100 << 10)), "none of the body"),
    "1,000 interim answers": (b"HTTP/1.1 100 C\r\nX: y\r\n\r\n" * 1000 + sized(b""), "fields"),
    "10,000 interim answers": (b"HTTP/1.1 100 C\r\n\r\n" * 10_000 + sized(b""), "none of the body"),
    "a large extension of a chunk": (
        CHUNKED + b"3;" + b"x" * (200 << 10) + b"\r\nabc\r\n0\r\n\r\n", "none of the body",
    ),
    "trailers without end": (CHUNKED + b"3\r\nabc\r\n0\r\n" + b"X: y\r\n" * 200, "fields"),
    "an unknown encoding": (sized(b"abc", b"Content-Encoding: x"), "Content-Encoding"),
    "two encodings": (
        sized(b"abc", b"Content-Encoding: gzip", b"Content-Encoding: br"), "Content-Encoding",
    ),
    "larger than may be": (OK + b"Content-Length: 99999999\r\n\r\n" + b"x" * LIMIT * 2, "more than"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@on_both_loops
async def test_an_answer_and_the_next_one(name: str) -> None:
    data, expected = ROWS[name]
    target = "it_close" if name.endswith("close") else "it"
    async with serving(answering(**{target: data})) as host, asking(host.url) as upstream:
        assert await upstream.get("first", limit=LIMIT) == b"own"
        if isinstance(expected, str):
            with pytest.raises((UpstreamTrouble, Refused), match=expected):
                await upstream.get(target, limit=LIMIT)
        else:
            assert await upstream.get(target, limit=LIMIT) == expected
        for _ in range(3):
            assert await upstream.get("own", limit=LIMIT) == b"own"


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if isinstance(row[1], bytes)])
@on_both_loops
async def test_a_stock_client_reads_the_same(name: str) -> None:
    target = "it_close" if name.endswith("close") else "it"
    async with serving(answering(**{target: ROWS[name][0]})) as host:
        async with aiohttp.ClientSession() as session:
            with suppress(aiohttp.ClientError):  # it may find fault with what is behind the answer
                async with session.get(f"{host.url}/{target}") as response:
                    assert await response.read() == ROWS[name][1]


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("name", ["chunks with extensions", "interim", "trailers", "sized"])
@on_both_loops
async def test_answers_in_pieces(name: str, size: int) -> None:
    data = ROWS[name][0]

    async def work(talk: Talk) -> None:
        talk.writer.transport.set_write_buffer_limits(0)
        while await talk.request():
            for at in range(0, len(data), size):
                await talk.send(data[at : at + size])
                await asyncio.sleep(0)

    async with serving(work) as host, asking(host.url) as upstream:
        for _ in range(3):
            assert await upstream.get("it", limit=LIMIT) == b"abc"
        assert host.came == 1


@pytest.mark.parametrize("endless", [b"X: y\r\n", b"HTTP/1.1 100 C\r\n\r\n", b"x", b"\r\n"])
@on_both_loops
async def test_heads_without_end_are_left(endless: bytes) -> None:
    """100 MB of them: after some 100 KB nobody listens any more."""
    sent = 0

    async def work(talk: Talk) -> None:
        nonlocal sent
        await talk.request()
        talk.writer.write(OK if endless == b"X: y\r\n" else b"")
        piece = endless * ((64 << 10) // len(endless))
        while sent < 100 << 20 and not talk.writer.transport.is_closing():
            talk.writer.write(piece)
            sent += len(piece)
            with suppress(OSError):
                await talk.writer.drain()

    async with serving(work) as host, asking(host.url) as upstream:
        with pytest.raises(UpstreamTrouble):
            await upstream.get("it", limit=LIMIT)
        # what the kernel holds for both sides
        assert sent < 20 << 20


@on_both_loops
async def test_a_kept_connection_is_used_again_and_by_one_at_a_time() -> None:
    async with serving(answering()) as host, asking(host.url) as upstream:
        for _ in range(20):
            assert await upstream.get("own", limit=LIMIT) == b"own"
        assert host.came == 1
        await asyncio.gather(*(upstream.get("own", limit=LIMIT) for _ in range(300)))
        assert host.came <= 64
        before = host.came
        await asyncio.gather(*(upstream.get("own", limit=LIMIT) for _ in range(300)))
        assert host.came == before


@pytest.mark.parametrize("kind", ["before", "after"])
@on_both_loops
async def test_a_connection_that_was_closed_under_us_is_no_trouble(kind: str) -> None:
    """While it is idle; or on the next request, before anything of the answer."""

    async def work(talk: Talk) -> None:
        await talk.request()
        await talk.send(sized(b"own"))
        if kind == "after" and talk.number == 1:
            await talk.request()

    async with serving(work) as host, asking(host.url) as upstream:
        for n in range(1, 5):
            assert await upstream.get("own", limit=LIMIT) == b"own"
            if kind == "before":
                assert host.came == n


@on_both_loops
async def test_an_answer_that_breaks_off_is_not_asked_for_again() -> None:
    async def work(talk: Talk) -> None:
        await talk.request()
        await talk.send(sized(b"own"))
        await talk.request()
        await talk.send(b"H")

    async with serving(work) as host, asking(host.url) as upstream:
        assert await upstream.get("own", limit=LIMIT) == b"own"
        with pytest.raises(UpstreamTrouble, match="too early"):
            await upstream.get("own", limit=LIMIT)
        assert host.came == 1


@on_both_loops
async def test_a_fresh_connection_is_tried_once() -> None:
    async def work(talk: Talk) -> None:
        await talk.request()
        if talk.number == 1:
            await talk.send(sized(b"own"))
            await talk.request()

    async with serving(work) as host, asking(host.url) as upstream:
        assert await upstream.get("own", limit=LIMIT) == b"own"
        with pytest.raises(UpstreamTrouble, match="too early"):
            await upstream.get("own", limit=LIMIT)
        assert host.came == 2


@on_both_loops
async def test_an_answer_that_nobody_asked_for_is_nobodys() -> None:
    """It comes while the connection is idle, and is there when that is to be asked again."""
    sent = asyncio.Event()

    async def work(talk: Talk) -> None:
        await talk.request()
        await talk.send(sized(b"own"))
        if talk.number == 1:
            await asyncio.sleep(0)
            await talk.send(sized(b"evil"))
            sent.set()
        await talk.request()
        await talk.send(sized(b"own"))

    async with serving(work) as host, asking(host.url) as upstream:
        assert await upstream.get("own", limit=LIMIT) == b"own"
        await sent.wait()
        for _ in range(2):
            assert await upstream.get("own", limit=LIMIT) == b"own"
        assert host.came == 2


@on_both_loops
async def test_a_host_that_speaks_first_is_not_believed() -> None:
    """A greeting is none of an answer; at worst it is nothing that makes sense."""

    async def work(talk: Talk) -> None:
        await talk.send(b"220 mail ESMTP\r\n")
        await talk.request()
        await talk.send(sized(b"own"))

    async with serving(work) as host, asking(host.url) as upstream:
        with pytest.raises(UpstreamTrouble):
            await upstream.get("own", limit=LIMIT)


@on_both_loops
async def test_who_is_cancelled_leaves_no_answer_to_the_next() -> None:
    arrived, let_go = asyncio.Event(), asyncio.Event()

    async def work(talk: Talk) -> None:
        while target := await talk.request():
            if target == "slow":
                arrived.set()
                await let_go.wait()
            await talk.send(sized(target.encode()))

    async with serving(work) as host, asking(host.url) as upstream:
        for _ in range(5):
            arrived.clear()
            let_go.clear()
            task = asyncio.create_task(upstream.get("slow", limit=LIMIT))
            await arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            let_go.set()
            for n in range(5):
                assert await upstream.get(f"{n}", limit=LIMIT) == b"%d" % n


@on_both_loops
async def test_many_who_are_cancelled_at_any_moment_hold_nothing() -> None:
    """Also in the queue for a connection, and while connecting."""

    async def work(talk: Talk) -> None:
        while target := await talk.request():
            for byte in sized(target.encode()):
                await talk.send(bytes([byte]))

    async with serving(work) as host, asking(host.url) as upstream:
        for turns in range(40):
            tasks = [asyncio.create_task(upstream.get(f"{n}", limit=LIMIT)) for n in range(100)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert found[1::2] == [b"%d" % n for n in range(1, 100, 2)]
            assert all(isinstance(e, asyncio.CancelledError | bytes) for e in found[::2])
        assert upstream._lookups.own._busy == 0
        await asyncio.gather(*(upstream.get(f"{n}", limit=LIMIT) for n in range(64)))


@pytest.mark.parametrize("kind", ["head", "body", "chunks", "nothing"])
@on_both_loops
async def test_what_drips_is_held_to_the_deadline(kind: str) -> None:
    async def work(talk: Talk) -> None:
        await talk.request()
        await talk.send({
            "head": OK, "body": OK + b"Content-Length: 99999\r\n\r\n", "chunks": CHUNKED,
        }.get(kind, b""))  # fmt: skip
        while kind != "nothing" and not talk.writer.transport.is_closing():
            await talk.send({"head": b"X", "body": b"x", "chunks": b"1\r\nx\r\n"}[kind])
            await asyncio.sleep(0.01)
        await asyncio.sleep(PATIENCE)

    async with serving(work) as host, asking(host.url, timeout=0.5) as upstream:
        with pytest.raises(UpstreamTimeout, match=r"no answer in 0\.5 s"):
            await upstream.get("it", limit=LIMIT)
        assert upstream._lookups.own._busy == 0


@on_both_loops
async def test_connecting_has_its_own_deadline() -> None:
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as full:
        port = full.getsockname()[1]
        lines = [socket.socket() for _ in range(8)]
        for line in lines:  # more than its queue takes
            line.setblocking(False)
            line.connect_ex(("127.0.0.1", port))
        there = {"connect_timeout": 0.5, "timeout": 600.0}
        async with asking(f"http://127.0.0.1:{port}", **there) as upstream:
            with pytest.raises(UpstreamTimeout, match=r"no connection in 0\.5 s"):
                await upstream.get("it", limit=LIMIT)
        for line in lines:
            line.close()


@on_both_loops
async def test_who_takes_nothing_is_sent_little() -> None:
    """What nobody reads is not read ahead: here, while a thread writes."""
    sent, go_on = 0, asyncio.Event()
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def write(data: bytes) -> None:
        if not started.is_set():
            loop.call_soon_threadsafe(started.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(PATIENCE)

    async def work(talk: Talk) -> None:
        nonlocal sent
        await talk.request()
        await talk.send(OK + b"Content-Length: %d\r\n\r\n" % (64 << 20))
        for _ in range(64 << 4):
            await talk.send(bytes(64 << 10))
            sent += 64 << 10

    async with serving(work) as host, asking(host.url, timeout=PATIENCE) as upstream:
        task = asyncio.create_task(upstream.save("it", write, limit=1 << 30))
        await started.wait()
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 32 << 20
        go_on.set()
        assert await task == 64 << 20


@on_both_loops
async def test_the_rest_of_an_answer_keeps_its_connection_if_it_is_short() -> None:
    let_go = asyncio.Event()

    async def work(talk: Talk) -> None:
        while target := await talk.request():
            if target == "absent":
                size = 1000 if talk.number == 1 else 99_000_000
                await talk.send(b"HTTP/1.1 404 X\r\nContent-Length: %d\r\n\r\n" % size)
                await let_go.wait()
                await talk.send(bytes(size))
            else:
                await talk.send(sized(b"own"))

    async with serving(work) as host, asking(host.url) as upstream:
        assert await upstream.get("absent", limit=LIMIT) is None
        let_go.set()

        async def is_kept() -> bool:
            return upstream._lookups.own._busy == 0

        await eventually(is_kept)
        if host.came == 1:  # it was soon enough
            assert await upstream.get("own", limit=LIMIT) == b"own"
        other = [upstream.get("absent", limit=LIMIT) for _ in range(3)]
        assert await asyncio.gather(*other) == [None] * 3
        await eventually(is_kept)
        assert await upstream.get("own", limit=LIMIT) == b"own"


@on_both_loops
async def test_answers_leave_no_cycles() -> None:
    async with serving(answering()) as host, asking(host.url) as upstream:
        await upstream.get("own", limit=LIMIT)
        gc.collect()
        gc.disable()
        try:
            for _ in range(50):
                await upstream.get("own", limit=LIMIT)
            left = sum(isinstance(thing, plain.Answer) for thing in gc.get_objects())
        finally:
            gc.enable()
        assert left <= 1


@on_both_loops
async def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_IDLE", 0.05)
    ended = asyncio.Event()

    async def work(talk: Talk) -> None:
        while await talk.request():
            await talk.send(sized(b"own"))
        ended.set()

    async with serving(work) as host, asking(host.url) as upstream:
        assert await upstream.get("own", limit=LIMIT) == b"own"
        await ended.wait()


@pytest.mark.parametrize("name", ["a b", "a\r\nX: y", "ü", "%0d%0a", "a?b", "a#b"])
@on_both_loops
async def test_names_go_as_they_are(name: str) -> None:
    """Or not at all, as addresses behind a redirect that no request can hold."""
    asked = []

    async def work(talk: Talk) -> None:
        while target := await talk.request():
            asked.append(target)
            await talk.send(sized(b"own"))

    async with serving(work) as host, asking(host.url) as upstream:
        assert await upstream.get(name, limit=LIMIT) == b"own"
    assert len(asked) == 1
    assert not any(char in asked[0] for char in " \r\n#?") and asked[0].isascii()


@pytest.mark.parametrize("location", [b"/a b", b"/\xc3\xbc", b"http://", b"//", b""])
@on_both_loops
async def test_redirects_that_no_request_can_hold(location: bytes) -> None:
    work = answering(it=sized(b"", b"Location: " + location, status=b"302 Found"))
    async with serving(work) as host, asking(host.url) as upstream:
        with pytest.raises(UpstreamTrouble):
            await upstream.get("it", limit=LIMIT)
        assert await upstream.get("own", limit=LIMIT) == b"own"


@on_both_loops
async def test_redirects_are_followed_so_far_on_the_same_connection() -> None:
    hops = {f"h{n}": sized(b"", b"Location: h%d" % (n + 1), status=b"302 F") for n in range(9)}
    async with serving(answering(**hops)) as host, asking(host.url) as upstream:
        assert await upstream.get("h4", limit=LIMIT) == b"own"  # five
        with pytest.raises(UpstreamTrouble, match="5 redirects"):
            await upstream.get("h3", limit=LIMIT)
        assert host.came == 1


@on_both_loops
async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with serving(answering()) as host, asking(host.url) as upstream:
        assert await upstream.get("own", limit=LIMIT) == b"own"


# TLS


def certificate(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A certificate that signs itself, and a server's context with it."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", "/CN=x", "-addext", f"subjectAltName={name}",
         "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    return cert, context


@pytest.fixture
def trust(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Has the client trust a certificate."""

    def trust(file: Path) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        http._tls.cache_clear()

    http._tls.cache_clear()
    yield trust
    http._tls.cache_clear()


@on_both_loops
async def test_tls_with_the_right_name(tmp_path: Path, trust: Callable[[Path], None]) -> None:
    cert, context = certificate(tmp_path, "DNS:localhost")
    named: list[str | None] = []
    context.sni_callback = lambda _, name, __: named.append(name)
    trust(cert)
    async with serving(answering(it=sized(b"x" * 500_000)), tls=context) as host:
        async with asking(host.url.replace("127.0.0.1", "localhost")) as upstream:
            for _ in range(3):
                assert await upstream.get("own", limit=LIMIT) == b"own"
                assert await upstream.get("it", limit=LIMIT) == b"x" * 500_000
            assert (host.came, named) == (1, ["localhost"])


@pytest.mark.parametrize("kind", ["untrusted", "another name", "another address"])
@on_both_loops
async def test_tls_that_must_not_be_trusted(
    kind: str, tmp_path: Path, trust: Callable[[Path], None]
) -> None:
    names = {"another name": "DNS:elsewhere.example"}
    cert, context = certificate(tmp_path, names.get(kind, "DNS:localhost"))
    if kind != "untrusted":
        trust(cert)
    asked = []

    async def work(talk: Talk) -> None:
        asked.append(await talk.request())

    async with serving(work, tls=context) as host:
        url = host.url.replace("127.0.0.1", "localhost")
        async with asking(host.url if "address" in kind else url) as upstream:
            with pytest.raises(UpstreamTrouble, match="CERTIFICATE_VERIFY_FAILED"):
                await upstream.get("own", limit=LIMIT)
    assert not any(asked)


@on_both_loops
async def test_a_host_that_never_shakes_hands_is_held_to_the_deadline() -> None:
    async def work(talk: Talk) -> None:
        await talk.reader.read()

    async with serving(work) as host:
        url = host.url.replace("http:", "https:")
        async with asking(url, connect_timeout=0.5, timeout=600.0) as upstream:
            with pytest.raises(UpstreamTimeout, match="no connection"):
                await upstream.get("own", limit=LIMIT)


@on_both_loops
async def test_nginx_is_asked_on_one_connection(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    (tmp_path / "x.narinfo").write_bytes(b"x" * 600)
    with nginx(f"root {tmp_path}; keepalive_requests 5;") as url:
        async with asking(url) as upstream:
            for _ in range(23):
                assert await upstream.get("x.narinfo", limit=LIMIT) == b"x" * 600
                assert await upstream.get("y.narinfo", limit=LIMIT) is None
