"""Answers that are longer than what belongs into memory: out of files, piece by piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aiohttp import web

from narseal.errors import NarsealError, StorageBroken
from narseal.pipeline.services import Services
from narseal.runtime.files import OpenFile
from narseal.server.conditional import caching, etag_matches, span_of
from narseal.server.file_sender import FileSender, Follow, read_piece, read_soon
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)
_PIECE = 64 << 10


class Broken(ConnectionError):
    """An answer that was begun and could not be ended."""

    def __init__(self, response: web.StreamResponse, cause: Exception) -> None:
        super().__init__(str(cause))
        self.response = response
        #: For the count: 499 (as nginx has it) when the client left, else what went wrong.
        self.status = cause.status if isinstance(cause, NarsealError) else 499


@dataclass(frozen=True, slots=True)
class Head:
    """What the answer says of the file, but for its size."""

    content_type: str
    control: str
    etag: str


async def send_file(
    request: web.Request,
    services: Services,
    head: Head,
    descriptor: int,
    size: int,
    follow: Follow | None = None,
) -> web.StreamResponse:
    """Answer with a file of `size` bytes, with conditions and ranges.

    With `follow`, it still grows. Broken if the answer was begun and cannot be ended; StorageBroken
    if nothing was sent yet.
    """
    headers = caching(head.control, head.etag) | {"Content-Type": head.content_type}
    if etag_matches(request.headers.get("If-None-Match"), head.etag):
        return web.Response(status=304, headers=headers)
    span = span_of(request, size, head.etag)
    if isinstance(span, web.Response):
        return span
    response = web.StreamResponse(status=200 if span is None else 206, headers=headers)
    if span is not None:
        response.headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
    start, stop = (span.start, span.stop) if span else (0, size)
    response.content_length = stop - start
    if request.method == "HEAD":
        return response
    if follow:
        await follow(start)
    await read_soon(services.threads, descriptor, 1, start)  # StorageBroken while it can be said
    await response.prepare(request)

    async def all_there(_: int) -> int:
        return stop

    timeout = services.config.limits.send_timeout
    sender = FileSender(request, response, timeout=timeout, threads=services.threads)
    try:
        await sender.send(descriptor, start, stop, follow or all_there)
    except (NarsealError, ConnectionError) as error:
        raise _broken(request, response, error) from error
    return response


async def send_lines(
    request: web.Request, services: Services, head: Head, files: AsyncIterator[OpenFile]
) -> web.StreamResponse:
    """Answer with one file after another, each of them a line. Broken as with `send_file`.

    However many they are, and however slow the client, there is one piece in memory.
    """
    headers = {"Cache-Control": head.control, "ETag": head.etag, "Content-Type": head.content_type}
    if etag_matches(request.headers.get("If-None-Match"), head.etag):
        return web.Response(status=304, headers=headers)
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    try:
        async for file in files:
            for at in range(0, file.size, _PIECE):
                piece = await services.threads.run(read_piece, file.descriptor, _PIECE, at)
                ended = at + len(piece) == file.size and not piece.endswith(b"\n")
                async with asyncio.timeout(services.config.limits.send_timeout):
                    await response.write(piece + b"\n" if ended else piece)
        await response.write_eof()
    except (NarsealError, ConnectionError, TimeoutError) as error:
        raise _broken(request, response, error) from error
    return response


@contextmanager
def noting_faults(thing: str) -> Iterator[None]:
    """Log and count a fault of storage in an answer that nobody can give again."""
    try:
        yield
    except (StorageBroken, Broken) as error:
        fault = error.__cause__ if isinstance(error, Broken) else error
        if isinstance(fault, StorageBroken):
            metrics.storage_errors.labels(fault.kind).inc()
            _log.error("%s cannot be sent: %s", thing, fault, extra={"object": thing})
        raise


def _broken(
    request: web.Request, response: web.StreamResponse, error: NarsealError | OSError
) -> Broken:
    """Never a clean end: the client must see that the line broke."""
    if request.transport:
        request.transport.abort()
    return Broken(response, error)
