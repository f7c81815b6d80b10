"""A connection of aiohttp's that brings no more than it may.

aiohttp reads whatever comes before a handler has its turn, and thousands of connections may be read by
then. Here a head has a bound, and a body is read once its handler wants it: until then one small read
of it is held as it came. What nobody wants is dropped until the client has its answer.

Behind a body in chunks, whose end only the parser knows, up to 16 KiB of the next request are the
parser's already. Over TLS the loop has buffers of its own, of some 0.2 MiB a connection.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from contextlib import suppress
from typing import Any

from aiohttp import EMPTY_PAYLOAD, StreamReader, web
from aiohttp.http import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from narseal.runtime.portions import READ_AHEAD

#: Bytes that a read brings of heads, and of a body that nobody wants yet.
_FEW = 8 << 10
#: Of a large body that a handler reads, at most, and of one that is dropped.
_MANY = 256 << 10
#: Bytes of a request's head, and of all heads of a connection that wait behind one being answered.
MAX_HEAD = 16 << 10
_TLS_RECORD = 16 << 10
_SO_BUF_LOCK = 72  # of Linux's sys/socket.h, not of Python's socket
_NARROW, _WIDE = 32 << 10, 4 << 20
END_OF_HEAD = b"\r\n\r\n"
_END_OF_CHUNKS = b"0\r\n\r\n"
_TOO_LARGE_TEXT = "the head of a request has at most 16 KiB\n"
_TOO_LARGE = (
    "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain; charset=utf-8\r\n"
    f"Content-Length: {len(_TOO_LARGE_TEXT)}\r\nCache-Control: no-store\r\n"
    "X-Narseal-Reason: head-too-large\r\nConnection: close\r\n"
    f"Server: narseal\r\n\r\n{_TOO_LARGE_TEXT}"
).encode()


class Buffers:
    """A worker's, for all of its connections: what a read brings is copied out before the next."""

    def __init__(self) -> None:
        self.few = memoryview(bytearray(_FEW))
        self.many = memoryview(bytearray(_MANY))


