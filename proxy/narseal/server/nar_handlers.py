"""What is answered to a GET of a NAR: from memory, from storage, or while it comes in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from narseal.errors import StorageBroken, UpstreamTimeout
from narseal.pipeline.nars.stored import StoredNar
from narseal.pipeline.nars.transfer import Reader
from narseal.pipeline.substituter import Substituter, View
from narseal.server.conditional import file_etag, whole
from narseal.server.file_answers import Broken, Head, send_file
from narseal.server.file_sender import read_soon
from narseal.server.hot_answers import FIRST_BYTE, IMMUTABLE, NAR, SMALL, HotAnswers
from narseal.server.hotpath import HotProtocol
from narseal.telemetry import metrics

#: What the names of routes below `/upload/` begin with.
UPLOAD = "upload-"


class NarHandlers:
    """The handlers of NAR files."""

    def __init__(self, substituter: Substituter, answers: HotAnswers) -> None:
        self._substituter = substituter
        self._services = substituter.services
        self._answers = answers

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
        if not is_upload(request) and not _was_missed(request):
            only_looks = request.method == "HEAD"
            if (small := await self._answers.small_nar(file, only_looks=only_looks)) is not None:
                return whole(request, small.body, NAR, IMMUTABLE, file_etag(file))
        mark = self._services.hot.mark()
        deadline = asyncio.get_running_loop().time() + FIRST_BYTE
        async with _in_time(file, deadline):
            found = await view_of(self._substituter, request).nars.get(file)
        try:
            if isinstance(found, Reader):
                return await self._relay(request, file, found, mark, deadline)
            if found.size <= SMALL and request.method == "GET":
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
        self._answers.nar(file, body, source, mark)
        return whole(request, body, NAR, IMMUTABLE, file_etag(file))

    async def _relay(
        self, request: web.Request, file: str, reader: Reader, mark: int, deadline: float
    ) -> web.StreamResponse:
        """Follow a transfer. Errors before the first byte are answers, later ones a broken line."""
        async with _in_time(file, deadline):
            if request.method == "HEAD":
                await reader.whole()
            await reader.follow(0)
        assert reader.size is not None  # nothing is released before it is known
        if reader.size <= SMALL and request.method == "GET":
            await reader.whole()
            return await self._small(request, file, reader, "upstream", mark)
        return await self._send(request, file, reader.descriptor, reader.size, reader)

    async def _send(
        self, request: web.Request, file: str, descriptor: int, size: int, reader: Reader | None
    ) -> web.StreamResponse:
        head = Head(NAR, IMMUTABLE, file_etag(file))
        follow = reader.follow if reader else None
        response = await send_file(request, self._services, head, descriptor, size, follow)
        if response.prepared:
            source = "upstream" if reader else "storage"
            metrics.nar_bytes.labels(source).inc(response.content_length or 0)
        return response


@asynccontextmanager
async def _in_time(file: str, deadline: float) -> AsyncIterator[None]:
    """UpstreamTimeout if what is waited for within has not come by then."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise UpstreamTimeout(f"nar/{file}: nothing came in {FIRST_BYTE} s") from error


def is_upload(request: web.Request) -> bool:
    """Whether a pusher asks, below `/upload/`."""
    return (request.match_info.route.name or "").startswith(UPLOAD)


def _was_missed(request: web.Request) -> bool:
    """Whether `Misses` looked for it, and gave it to aiohttp; said once."""
    protocol = request.protocol
    if not isinstance(protocol, HotProtocol):
        return False
    missed, protocol.missed = protocol.missed, False
    return missed


def view_of(substituter: Substituter, request: web.Request) -> View:
    """Below `/upload/` no upstream is asked: a pusher wants to know what is here."""
    return substituter.stored if is_upload(request) else substituter.everything
