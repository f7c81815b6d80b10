"""What a connection's socket is read into: no more than it may have at a time."""

from __future__ import annotations

import asyncio
from typing import Protocol

#: Bytes that a read brings of heads, and of a body that nobody wants yet. Thousands of connections are read
#: before the first handler has its turn.
_FEW = 8 << 10
#: Of a body that a handler reads.
_MANY = 256 << 10


class Buffers:
    """A worker's, for all of its connections: what a read brings is copied out before the next."""

    def __init__(self) -> None:
        self.few = memoryview(bytearray(_FEW))
        self.many = memoryview(bytearray(_MANY))


class Connection(Protocol):
    """One that is read, as the transport knows protocols."""

    #: What the next read goes into.
    buffer: memoryview

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""

    def eof_received(self) -> bool | None:
        """See asyncio.Protocol."""

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""


class Reading(asyncio.BufferedProtocol):
    """Stands between a transport and a connection, which says how much a read may bring."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._buffer = connection.buffer

    def get_buffer(self, sizehint: int) -> memoryview:
        """See BufferedProtocol."""
        self._buffer = self._connection.buffer
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """See BufferedProtocol."""
        self._connection.data_received(bytes(self._buffer[:nbytes]))

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

    def eof_received(self) -> bool | None:
        """See BufferedProtocol."""
        return self._connection.eof_received()
