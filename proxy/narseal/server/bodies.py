"""Bodies of uploads: held to their bound on the wire and decoded, to a least rate, and decoded off the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext

from aiohttp import web

from narseal.errors import BadUpload, Refused, UploadTooLarge, UploadTooSlow
from narseal.nix.encoded import EncodedBody
from narseal.pipeline.nars.pace import Pace
from narseal.pipeline.services import Services
from narseal.pipeline.uploads.arriving import ArrivingFile
from narseal.runtime.budget import Budget, Claim, counted
from narseal.runtime.files import OpenFile
from narseal.runtime.portions import in_portions, in_turns
from narseal.server.bounded import connection_of
from narseal.telemetry import metrics

_LARGE = 1 << 20  # bytes; of more than so many, there is one body in memory at a time
#: Bytes of a body into a file that are under way in memory: what a thread works on, what gathers for it, and
#: what one read brings. And those of all, and of each address: who finds no room asks again.
_UNDER_WAY = 768 << 10
_ALL_UNDER_WAY = 64 << 20
_EACH_UNDER_WAY = 48 << 20
#: Of a small body, beside what is counted of it: what was read ahead, three times READ_AHEAD, or 4,096 chunks.
_AHEAD = 192 << 10


class Bodies:
    """Takes the bodies of one worker's uploads.

    BadUpload or UploadTooLarge if one is wrong, UploadTooSlow if it does not come.
    """

    def __init__(self, services: Services) -> None:
        self._folder = services.folder
        self._threads = services.threads
        self._upload = services.config.upload
        self._room = services.upload_room
        self._stall_timeout = self._upload.stall_timeout
        self._least_rate = services.config.limits.least_rate
        self._memory = services.memory_of_uploads
        self._under_way = Budget(_ALL_UNDER_WAY, each=_EACH_UNDER_WAY)
        self._large = asyncio.Semaphore(1)

    def under_way(self, request: web.Request) -> Claim:
        """Room for a body on its way into a file: a context. Unavailable if too many come at a time."""
        claim = self._under_way.claim(request.remote or "")
        claim.take(_at_most(request, _UNDER_WAY))
        return claim

    async def chunks(self, request: web.Request, *, is_small: bool = False) -> AsyncIterator[bytes]:
        """A body as it comes, so that who sends nothing holds no room for longer than he may.

        With the first step its connection is read on, in small pieces if it `is_small`: there is room by then.
        """
        window = self._stall_timeout
        pace = Pace(least=self._least_rate, window=window, error=UploadTooSlow)
        connection_of(request).want_body(request.content, is_small=is_small)
        try:
            while True:
                pace.wait()
                async with asyncio.timeout(window):
                    chunk = await request.content.readany()
                if not chunk:
                    return
                pace.took(len(chunk))
                yield chunk
        except UploadTooSlow:
            metrics.slow_uploads.inc()
            raise
        except web.RequestPayloadError as error:
            raise BadUpload(f"the body's chunks: {error}") from error
        except TimeoutError as error:
            metrics.slow_uploads.inc()
            raise UploadTooSlow(
                f"the body brought nothing in {window:.0f} s (upload.stall_timeout)"
            ) from error

    @asynccontextmanager
    async def small(self, request: web.Request, limit: int) -> AsyncIterator[bytes]:
        """A body of at most 1 MiB, decoded. It has room in memory within the context alone.

        Unavailable if all that come at the same time, or all of one address, are too large.
        """
        assert limit <= _LARGE
        body = bytearray()
        with self._memory.claim(request.remote or "") as room:
            room.take(_at_most(request, _AHEAD))
            try:
                await self._take(request, limit, room.counting(body.extend), room)
                data = bytes(body)
            finally:
                body.clear()  # what failed may be kept, with all that it knows, until it is collected
            yield data

    @asynccontextmanager
    async def in_memory(self, file: OpenFile) -> AsyncIterator[bytes]:
        """A body of any size that came into a file: in memory within the context alone.

        Of large ones there is one at a time, so nothing slow is waited for within.
        """
        async with self._large if file.size > _LARGE else nullcontext():
            yield await self._threads.run(file.read)

    async def file(self, request: web.Request, limit: int) -> OpenFile:
        """A body in a file on its way in, decoded; StorageFull if all uploads are too large."""
        with self.under_way(request):
            local, room = self._folder.local, self._room
            arriving = await self._threads.run(ArrivingFile, local, room, self._upload)
            try:
                await self._take(request, limit, arriving.write)
                return await self._threads.run(arriving.whole)
            except BaseException:
                await self._threads.run(arriving.discard)
                raise

    async def _take(
        self,
        request: web.Request,
        limit: int,
        write: Callable[[bytes], object],
        room: Claim | None = None,
    ) -> None:
        """Give the body to `write`: in a thread, unless it is plain and has `room` in memory."""
        if (request.content_length or 0) > limit:
            raise UploadTooLarge(f"{request.content_length} bytes; {limit} are taken")
        encoding = request.headers.get("Content-Encoding", "identity")
        try:
            body = EncodedBody(encoding, limit=limit, write=write)
            chunks = self.chunks(request, is_small=room is not None)
            if room and body.is_plain:
                async for chunk in in_turns(chunks):
                    body.feed(chunk)
                return
            if room:
                chunks = counted(chunks, room)
            await in_portions(chunks, body.feed, self._threads.run)
            await self._threads.run(body.finish)
        except Refused as error:
            kind = UploadTooLarge if error.reason == "too-large" else BadUpload
            raise kind(f"the body as {encoding[:40]!a}: {error}") from error


def _at_most(request: web.Request, size: int) -> int:
    """The length of a body, as far as it is known, but no more than `size`."""
    length = request.content_length
    return size if length is None else min(length, size)