class BoundedProtocol(RequestHandler):
    """One connection, read through `Reading`."""

    __slots__ = (
        "_body",
        "_body_left",
        "_buffers",
        "_deaf",
        "_drops",
        "_end",
        "_head",
        "_held",
        "_is_small",
        "_narrow",
        "_unanswered",
        "_wanted",
        "buffer",
    )

    def __init__(self, server: web.Server, buffers: Buffers, **options: Any) -> None:
        super().__init__(server, **options)
        self._buffers = buffers
        #: What the next read goes into.
        self.buffer = buffers.few
        #: Bytes of the head that is not whole yet; of those that are, and wait for their turn.
        self._head = 0
        self._unanswered: deque[int] = deque()
        #: The last bytes of a head that is not whole, in which its end may have begun.
        self._end = b""
        #: The last request's body, and how much of it is to come, if it says so.
        self._body: StreamReader | None = None
        self._body_left = 0
        #: Whether a handler reads it, and in small pieces.
        self._wanted = False
        self._is_small = False
        #: What came and is not looked at yet: of a body that nobody wants yet, or of what waits for its turn.
        self._held = b""
        #: It was answered without, so that what comes of it is dropped.
        self._drops = False
        #: A head was too large: nothing more is read, and the deadline for heads ends it.
        self._deaf = False
        #: Over TLS, the socket while the kernel takes little for it: what it takes is decrypted, whoever it is from.
        self._narrow: socket.socket | None = None

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol."""
        return self.buffer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TLS, too, reads no more ahead than it has to."""
        super().connection_made(transport)
        if transport.get_extra_info("sslcontext"):
            transport.set_read_buffer_limits(high=_TLS_RECORD)  # type: ignore[attr-defined]
            self._narrow = transport.get_extra_info("socket")
            self._narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NARROW)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Let go of what came, which nobody can have any more: who waits for it may stay for a while."""
        super().connection_lost(exc)
        self._held = b""
        if self._body is not None and self._body is not EMPTY_PAYLOAD:
            self._body._buffer.clear()  # noqa: SLF001
            self._body._size = 0  # noqa: SLF001

    def want_body(self, body: StreamReader, *, is_small: bool) -> None:
        """A handler reads a request's body from now on, in small pieces if it is small."""
        if self._wanted or body is not self._body:
            return
        self._wanted = True
        self._is_small = is_small
        if self._narrow and not is_small:
            _widen(self._narrow)
            self._narrow = None
        self.go_on()

    def drop_body(self, body: StreamReader) -> None:
        """A request is answered without its body: what still comes is dropped.

        aiohttp waits for a while for its end, so that the answer arrives, and closes the connection. (A
        body of which some was read, it reads on.)
        """
        if not self._wanted and body is self._body:
            self._drops = True
            self.go_on()

    def go_on(self) -> None:
        """Read on, with what was held first."""
        held, self._held = self._held, b""
        self._choose_buffer()
        if held:
            self.data_received(held)
        if not (self._reading_paused or self._buffer_paused):
            self._resume_transport_reading()

    def _resume_transport_reading(self) -> None:
        """As aiohttp's, which does not know that something is held."""
        if not self._held:
            super()._resume_transport_reading()

    @property
    def holds(self) -> bool:
        """Something came that is not looked at yet."""
        return bool(self._held)

    def hold(self, data: bytes) -> None:
        """Keep what came, and read no more, until `go_on`: of a body until somebody wants it."""
        self._held += data
        self._pause_transport_reading()

    def _drop(self, data: bytes) -> None:
        """Pass over what came of a body that nobody wants."""
        assert self._body is not None
        if self._body_left:
            self._body_left = max(0, self._body_left - len(data))
            is_end = not self._body_left
        else:
            is_end = data.endswith(_END_OF_CHUNKS)  # as far as one can see
        if is_end and not self._body.is_eof():
            self._body.feed_eof()

    def _choose_buffer(self) -> None:
        """How much the next read brings: of a body that is wanted much, but nothing of what is behind it."""
        if not (self._drops or (self.is_body() and self._wanted)):
            self.buffer = self._buffers.few
        elif self._is_small or not self._body_left:
            self.buffer = self._buffers.many[:READ_AHEAD]
        else:
            self.buffer = self._buffers.many[: max(self._body_left, _FEW)]

    def give(self, data: bytes) -> None:
        """Hand to aiohttp what it may have of what came."""
        if not data:  # aiohttp's own: it goes on with what it has
            self._feed(data)
        rest = data
        while rest and not self._deaf:
            if self.is_body() and not self._wanted:
                self.hold(rest)
                break
            size = self._room(rest)
            self._feed(rest[:size])
            rest = rest[size:]
        self._choose_buffer()

    def is_body(self) -> bool:
        """What comes next is of a body."""
        return bool(self._body_left) or (self._body is not None and not self._body.is_eof())

    def _room(self, data: bytes) -> int:
        """How many bytes aiohttp may have now: so many that no head in them grows too large, and no body begins."""
        while len(self._unanswered) > len(self._messages):
            self._unanswered.popleft()
        if self._body_left:
            return self._body_left
        if self.is_body():
            return MAX_HEAD  # of chunks, whose end may be anywhere
        size = max(1, MAX_HEAD - self._head - sum(self._unanswered))
        begun = len(self._end)
        at = (self._end + data[:size]).find(END_OF_HEAD)
        return size if at < 0 else at + len(END_OF_HEAD) - begun

    def _feed(self, data: bytes) -> None:
        """Give aiohttp some bytes, and take account of what is a head in them."""
        is_head = not self.is_body()
        self._body_left = max(0, self._body_left - len(data))
        before = self._request_count
        RequestHandler.data_received(self, data)
        if self._request_count > before:
            message, body = self._messages[-1]
            if isinstance(message, RawRequestMessage):
                self._begin(message, body, self._head + len(data) if is_head else body.total_bytes)
            elif self._body is not None and not self._body.is_eof():
                # its chunks are none; aiohttp answers that behind whoever waits for them
                self._body.set_exception(web.RequestPayloadError("they are not as HTTP has them"))
        elif is_head:
            self._head += len(data)
            self._end = (self._end + data)[-len(END_OF_HEAD) + 1 :]
            if self._head + sum(self._unanswered) >= MAX_HEAD:
                self._refuse_head()

    def _begin(self, message: RawRequestMessage, body: StreamReader, size: int) -> None:
        """The head of a request is whole; so many bytes came of it and of its body, as far as that is known."""
        self._body = body
        self._wanted = False
        if not message.chunked:
            length = int(message.headers.get("Content-Length", 0))
            self._body_left = max(0, length - body.total_bytes)
        self._unanswered.append(size - body.total_bytes)
        self._head = 0
        self._end = b""

    def _refuse_head(self) -> None:
        """Say that it is too large. What still comes is dropped, so that the answer arrives."""
        self._deaf = True
        if not self.is_parked() or self.transport is None:  # another answer is on its way
            self.force_close()
            return
        self.transport.write(_TOO_LARGE)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def is_parked(self) -> bool:
        """Aiohttp waits for a request, or has had none yet: none is being answered and none is queued."""
        # before the first, its task need not have begun to wait
        waits = self._waiter is not None and not self._waiter.done()
        return (
            (waits or not self._request_count)
            and not self._messages
            and not self._force_close
            and not self._close
            and not self._upgraded
        )


def _widen(sock: socket.socket) -> None:
    """Let the kernel find again how much it takes for a socket, or take as much as may be said."""
    with suppress(ValueError):  # its client is gone, and uvloop has no descriptor for it
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, 0)
        except OSError:  # before Linux 5.15
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WIDE)


def connection_of(request: web.Request) -> BoundedProtocol:
    """That over which a request came."""
    protocol = request.protocol
    assert isinstance(protocol, BoundedProtocol)  # the worker makes no others
    return protocol


class Reading(asyncio.BufferedProtocol):
    """Stands between a transport and a connection, which says how much a read may bring.

    Its `data_received` is given a number, too: so many bytes are in its buffer.

    What happens at each read is the connection's own, so that an answer from memory pays for no more calls than it must.
    """

    def __init__(self, connection: BoundedProtocol) -> None:
        self._connection = connection
        self.get_buffer = connection.get_buffer  # type: ignore[method-assign]
        self.buffer_updated = connection.data_received  # type: ignore[assignment,method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See BaseProtocol."""
        self._connection.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See BaseProtocol."""
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """See BaseProtocol."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """See BaseProtocol."""
        self._connection.resume_writing()

    def eof_received(self) -> None:
        """See BufferedProtocol. The connection ends with what the client says."""
        self._connection.eof_received()
