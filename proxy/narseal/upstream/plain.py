"""GETs of small things over HTTP/1.1, on connections that are kept: what a cold path is made of.

Whose answer it is is settled by construction: an answer has a parser of its own and a connection to
itself, and a connection is asked again only if it was silent from the end of one answer to the next request.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, Self, cast

import aiohappyeyeballs
import httptools
from yarl import URL

from narseal import __version__
from narseal.runtime.portions import READ_AHEAD
from narseal.upstream.addresses import public_socket

#: Of a client, at a time.
CONNECTIONS = 64
_IDLE = 15.0  # seconds; then a connection is closed
_RESOLVED = 10.0  # seconds that a host's addresses are remembered
_NEXT_ADDRESS = 0.25  # seconds; then the host's next address is tried as well (RFC 8305)
_FIELDS = 128
#: Bytes of an answer that are none of its body: heads, interim answers, sizes of chunks, trailers …
_OVERHEAD = 32 << 10
#: … and so many more for each byte of the body, which may be a chunk of its own.
_OVERHEAD_EACH = 16
#: The rest of an answer that nobody reads: up to so many bytes are waited for, and so long.
_REST = READ_AHEAD
_REST_SECONDS = 1.0
_TARGET = re.compile(r"/[!-~]*")
_FRAMING = {b"content-length", b"transfer-encoding"}
_BODILESS = (204, 304)


class BrokenAnswer(ConnectionError):
    """A connection that ended too early, or bytes that are no answer to what was asked."""


class _Unasked(BrokenAnswer):
    """A connection that was kept ended before anything of the answer came."""


class Place:
    """An origin, and what every request to it says."""

    def __init__(self, url: URL, headers: Mapping[str, str]) -> None:
        self.host = (url.raw_host or "").rstrip(".")
        self.port = url.port or 0
        self.is_tls = url.scheme == "https"
        own = {
            "Host": url.host_port_subcomponent or "",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "User-Agent": f"narseal/{__version__}",
        }
        replaced = {name.lower() for name in headers}
        fields = [(name, value) for name, value in own.items() if name.lower() not in replaced]
        lines = "".join(f"{name}: {value}\r\n" for name, value in (*fields, *headers.items()))
        self._rest = f" HTTP/1.1\r\n{lines}\r\n"
        #: What a connection to it is a connection to.
        self.key = (self.host, self.port, self.is_tls)

    def request(self, target: str) -> bytes:
        """A request for a path and its query."""
        if not _TARGET.fullmatch(target):
            raise BrokenAnswer(f"nobody can be asked for {target[:200]!a}")
        return f"GET {target}{self._rest}".encode("ascii")


class Client:
    """Asks any origin; with `public_only` at public addresses alone, held to those that are connected to.

    At most 64 connections. What the environment says of proxies is not looked at.
    """

    def __init__(
        self, tls: ssl.SSLContext, *, connect_timeout: float, public_only: bool = False
    ) -> None:
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._socket = public_socket if public_only else None
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._busy = 0
        self._lines: set[_Line] = set()
        self._idle: list[_Line] = []  # since when: the latest last
        self._sweeping: asyncio.TimerHandle | None = None
        self._resolved: dict[tuple[str, int], tuple[float, Any]] = {}
        self._is_closed = False
        #: Where all connections read into; what is there is parsed before the next one reads.
        self.buffer = memoryview(bytearray(READ_AHEAD))

    async def ask(self, place: Place, target: str) -> Answer:
        """The answer, once its head is there: a context, at whose end its connection is let go of.

        OSError, or TimeoutError while connecting, if there is none; otherwise the caller has the deadline.
        """
        request = place.request(target)
        await self._slots.acquire()
        self._busy += 1
        try:
            if line := self._kept(place):
                try:
                    return await line.ask(request)
                except _Unasked:
                    pass  # any server may close an idle connection, and it has answered nothing
            return await (await self._connected(place)).ask(request)
        except BaseException:
            self._release()
            raise

    async def close(self) -> None:
        """Close every connection, also those in use."""
        self._is_closed = True
        if self._sweeping:
            self._sweeping.cancel()
        self._idle.clear()
        ends = [line.end for line in self._lines]
        for line in self._lines:
            line.abort()
        if ends:
            await asyncio.wait(ends, timeout=self._connect_timeout)

    # What its connections tell

    def opened(self, line: _Line) -> None:
        """There is a connection more."""
        self._lines.add(line)
        if self._is_closed:
            line.abort()

    def settled(self, line: _Line, *, keep: bool) -> None:
        """Its answer is over, or was given up."""
        self._release()
        if keep and not self._is_closed:
            line.idle_since = asyncio.get_running_loop().time()
            self._idle.append(line)
            if self._sweeping is None:
                self._sweep()
        else:
            line.abort()

    def ended(self, line: _Line) -> None:
        """There is a connection less."""
        self._lines.discard(line)
        with suppress(ValueError):
            self._idle.remove(line)

    def _release(self) -> None:
        self._busy -= 1
        self._slots.release()

    def _kept(self, place: Place) -> _Line | None:
        """The connection to a place that was idle for the shortest time, and is silent."""
        for at in reversed(range(len(self._idle))):
            line = self._idle[at]
            if line.key == place.key:
                del self._idle[at]
                if line.is_silent():
                    return line
                line.abort()
        return None

    def _sweep(self) -> None:
        """Close what was idle for long, and look again while there are idle ones."""
        loop = asyncio.get_running_loop()
        while self._idle and self._idle[0].idle_since + _IDLE <= loop.time():
            self._idle.pop(0).close()
        self._sweeping = None
        if self._idle:
            self._sweeping = loop.call_at(self._idle[0].idle_since + _IDLE, self._sweep)

    async def _connected(self, place: Place) -> _Line:
        while self._idle and self._busy + len(self._idle) > CONNECTIONS:
            self._idle.pop(0).close()  # they lead elsewhere
        loop = asyncio.get_running_loop()
        addresses = await self._addresses(place)
        try:
            async with asyncio.timeout(self._connect_timeout):
                sock = await aiohappyeyeballs.start_connection(
                    addresses,
                    happy_eyeballs_delay=_NEXT_ADDRESS,
                    interleave=1,
                    loop=loop,
                    socket_factory=self._socket,
                )
                try:
                    _, line = await loop.create_connection(
                        lambda: _Line(self, place, sock),
                        sock=sock,
                        ssl=self._tls if place.is_tls else None,
                        server_hostname=place.host if place.is_tls else None,
                    )
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError as error:
            raise TimeoutError(f"no connection in {self._connect_timeout} s") from error
        return line

    async def _addresses(self, place: Place) -> Any:
        """What getaddrinfo says of a host, now or a moment ago."""
        loop = asyncio.get_running_loop()
        name = (place.host, place.port)
        until, known = self._resolved.get(name, (0.0, None))
        if loop.time() < until:
            return known
        flags = socket.AI_NUMERICHOST if _is_address(place.host) else socket.AI_ADDRCONFIG
        try:
            found = await loop.getaddrinfo(*name, type=socket.SOCK_STREAM, flags=flags)
        except UnicodeError as error:
            raise BrokenAnswer(f"{place.host[:80]!a} is no host's name") from error
        if len(self._resolved) >= CONNECTIONS:
            self._resolved.clear()
        self._resolved[name] = (loop.time() + _RESOLVED, found)
        return found


class Answer:
    """One answer, as it comes. httptools calls what begins with `on_`."""

    __slots__ = (
        "_body", "_count", "_error", "_fields", "_in_body", "_is_interim", "_line", "_parser",
        "_size", "_to_the_end", "_waiter", "_wire", "is_over", "keeps", "status",
    )  # fmt: skip

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._fields: dict[bytes, bytes] = {}
        self._count = 0  # of fields
        self._body = bytearray()  # that nobody read so far
        self._size = 0  # bytes of the body that came
        self._wire = 0  # bytes that came
        self._in_body = False
        self._is_interim = False
        self._to_the_end = False  # of the connection
        self._error: OSError | None = None
        self._waiter: asyncio.Future[None] | None = None
        #: 0 until the head is there.
        self.status = 0
        #: Whether all of it came.
        self.is_over = False
        #: Whether its connection may be asked again, when it is over.
        self.keeps = False

    def field(self, name: bytes, default: str = "") -> str:
        """A field of the head, by its name in small letters; of several, all of them."""
        value = self._fields.get(name)
        return default if value is None else value.decode("utf-8", "surrogateescape")

    async def head(self) -> None:
        """Wait for the head; OSError if it does not come."""
        while not self._in_body:
            if self._error:
                raise self._error
            await self._news()

    async def read(self) -> bytes:
        """What came of the body since; nothing at its end. OSError if it breaks off.

        There is more only when everybody else has had a turn.
        """
        while not self._body:
            if self.is_over:
                return b""
            if self._error:
                raise self._error
            await self._news()
        return self.taken()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body."""
        while data := await self.read():
            yield data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.keeps and not (self.is_over or self._error):
            self._line.let_end()
        else:
            self._line.settle()

    async def _news(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    # What its connection tells

    def came(self, data: memoryview) -> int:
        """The next bytes; how many of the body wait to be read. BrokenAnswer if they are none of an answer."""
        assert self._parser
        self._wire += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.keeps = False
            if not self.is_over:  # if it is, something else came behind it
                if isinstance(error.__context__, BrokenAnswer):
                    raise error.__context__ from None
                raise BrokenAnswer(f"this is no HTTP: {error}") from error
        if self._wire - self._size > _OVERHEAD + _OVERHEAD_EACH * self._size:
            raise BrokenAnswer("too much comes that is none of the body")
        self._wake()
        return len(self._body)

    def taken(self) -> bytes:
        """What waits to be read."""
        data = bytes(self._body)
        self._body.clear()
        self._line.read_on()
        return data

    def fail(self, error: OSError) -> None:
        """There will be no more of it."""
        if not (self.is_over or self._error):
            self._error = error
            self._wake()

    def cut(self, error: Exception | None, *, was_asked: bool) -> None:
        """Its connection ended; before it another answer came over that."""
        if self._to_the_end and error is None:
            self.is_over = True
            self._wake()
        elif was_asked and not self._wire:
            self.fail(_Unasked("the connection ended while it was idle"))
        else:
            self.fail(BrokenAnswer(f"the connection ended too early: {error or 'it was closed'}"))

    def let_go(self) -> None:
        """Nothing more is told."""
        self._parser = None  # which refers to this

    # What the parser tells

    def on_message_begin(self) -> None:
        """An interim answer begins, the answer, or what is behind it."""
        if self.is_over:
            raise BrokenAnswer("a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head, or behind the last chunk."""
        self._count += 1
        if self._count > _FIELDS:
            raise BrokenAnswer(f"it has more than {_FIELDS} fields")
        if not self._in_body:
            name = name.lower()
            before = self._fields.get(name)
            self._fields[name] = value if before is None else before + b", " + value

    def on_headers_complete(self) -> None:
        """The head is there."""
        assert self._parser
        status, version = self._parser.get_status_code(), self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise BrokenAnswer(f"it is HTTP/{version}")
        self._is_interim = 100 <= status < 200
        if self._is_interim:
            self._fields.clear()
            return
        if self._fields.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            raise BrokenAnswer("it has a Transfer-Encoding that it was not asked for")
        self.keeps = version == "1.1" and self._parser.should_keep_alive()
        self._to_the_end = status not in _BODILESS and self._fields.keys().isdisjoint(_FRAMING)
        self.status = status
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        """The next bytes of the body."""
        self._size += len(body)
        self._body += body

    def on_message_complete(self) -> None:
        """That was all, if it was no interim answer."""
        self.is_over = not self._is_interim


class _Line(asyncio.BufferedProtocol):
    """A connection, and the answer that comes over it at present."""

    def __init__(self, client: Client, place: Place, sock: socket.socket) -> None:
        self._client = client
        self._sock = sock
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._was_asked = False
        self._is_paused = False
        self._is_ending = False
        #: Of an answer that nobody reads any more.
        self._patience: asyncio.TimerHandle | None = None
        self._rest = 0
        self.key = place.key
        self.idle_since = 0.0
        #: Done when it is closed.
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def ask(self, request: bytes) -> Answer:
        """Send a request; its answer, once the head is there."""
        answer = self._answer = Answer(self)
        try:
            if self._transport is None or self._is_ending:
                raise BrokenAnswer("the connection ended before anything was asked")
            self._transport.write(request)
            await answer.head()
        except BaseException:
            self.abort()
            raise
        return answer

    def is_silent(self) -> bool:
        """Whether nothing waits on it: no bytes that nobody asked for, and not its end."""
        if self._is_ending:
            return False
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def settle(self) -> None:
        """Nobody waits for more of the answer."""
        answer, self._answer = self._answer, None
        if answer is None:
            return
        answer.let_go()
        if self._patience:
            self._patience.cancel()
            self._patience = None
        self._was_asked = True
        self._client.settled(self, keep=answer.is_over and answer.keeps and not self._is_ending)

    def let_end(self) -> None:
        """Nobody reads the rest: if it is short and comes soon, the connection is kept."""
        self._rest = _REST
        self._patience = asyncio.get_running_loop().call_later(_REST_SECONDS, self.settle)
        self._drop()

    def read_on(self) -> None:
        """There is room for more."""
        if self._is_paused and self._transport and not self._is_ending:
            self._is_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close it at once."""
        self._is_ending = True
        if self._transport:
            self._transport.abort()

    def close(self) -> None:
        """Close it in good order."""
        self._is_ending = True
        if self._transport:
            self._transport.close()

    def _drop(self) -> None:
        if self._answer:
            self._rest -= len(self._answer.taken())
            if self._answer.is_over or self._is_ending or self._rest < 0:
                self.settle()

    # What asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop has its own
        self._client.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._client.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came."""
        answer = self._answer
        if answer is None or answer.is_over or self._is_ending:
            self.abort()  # nobody asked for them
            return
        try:
            waiting = answer.came(self._client.buffer[:nbytes])
        except BrokenAnswer as error:
            answer.fail(error)
            self.abort()
            waiting = 0
        if self._patience:
            self._drop()
        elif waiting >= READ_AHEAD and self._transport and not answer.is_over:
            self._is_paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self._is_ending = True
        self._client.ended(self)
        if self._answer:
            self._answer.cut(exc, was_asked=self._was_asked)
        if self._patience:
            self.settle()
        self.end.set_result(None)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
