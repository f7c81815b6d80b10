"""Sending a file, or one that is still growing, to a client by sendfile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from aiohttp import web

from narseal.pipeline.blocking import Blocking

_PORTION = 1 << 20
_CHUNK = 1 << 18

#: Waits until more than so many bytes of the file may be sent; returns how many may be.
Follow = Callable[[int], Awaitable[int]]


class Sending:
    """One answer's body on its way out of a file.

    `timeout` bounds, in seconds, how long the client may take nothing.
    """

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        *,
        timeout: float,
        blocking: Blocking,
    ) -> None:
        self._request = request
        self._response = response
        self._timeout = timeout
        self._blocking = blocking

    async def send(self, descriptor: int, start: int, stop: int, follow: Follow) -> None:
        """Send the bytes from `start` to `stop` as far as `follow` lets.

        Raises ConnectionError when the client is gone or takes nothing, and what `follow` raises.
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
        while start < limit:
            try:
                sent = os.sendfile(socket, descriptor, start, min(limit - start, _PORTION))
            except BlockingIOError:
                await self._writable(socket)
                continue
            if sent == 0:
                raise ConnectionResetError("the file is shorter than it was")
            start += sent
            if sent == _PORTION:
                await asyncio.sleep(0)
        return start

    async def _writable(self, socket: int) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(socket, _resolve, ready)
        try:
            async with asyncio.timeout(self._timeout):
                await ready
        except TimeoutError as error:
            raise ConnectionResetError("the client takes nothing") from error
        finally:
            loop.remove_writer(socket)

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
            data = await self._blocking.run(os.pread, descriptor, size, start)
            if not data:
                raise ConnectionResetError("the file is shorter than it was")
            async with asyncio.timeout(self._timeout):
                await self._response.write(data)
            start += len(data)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
