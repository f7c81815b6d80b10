"""What is answered to a GET of a NAR: from memory, from storage, or while it comes in."""

from __future__ import annotations

import asyncio

from aiohttp import web

from narseal.errors import StorageBroken, UpstreamTimeout
from narseal.pipeline.caches import Hot
from narseal.pipeline.nars.stored import StoredNar
from narseal.pipeline.nars.transfer import Reader
from narseal.pipeline.substituter import Substituter, View
from narseal.server.conditional import file_etag, whole
from narseal.server.file_answers import Broken, Head, send_file
from narseal.server.file_sender import read_soon
from narseal.telemetry import metrics

#: What the names of routes below `/upload/` begin with.
UPLOAD = "upload-"
_IMMUTABLE = "public, max-age=31536000, immutable"
_SMALL = 64 << 10
_NAR = "application/x-nix-nar"
# a client gives up after 300 s without a byte (Nix's stalled-download-timeout)
_FIRST_BYTE = 280.0


class NarHandlers:
    """The handlers of NAR files."""

    def __init__(self, substituter: Substituter) -> None:
        self._substituter = substituter
        self._services = substituter.services

    async def nar(self, request: web.Request) -> web.StreamResponse:
        """A NAR: from memory, from storage, or while it comes in.

        One that storage cannot give is struck off, and fetched in this answer if it is not begun.
        """
        file = request.match_info["file"]
        nars = view_of(self._substituter, request).nars
        try:
            return await self._answer(request, file)
        except StorageBroken as error:
            await nars.distrust(file, error)
        except Broken as broken:
            if isinstance(broken.__cause__, StorageBroken):
                await nars.distrust(file, broken.__cause__)
            raise
        return await self._answer(request, file)

    async def _answer(self, request: web.Request, file: str) -> web.StreamResponse:
        mark = self._services.hot.mark()
        found = await view_of(self._substituter, request).nars.get(file)
        try:
            if isinstance(found, Reader):
                return await self._relay(request, file, found, mark)
            if found.size <= _SMALL and request.method == "GET":
                return await self._small(request, file, found, "storage", mark)
            return await self._send(request, file, found.descriptor, found.size, None)
        finally:
            found.close()

    async def _small(
        self, request: web.Request, file: str, found: StoredNar | Reader, source: str, mark: int
    ) -> web.StreamResponse:
        """A complete, verified file that is worth a place in memory."""
        assert found.size is not None
        body = await read_soon(self._services.threads, found.descriptor, found.size, 0)
        if len(body) != found.size:
            raise StorageBroken("wrong-content", f"nar/{file} is shorter than it was")
        answer = hot_answer("nar", _NAR, _IMMUTABLE, body, file_etag(file))
        self._services.hot.put(f"/nar/{file}".encode(), answer, mark)
        metrics.nar_bytes.labels(source).inc(len(body))
        return whole(request, body, _NAR, _IMMUTABLE, file_etag(file))

    async def _relay(
        self, request: web.Request, file: str, reader: Reader, mark: int
    ) -> web.StreamResponse:
        """Follow a transfer. Errors before the first byte are answers, later ones a broken line."""
        try:
            async with asyncio.timeout(_FIRST_BYTE):
                if request.method == "HEAD":
                    await reader.whole()
                await reader.follow(0)
        except TimeoutError as error:
            raise UpstreamTimeout(f"nar/{file}: nothing came in {_FIRST_BYTE} s") from error
        assert reader.size is not None  # nothing is released before it is known
        if reader.size <= _SMALL and request.method == "GET":
            await reader.whole()
            return await self._small(request, file, reader, "upstream", mark)
        return await self._send(request, file, reader.descriptor, reader.size, reader)

    async def _send(
        self, request: web.Request, file: str, descriptor: int, size: int, reader: Reader | None
    ) -> web.StreamResponse:
        head = Head(_NAR, _IMMUTABLE, file_etag(file))
        follow = reader.follow if reader else None
        response = await send_file(request, self._services, head, descriptor, size, follow)
        if response.prepared:
            source = "upstream" if reader else "storage"
            metrics.nar_bytes.labels(source).inc(response.content_length or 0)
        return response


def is_upload(request: web.Request) -> bool:
    """Whether a pusher asks, below `/upload/`."""
    return (request.match_info.route.name or "").startswith(UPLOAD)


def view_of(substituter: Substituter, request: web.Request) -> View:
    """Below `/upload/` no upstream is asked: a pusher wants to know what is here."""
    return substituter.stored if is_upload(request) else substituter.everything


def hot_answer(route: str, content_type: str, control: str, body: bytes, etag: str) -> Hot:
    """A finished answer, as the hot path sends it."""
    head = (
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: {control}\r\nETag: {etag}\r\nAccept-Ranges: bytes\r\n"
        "Server: narseal\r\n\r\n"
    )
    return Hot(route, head.encode() + body, len(body))
