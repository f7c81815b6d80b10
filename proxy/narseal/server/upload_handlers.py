"""What is answered to PUT: the routes of `nix copy --to`, and attestations."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from narseal.errors import BadUpload, NarsealError
from narseal.nix import cache_info, narinfo, realisation
from narseal.nix.hashes import Hash
from narseal.nix.store_path import StorePath
from narseal.pipeline.substituter import Substituter
from narseal.pipeline.uploads.attestations import Content
from narseal.server.auth import Bearer, Gate
from narseal.server.bodies import Bodies
from narseal.server.failure import failure


class UploadHandlers:
    """The handlers of uploads."""

    def __init__(self, substituter: Substituter, gate: Gate) -> None:
        self._substituter = substituter
        self._services = substituter.services
        self._gate = gate
        self._bodies = Bodies(substituter.services)

    def handlers(self) -> dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]:
        """What the configuration lets in, by the name of the route that gives it out."""
        found: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {}
        if self._substituter.provenance.takes_any:
            found |= {"attestations": self.attestation, "attestations-of": self.attestation}
        if self._services.config.upload.enabled:
            found |= {
                "nix-cache-info": self.cache_info,
                "narinfo": self.narinfo,
                "nar": self.nar,
                "ls": self.side_file,
                "log": self.side_file,
                "debuginfo": self.side_file,
                "realisations": self.realisation,
                "build-trace-v2": self.realisation,
            }
        return found

    async def expect(self, request: web.Request) -> web.StreamResponse | None:
        """`Expect: 100-continue`: who may not, or brings too much, is told before the body."""
        try:
            await self._gate.identify(request)
            if "file" in request.match_info:
                self._substituter.uploads.check_size(request.content_length)
        except NarsealError as error:  # no middleware has been asked yet
            return failure(error)
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return None

    async def cache_info(self, request: web.Request) -> web.Response:
        """Nix may bring one; ours stays. It is read, so that its connection goes on."""
        await self._gate.identify(request)
        async with self._bodies.small(request, cache_info.MAX_BYTES):
            return web.Response(status=200)

    async def nar(self, request: web.Request) -> web.Response:
        """A NAR, to wait for its narinfo, which is held to the token once more."""
        await self._gate.identify(request)
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise BadUpload("a NAR has no Content-Encoding: its compression is in its narinfo")
        chunks = self._bodies.chunks(request)
        uploads = self._substituter.uploads
        with self._bodies.under_way(request):
            await uploads.put_nar(request.match_info["file"], request.content_length, chunks)
        return web.Response(status=201)

    async def narinfo(self, request: web.Request) -> web.Response:
        """A narinfo, which makes its NAR visible."""
        token = await self._gate.identify(request)
        uploads = self._substituter.uploads
        bearer = Bearer(self._gate, request)
        async with self._bodies.small(request, narinfo.MAX_BYTES) as data:
            new = await uploads.put_narinfo(request.match_info["hash"], data, token, bearer)
        return web.Response(status=201 if new else 200)

    async def realisation(self, request: web.Request) -> web.Response:
        """A realisation of either spelling."""
        await self._gate.identify(request)
        realisations = self._substituter.everything.realisations
        async with self._bodies.small(request, realisation.MAX_BYTES) as data:
            token = await self._gate.identify(request, anew=True)
            await realisations.put(request.match_info["name"], data, token)
        return web.Response(status=201)

    async def side_file(self, request: web.Request) -> web.Response:
        """A listing, a log or a debug-info pointer."""
        await self._gate.identify(request)
        name = request.match_info["name"]
        limit = self._substituter.everything.side_files.limit(name)
        file = await self._bodies.file(request, limit)
        token = await self._gate.identify(request, anew=True)
        await self._substituter.side_file_uploads.put(name, file, token)
        return web.Response(status=201)

    async def attestation(self, request: web.Request) -> web.Response:
        """An attestation of a digest or a store path. Who brings it matters less than who signed."""
        await self._gate.identify(request)
        provenance = self._substituter.provenance
        file = await self._bodies.file(request, provenance.max_bytes)
        await self._gate.identify(request, anew=True)
        if "path" in request.match_info:
            content = await provenance.of_path(StorePath.parse(request.match_info["path"]))
        else:
            content = Content.of(Hash.parse(request.match_info["digest"]).digest)
        async with self._bodies.in_memory(file) as data:
            new = await provenance.put(content, data)
        return web.Response(status=201 if new else 200)
