"""The hot path: a whole, plain GET on an idle connection is answered from memory.

It recognises the request in the raw bytes: `GET <target> HTTP/1.1` and a block of harmless
headers, nothing before, nothing behind. What such a request, or a HEAD, asks for and is not in memory, `misses`
finds. Anything else goes to aiohttp, within the bounds of `bounded`. What is not in memory waits for its turn
(`request_queue`). It also keeps the deadline for a request's head, and the bounds on connections, for all of them.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from time import perf_counter, time
from typing import Any

from aiohttp import web

from narseal.config import LimitsConfig
from narseal.pipeline.caches import HotMap
from narseal.server.bounded import END_OF_HEAD, MAX_HEAD, BoundedProtocol, Buffers, Reading
from narseal.server.misses import Miss, Misses
from narseal.server.request_queue import RequestQueue
from narseal.server.tally import Tally

_GET = b"GET /"
_HEAD = b"HEAD /"
_VERSION = b" HTTP/1.1\r\n"
_MAX_TARGET = 100
_MAX_HEAD = 2048
#: Headers that change nothing of an answer from memory.
_HARMLESS = frozenset(
    (
        b"host",
        b"user-agent",
        b"accept",
        b"accept-encoding",
        b"accept-language",
        b"cache-control",
        b"pragma",
        b"dnt",
        b"traceparent",
        b"tracestate",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
        b"x-real-ip",
        b"forwarded",
        b"via",
    )
)
_KNOWN_HEADS = 1024
#: Descriptors that no connection takes: for files, upstreams, the index; an eighth, at most so many.
_RESERVE = 256
_WAITING = 0.25  # of them, for connections that wait to be told that there is no room
_NO_ROOM_TEXT = "no room for more connections now; ask again\n"
_NO_ROOM = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n"
    f"Content-Length: {len(_NO_ROOM_TEXT)}\r\nCache-Control: no-store\r\n"
    "X-Narseal-Reason: unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
    f"Server: narseal\r\n\r\n{_NO_ROOM_TEXT}"
).encode()
_SWEEP = 1.0
_LOOK = 0.01  # seconds between two looks at whether what came was begun


class HotServer(web.Server):
    """aiohttp's server, with our protocol on each connection."""

    def __init__(
        self,
        inner: web.Server,
        options: dict[str, Any],
        *,
        hot: HotMap,
        misses: Misses | None,
        limits: LimitsConfig,
        tally: Tally,
    ) -> None:
        super().__init__(inner.request_handler, request_factory=inner.request_factory, **options)
        self.hot = hot
        self.misses = misses
        self.tally = tally
        self.limits = limits
        #: Each answer is its connection's last.
        self.draining = False
        #: The first lines of an answer from memory, and when idle connections end, as of this second.
        self.begin = b""
        self.keepalive_until = 0.0
        #: Blocks of headers that were found harmless, so that each is looked at once.
        self.harmless: dict[bytes, None] = {}
        self.per_address: Counter[str] = Counter()
        self.buffers = Buffers()
        self.queue = RequestQueue(self._loop)
        self._options = options
        self._date = ""
        self._tick()

    def __call__(self) -> Reading:  # type: ignore[override] # aiohttp only gives it to the loop
        """A protocol for a new connection."""
        return Reading(HotProtocol(self, loop=self._loop, **self._options))

    def _tick(self) -> None:
        """Every second: the Date header, and the deadlines of heads."""
        self._date = formatdate(time(), usegmt=True)
        self.begin = self.begin_of(200)
        late = self._loop.time() - self.limits.header_timeout
        for protocol in self.connections:
            if isinstance(protocol, HotProtocol) and protocol.is_late(late):
                protocol.force_close()
        self.keepalive_until = self._loop.time() + self.limits.keepalive_timeout
        self._timer = self._loop.call_later(_SWEEP, self._tick)

    def begin_of(self, status: int, *, is_last: bool = False) -> bytes:
        """The first lines of an answer; `is_last` of its connection."""
        last = "Connection: close\r\n" if is_last else ""
        phrase = HTTPStatus(status).phrase
        return f"HTTP/1.1 {status} {phrase}\r\nDate: {self._date}\r\n{last}".encode()

    def drain(self) -> None:
        """Close the connections that nobody waits at; the others end with their next answer.

        To be called again and again: aiohttp's own way leaves idle connections open and deaf.
        """
        self.draining = True
        fresh = self._loop.time() - _FRESH
        for protocol in list(self.connections):
            if isinstance(protocol, HotProtocol):
                protocol.drain(fresh)

    async def shutdown(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aiohttp's
        """Let running answers end."""
        self._timer.cancel()
        await super().shutdown(timeout)


_NEVER = float("inf")
_FRESH = 0.5  # seconds in which the first request of a connection is on its way


class HotProtocol(BoundedProtocol):
    """One connection, some of whose requests aiohttp never sees."""

    __slots__ = (
        "_address",
        "_behind",
        "_came",
        "_eligible",
        "_miss",
        "_partial",
        "_server",
        "_to_close",
        "_turned_away",
        "missed",
        "waits_since",
    )

    def __init__(self, server: HotServer, **options: Any) -> None:
        super().__init__(server, server.buffers, **options)
        self._server = server
        self._address = ""
        #: aiohttp's parser may hold the beginning of something.
        self._partial = False
        self._eligible = False
        self._turned_away = False
        #: When what waits for its turn came (perf_counter); 0: nothing does.
        self._came = 0.0
        #: What finds the answer to a request that was not in memory, and what came behind that.
        self._miss: asyncio.Task[None] | None = None
        self._behind = bytearray()
        #: The connection is to be closed when that was answered.
        self._to_close = False
        #: The request that is handed on was looked for already, in vain.
        self.missed = False
        #: When the head began that is not complete yet; infinity while none is awaited.
        self.waits_since = _NEVER

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, or turn it away."""
        server = self._server
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if isinstance(peer, tuple) else ""
        super().connection_made(transport)
        self.waits_since = self._loop.time()
        server.per_address[self._address] += 1
        crowded = (
            self._address
            and server.per_address[self._address] > server.limits.connections_per_address
        )
        scarcity = _scarcity(transport)
        if crowded or len(server.connections) > server.limits.connections or scarcity:
            self._eligible = False
            self._turned_away = True
            if scarcity > _WAITING:  # no descriptor is left to wait for its request with
                self._turn_away()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Give the connection's place away; nobody waits for an answer any more."""
        if self._miss:
            self._miss.cancel()
        self._server.per_address[self._address] -= 1
        if self._server.per_address[self._address] <= 0:
            del self._server.per_address[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes | int) -> None:
        """Answer from memory, or hand on to aiohttp."""
        if isinstance(data, int):
            data = bytes(self.buffer[:data])
        if not self._eligible and self._is_taken(data):
            return
        start = perf_counter()
        server = self._server
        target = b""
        looks = False
        if (data.startswith(_GET) or (looks := data.startswith(_HEAD))) and (
            self._eligible or self._is_eligible()
        ):
            begin = 5 if looks else 4
            stop = data.find(b" ", begin, _MAX_TARGET)
            answer = None if looks else server.hot.get(data[4:stop])
            head = data[stop:]
            # a block of headers that is known to be harmless is also known to be whole
            if head in server.harmless or self._is_harmless(head):
                if answer is not None:
                    self.transport.write(server.begin + answer.rest)  # type: ignore[union-attr]
                    self.waits_since = _NEVER
                    self._next_keepalive_close_time = server.keepalive_until
                    server.tally.hit(answer, data[4:stop], perf_counter() - start)
                    return
                target = data[begin:stop]
        if data and not (self.is_body() or server.queue.may_begin(self)):
            self._eligible = False
            self._came = self._came or start
            self.hold(data)
            server.queue.add(self._address, self)
            return
        start, self._came = self._came or start, 0.0
        if target and server.misses and (miss := server.misses.of(target, start, only_looks=looks)):
            self.waits_since = _NEVER
            self._eligible = False
            self._miss = self._loop.create_task(self._answer(server.misses, miss, data))
        else:
            self._hand_on(data)

    def _is_taken(self, data: bytes) -> bool:
        """What came is no request now: nobody wants it, it waits, or its connection is turned away."""
        if self._deaf:
            return True
        if self._drops:
            self._drop(data)
            return True
        if self._miss:
            self._wait_behind(data)
            return True
        if self._turned_away:
            self._turn_away()
            return True
        return False

    def _wait_behind(self, data: bytes) -> None:
        """Keep what comes behind a request that is being answered, as much as heads may have together."""
        self._behind += data
        if len(self._behind) >= MAX_HEAD:
            self.force_close()

    async def _answer(self, misses: Misses, miss: Miss, request: bytes) -> None:
        """Find what was not in memory, answer, and go on with what came behind the request."""
        answer = await misses.answer(miss, self._address)
        self._miss = None
        if self.transport is None or self._force_close:
            return
        if answer is None:
            self.missed = True
            self._hand_on(request)
        else:
            server = self._server
            begin = server.begin_of(answer.status, is_last=server.draining)
            self.transport.write(begin + answer.rest)
            self._next_keepalive_close_time = server.keepalive_until
            if server.draining or self._to_close:
                self.force_close()
                return
        if self._to_close:
            self.close()
        elif self._behind:
            behind = bytes(self._behind)
            self._behind.clear()
            self.data_received(behind)

    def _process_keepalive(self) -> None:
        """As aiohttp's, which does not know of what `_answer` is about, or of what waits for its turn."""
        if self._miss or self.holds:
            self._next_keepalive_close_time = self._server.keepalive_until
        super()._process_keepalive()

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's
        """Let what came be answered, for a bounded time."""
        end = self._loop.time() + (15.0 if timeout is None else timeout)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                while self.transport and (self._is_under_way() or self._messages):  # noqa: ASYNC110 - aiohttp has no event
                    await asyncio.sleep(_LOOK)
                if self._miss:
                    await asyncio.wait([self._miss])
        await super().shutdown(max(_LOOK, end - self._loop.time()))  # 0 would be for ever

    def _turn_away(self) -> None:
        """Say that there is no room now; a connection that is just closed looks like a fault."""
        if self.transport is not None:
            self.transport.write(_NO_ROOM)
        self.force_close()

    def pause_writing(self) -> None:
        """The client takes nothing: what it asks for now is aiohttp's, which waits for it."""
        self._eligible = False
        super().pause_writing()

    def close(self) -> None:
        """See RequestHandler.close, after which nothing is read: what came, and a body on its way, has its answer first.

        While the server stops, that is its connection's last.
        """
        self._eligible = False
        if self._miss or self._is_under_way():
            self._to_close = True
        else:
            super().close()

    def _is_under_way(self) -> bool:
        """A request waits for its turn, or its body is not all there."""
        return self.holds or (self.is_body() and not self._drops and self.transport is not None)

    def force_close(self) -> None:
        """See RequestHandler.force_close."""
        self._eligible = False
        super().force_close()

    def _hand_on(self, data: bytes) -> None:
        self._eligible = False
        before = self._request_count
        self.give(data)
        self._partial = self._request_count == before or not data.endswith(END_OF_HEAD)
        if not (self._partial and self.is_parked()):
            self.waits_since = _NEVER
        elif self.waits_since == _NEVER:
            self.waits_since = self._loop.time()

    def _is_eligible(self) -> bool:
        """Nothing stands between a request and its answer; true until something is handed on."""
        self._eligible = (
            not self._partial
            and self.is_parked()
            and self.transport is not None
            and not self._paused
            and not self._server.draining
        )
        return self._eligible

    def drain(self, fresh: float) -> None:
        """Close the connection if nothing is being answered or read.

        One that has brought nothing yet is left until it is older than the loop time `fresh`.
        """
        self._eligible = False
        began = self.waits_since == _NEVER or self.waits_since < fresh
        if began and not self._partial and self.is_parked():
            self.force_close()

    def is_parked(self) -> bool:
        """Nor is an answer being looked for, or a request waiting for its turn."""
        return self._miss is None and not self.holds and super().is_parked()

    def is_late(self, deadline: float) -> bool:
        """The head of a request began before a loop time, and its client has not sent all of it."""
        return self.waits_since < deadline and not self.holds

    def _is_harmless(self, head: bytes) -> bool:
        known = self._server.harmless
        if (
            len(head) > _MAX_HEAD
            or not head.startswith(_VERSION)
            or head.find(END_OF_HEAD) != len(head) - len(END_OF_HEAD)
        ):
            return False
        names = set()
        for line in head[len(_VERSION) : -len(END_OF_HEAD)].split(b"\r\n"):
            name, colon, _ = line.lower().partition(b":")
            if line.lower() == b"connection: keep-alive":
                continue
            if not colon or name in names or not _is_printable(line):
                return False
            if name not in _HARMLESS and name != b"authorization":
                return False
            names.add(name)
        if b"host" not in names:
            return False
        if b"authorization" in names:
            # Nix sends it with every request to a host of its netrc. It is not remembered, and it changes nothing:
            # where reading needs a token, nothing is in memory, and there are no misses
            return True
        if len(known) >= _KNOWN_HEADS:
            known.clear()
        known[head] = None
        return True


def _scarcity(transport: asyncio.BaseTransport) -> float:
    """How much of the reserve of descriptors a connection takes: 0 none, 1 all of it.

    The kernel gives the lowest number that is free, so that a high one says how many are taken.
    """
    sock = transport.get_extra_info("socket")
    if sock is None:
        return 0.0
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    reserve = min(_RESERVE, limit // 8)
    return float(max(0, sock.fileno() - (limit - reserve)) / reserve)


def _is_printable(line: bytes) -> bool:
    return line.isascii() and line.decode("ascii").isprintable()
