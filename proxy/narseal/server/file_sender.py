"""Sending a file, or one that is still growing, to a client by sendfile."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable

from aiohttp import web

from narseal.errors import StorageBroken
from narseal.runtime.threads import ThreadPools
from narseal.storage import storage_errors

_OF_SOCKETS = frozenset((errno.ENOTCONN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN))
_PORTION = 1 << 22
_CHUNK = 1 << 18

#: Waits until more than so many bytes of the file may be sent; returns how many may be.
Follow = Callable[[int], Awaitable[int]]


class FileSender:
    """One answer's body on its way out of a file.

    `timeout` bounds, in seconds, how long the client may take nothing.
    """

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        *,
        timeout: float,
        threads: ThreadPools,
    ) -> None:
        self._request = request
        self._response = response
        self._timeout = timeout
        self._threads = threads

    async def send(self, descriptor: int, start: int, stop: int, follow: Follow) -> None:
        """Send the bytes from `start` to `stop` as far as `follow` lets.

        Raises ConnectionError when the client is gone or takes nothing, StorageBroken when the
        file cannot be read, and what `follow` raises.
        """
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        if transport.get_extra_info("sslcontext") is not None:
            await self._copy(descriptor, start, stop, follow)
            return
        await self._drain(transport)
        # uvloop watches no descriptor that a transport of its own has, but a copy of it
        socket = os.dup(transport.get_extra_info("socket").fileno())
        try:
            while start < stop:
                limit = min(stop, await follow(start))
                start = await self._send_portion(socket, descriptor, start, limit)
        finally:
            os.close(socket)

    async def _send_portion(self, socket: int, descriptor: int, start: int, limit: int) -> int:
        """Send up to `limit`, from the loop's own call whenever the socket takes more."""
        loop = asyncio.get_running_loop()
        portion = _Portion(socket, descriptor, start, limit, loop.create_future())
        portion.push()
        if not portion.done.done():
            loop.add_writer(socket, portion.push)
            try:
                await self._watch(portion)
            finally:
                loop.remove_writer(socket)
        portion.done.result()
        return limit

    async def _watch(self, portion: _Portion) -> None:
        """Wait for the end, as long as the client takes something in every `timeout` seconds."""
        while True:
            before = portion.at
            await asyncio.wait([portion.done], timeout=self._timeout)
            if portion.done.done():
                return
            if portion.at == before:
                raise ConnectionResetError("the client takes nothing")

    async def _drain(self, transport: asyncio.Transport) -> None:
        """Get the head of the answer out of the transport's buffer.

        aiohttp has no public way to send a head alone and to wait until it is out.
        """
        low, high = transport.get_write_buffer_limits()
        transport.set_write_buffer_limits(high=0)
        try:
            self._response._payload_writer.send_headers()  # type: ignore[union-attr] # noqa: SLF001
            while transport.get_write_buffer_size():
                await self._request.protocol._drain_helper()  # noqa: SLF001
                await asyncio.sleep(0)
        finally:
            transport.set_write_buffer_limits(high=high, low=low)

    async def _copy(self, descriptor: int, start: int, stop: int, follow: Follow) -> None:
        """Through TLS there is no sendfile."""
        while start < stop:
            limit = min(stop, await follow(start))
            size = min(limit - start, _CHUNK)
            data = await self._threads.run(read_piece, descriptor, size, start)
            async with asyncio.timeout(self._timeout):
                await self._response.write(data)
            start += len(data)


def read_piece(descriptor: int, size: int, start: int) -> bytes:
    """Some bytes from `start` on, at least one; StorageBroken if there are none. Blocks."""
    with storage_errors():
        data = os.pread(descriptor, size, start)
    if not data:
        raise _shorter()
    return data


async def read_soon(threads: ThreadPools, descriptor: int, size: int, start: int) -> bytes:
    """As `read_piece`, without a thread if all of it is in memory, as it mostly is."""
    data = bytearray(size)
    try:
        if os.preadv(descriptor, [data], start, os.RWF_NOWAIT) == size:
            return bytes(data)
    except OSError:
        pass  # it would wait for the disk, or the file system knows no such reading
    return await threads.run(read_piece, descriptor, size, start)


def _shorter() -> StorageBroken:
    return StorageBroken("wrong-content", "a stored file is shorter than it was")


def _meaning(error: OSError) -> Exception:
    """Of what sendfile says: the socket's faults are the client's, the others the disk's."""
    if isinstance(error, ConnectionError | TimeoutError) or error.errno in _OF_SOCKETS:
        return ConnectionResetError(f"the client is gone: {error.strerror}")
    return StorageBroken("unreadable", f"a stored file cannot be read: {error.strerror}")


class _Portion:
    """Bytes of a file that go out piece by piece, each time that the socket is writable."""

    __slots__ = ("_descriptor", "_limit", "_socket", "at", "done")

    def __init__(
        self, socket: int, descriptor: int, start: int, limit: int, done: asyncio.Future[None]
    ) -> None:
        self._socket = socket
        self._descriptor = descriptor
        self._limit = limit
        self.at = start
        self.done = done

    def push(self) -> None:
        """Send one piece; `done` has the end or the error."""
        if self.done.done():
            return
        try:
            size = min(self._limit - self.at, _PORTION)
            sent = os.sendfile(self._socket, self._descriptor, self.at, size)
        except BlockingIOError:
            return
        except OSError as error:
            self.done.set_exception(_meaning(error))
            return
        if sent == 0:
            self.done.set_exception(_shorter())
            return
        self.at += sent
        if self.at >= self._limit:
            self.done.set_result(None)
