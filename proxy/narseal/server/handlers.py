"""What is answered on each route."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import os

import jinja2
from aiohttp import web

from narseal import __version__
from narseal.errors import NarsealError, UpstreamTimeout
from narseal.nix.hashes import Hash
from narseal.pipeline.caches import Hot
from narseal.pipeline.nars.transfer import Reader
from narseal.pipeline.substituter import Substituter
from narseal.server.conditional import Span, Unsatisfiable, etag_matches, parse_range
from narseal.server.file_sender import FileSender
from narseal.server.tally import Tally
from narseal.telemetry import metrics

#: What the names of routes below `/upload/` begin with.
UPLOAD = "upload-"
_IMMUTABLE = "public, max-age=31536000, immutable"
_SHORT = "public, max-age=300"
_SMALL = 64 << 10
_NARINFO = "text/x-nix-narinfo"
_NAR = "application/x-nix-nar"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_LISTED = 1000
# a client gives up after 300 s without a byte (Nix's stalled-download-timeout)
_FIRST_BYTE = 280.0


class Broken(ConnectionError):
    """An answer that was begun and could not be ended."""

    def __init__(self, response: web.StreamResponse, cause: Exception) -> None:
        super().__init__(str(cause))
        self.response = response
        #: For the count: 499 (as nginx has it) when the client left, else what went wrong.
        self.status = cause.status if isinstance(cause, NarsealError) else 499


class ReadHandlers:
    """The handlers of one worker."""

    def __init__(self, substituter: Substituter, tally: Tally) -> None:
        self._substituter = substituter
        self._tally = tally
        self._page = jinja2.Environment(
            loader=jinja2.PackageLoader("narseal.server"), autoescape=True
        ).get_template("status.html")
        self.draining = False

    async def cache_info(self, _: web.Request) -> web.Response:
        """Our own nix-cache-info, never an upstream's."""
        text = self._substituter.cache_info.render()
        return web.Response(text=text, content_type="text/x-nix-cache-info", headers=_cache(_SHORT))

    async def narinfo(self, request: web.Request) -> web.StreamResponse:
        """A countersigned narinfo."""
        if _stored_only(request):
            hash_part = request.match_info["hash"]
            body = await self._substituter.narinfo(hash_part, stored_only=True)
            return _whole(request, body, _NARINFO, "no-store", _etag(body))
        hot = self._substituter.hot
        target = f"/{request.match_info['hash']}.narinfo".encode()
        mark = hot.mark()
        if (answer := hot.get(target)) is not None:
            metrics.hot_hits.inc()
            body = answer.rest[-answer.body_size :]
        else:
            body = await self._substituter.narinfo(request.match_info["hash"])
            hot.put(target, _hot("narinfo", _NARINFO, _SHORT, body, _etag(body)), mark)
        return _whole(request, body, _NARINFO, _SHORT, _etag(body))

    async def nar(self, request: web.Request) -> web.StreamResponse:
        """A NAR: from memory, from storage, or while it comes in."""
        file = request.match_info["file"]
        mark = self._substituter.hot.mark()
        found = await self._substituter.nar(file, stored_only=_stored_only(request))
        try:
            if isinstance(found, Reader):
                return await self._relay(request, file, found, mark)
            if found.size <= _SMALL and request.method == "GET":
                return await self._small(request, file, found.descriptor, "storage", mark)
            return await self._send(request, file, found.descriptor, found.size, None)
        finally:
            found.close()

    async def side_file(self, request: web.Request) -> web.StreamResponse:
        """A listing, a log or a debug-info pointer."""
        name = request.match_info["name"]
        file = await self._substituter.side_file(name, stored_only=_stored_only(request))
        return _whole(request, file.data, file.content_type, _SHORT, _etag(file.data))

    async def realisation(self, request: web.Request) -> web.StreamResponse:
        """A countersigned realisation."""
        name = request.match_info["name"]
        realisations = self._substituter.realisations
        body = await realisations.get(name, stored_only=_stored_only(request))
        return _whole(request, body, "application/json", _SHORT, _etag(body))

    async def bundle(self, request: web.Request) -> web.StreamResponse:
        """The Sigstore bundle of a NAR file."""
        file = request.match_info["file"]
        await self._substituter.check_file(file)
        body = await self._substituter.signatures.bundle_of(file)
        return _whole(request, body, _BUNDLE, _SHORT, _etag(body))

    async def signature(self, request: web.Request) -> web.StreamResponse:
        """A NAR file's own signature, for older cosign."""
        body = await self._substituter.signatures.signature_of(request.match_info["file"])
        return _whole(request, body, "text/plain", _SHORT, _etag(body))

    async def certificate(self, request: web.Request) -> web.StreamResponse:
        """The certificate of that signature, for older cosign."""
        body = await self._substituter.signatures.certificate_of(request.match_info["file"])
        return _whole(request, body, "application/x-pem-file", _SHORT, _etag(body))

    async def attestations(self, request: web.Request) -> web.StreamResponse:
        """Every bundle whose statement covers a digest, or a path's NAR, a line each."""
        signatures = self._substituter.signatures
        if "path" in request.match_info:
            body = await signatures.attestations_of_path(request.match_info["path"][:32])
        else:
            body = await signatures.attestations_of(Hash.parse(request.match_info["digest"]))
        return _whole(request, body, "application/jsonl", _SHORT, _etag(body))

    async def keys(self, _: web.Request) -> web.Response:
        """All public keys, as JSON."""
        return web.json_response(await self._substituter.signatures.keys(), headers=_cache(_SHORT))

    async def cosign_key(self, _: web.Request) -> web.Response:
        """The cosign.pub with which files and statements verify."""
        return web.Response(text=self._substituter.signatures.public_key(), headers=_cache(_SHORT))

    async def trusted_root(self, request: web.Request) -> web.StreamResponse:
        """The trusted root of a private Sigstore instance."""
        body = self._substituter.signatures.trusted_root()
        return _whole(request, body, "application/json", _SHORT, _etag(body))

    async def paths(self, request: web.Request) -> web.Response:
        """Hash parts of what is served, a line each, beyond `after`; for loopback callers."""
        if not _is_loopback(request.remote):
            raise web.HTTPNotFound(text="the list of paths is for loopback callers\n")
        after = request.match_info.get("after", "")
        found = await self._substituter.signatures.paths(after=after, limit=_LISTED)
        text = "".join(f"{hash_part}\n" for hash_part in found)
        return web.Response(text=text, headers=_cache("no-store"))

    async def status_of_all(self, request: web.Request) -> web.Response:
        """How it stands with keys, signatures and queues; for loopback callers."""
        if not _is_loopback(request.remote):
            raise web.HTTPNotFound(text="the status is for loopback callers\n")
        return web.json_response(await self._substituter.status(), headers=_cache("no-store"))

    async def status_of(self, request: web.Request) -> web.Response:
        """What is known of a store path, and what policy says of it."""
        tree = await self._substituter.provenance.status(request.match_info["path"][:32])
        return web.json_response(tree, headers=_cache("no-store"))

    async def healthz(self, _: web.Request) -> web.Response:
        """200 as long as the process answers."""
        return web.Response(text="ok\n", headers=_cache("no-store"))

    async def readyz(self, _: web.Request) -> web.Response:
        """200 when requests can be served: the index answers and no shutdown has begun."""
        if self.draining:
            return web.Response(status=503, text="shutting down\n", headers=_cache("no-store"))
        await self._substituter.ready()
        return web.Response(text="ready\n", headers=_cache("no-store"))

    async def pubkey(self, _: web.Request) -> web.Response:
        """The operator's public keys, a line each, for trusted-public-keys."""
        keys = await self._substituter.public_keys()
        return web.Response(text="".join(f"{key}\n" for key in keys), headers=_cache(_SHORT))

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus's text format, of all workers."""
        self._tally.flush()
        text = await self._substituter.threads.run(metrics.render)
        return web.Response(body=text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def metrics_for_loopback(self, request: web.Request) -> web.Response:
        """/metrics on the main port, unless it has one of its own."""
        own = self._substituter.config.metrics.listen is not None
        if own or not _is_loopback(request.remote):
            raise web.HTTPNotFound(text="metrics are for loopback callers; see metrics.listen\n")
        return await self.metrics(request)

    async def status(self, request: web.Request) -> web.Response:
        """A page for people: the address, the keys, the lines for nix.conf."""
        substituter = self._substituter
        page = self._page.render(
            version=__version__,
            url=f"{request.scheme}://{request.host}",
            keys=[str(key) for key in await substituter.public_keys()],
            upstreams=[upstream.config for upstream in substituter.upstreams],
            config=substituter.config,
        )
        return web.Response(text=page, content_type="text/html", headers=_cache("no-store"))

    async def _small(
        self, request: web.Request, file: str, descriptor: int, source: str, mark: int
    ) -> web.StreamResponse:
        """A complete, verified file that is worth a place in memory."""
        body = await self._substituter.threads.run(os.pread, descriptor, _SMALL, 0)
        answer = _hot("nar", _NAR, _IMMUTABLE, body, _file_etag(file), "Accept-Ranges: bytes\r\n")
        self._substituter.hot.put(f"/nar/{file}".encode(), answer, mark)
        metrics.nar_bytes.labels(source).inc(len(body))
        return _whole(request, body, _NAR, _IMMUTABLE, _file_etag(file))

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
            return await self._small(request, file, reader.descriptor, "upstream", mark)
        return await self._send(request, file, reader.descriptor, reader.size, reader)

    async def _send(
        self, request: web.Request, file: str, descriptor: int, size: int, reader: Reader | None
    ) -> web.StreamResponse:
        etag = _file_etag(file)
        headers = _headers(_IMMUTABLE, etag) | {"Content-Type": _NAR}
        if etag_matches(request.headers.get("If-None-Match"), etag):
            return web.Response(status=304, headers=headers)
        span = _span(request, size, etag)
        if isinstance(span, web.Response):
            return span
        response = web.StreamResponse(status=200 if span is None else 206, headers=headers)
        if span is not None:
            response.headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
        start, stop = (span.start, span.stop) if span else (0, size)
        response.content_length = stop - start
        if request.method == "HEAD":
            return response
        if reader:
            await reader.follow(start)
        await response.prepare(request)
        await self._stream(request, response, descriptor, start, stop, reader)
        return response

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        descriptor: int,
        start: int,
        stop: int,
        reader: Reader | None,
    ) -> None:
        async def all_there(_: int) -> int:
            return stop

        sending = FileSender(
            request,
            response,
            timeout=self._substituter.config.limits.send_timeout,
            threads=self._substituter.threads,
        )
        try:
            await sending.send(descriptor, start, stop, reader.follow if reader else all_there)
        except (NarsealError, ConnectionError) as error:
            # never a clean end: the client must see that the line broke
            if request.transport:
                request.transport.abort()
            raise Broken(response, error) from error
        source = "upstream" if reader else "storage"
        metrics.nar_bytes.labels(source).inc(stop - start)


def _stored_only(request: web.Request) -> bool:
    """Below `/upload/` no upstream is asked: a pusher wants to know what is here."""
    return (request.match_info.route.name or "").startswith(UPLOAD)


def _is_loopback(remote: str | None) -> bool:
    """Whether the peer is on this machine; a Unix socket's peer has no address."""
    return not remote or ipaddress.ip_address(remote.partition("%")[0]).is_loopback


def _etag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def _file_etag(file: str) -> str:
    return f'"{file}"'


def _cache(control: str) -> dict[str, str]:
    return {"Cache-Control": control}


def _headers(control: str, etag: str) -> dict[str, str]:
    return {"Cache-Control": control, "ETag": etag, "Accept-Ranges": "bytes"}


def _span(request: web.Request, size: int, etag: str) -> Span | web.Response | None:
    """The range that is asked for, or the answer that it cannot be had."""
    condition = request.headers.get("If-Range")
    if condition is not None and not etag_matches(condition, etag):
        return None
    try:
        return parse_range(request.headers.get("Range"), size)
    except Unsatisfiable:
        headers = {"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"}
        return web.Response(status=416, headers=headers, text=f"there are {size} bytes\n")


def _whole(
    request: web.Request, body: bytes, content_type: str, control: str, etag: str
) -> web.Response:
    """A small body, with conditions and ranges."""
    headers = _headers(control, etag) | {"Content-Type": content_type}
    if etag_matches(request.headers.get("If-None-Match"), etag):
        return web.Response(status=304, headers=headers)
    span = _span(request, len(body), etag)
    if isinstance(span, web.Response):
        return span
    if span is None:
        return web.Response(body=body, headers=headers)
    headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(body)}"
    return web.Response(status=206, body=body[span.start : span.stop], headers=headers)


def _hot(
    route: str, content_type: str, control: str, body: bytes, etag: str, more: str = ""
) -> Hot:
    head = (
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: {control}\r\nETag: {etag}\r\n{more}"
        "Server: narseal\r\n\r\n"
    )
    return Hot(route, head.encode() + body, len(body))
