"""What is answered on each route."""

from __future__ import annotations

import ipaddress

import jinja2
from aiohttp import web

from narseal import __version__
from narseal.nix.hashes import Hash
from narseal.nix.store_path import StorePath
from narseal.pipeline.substituter import Substituter
from narseal.runtime.files import OpenFile
from narseal.server.conditional import cache, etag_of, etag_of_file, whole
from narseal.server.file_answers import Head, noting_faults, send_file, send_lines
from narseal.server.hot_answers import NARINFO, SHORT, SMALL, HotAnswers
from narseal.server.nar_handlers import NarHandlers, is_upload, view_of
from narseal.storage import storage_errors
from narseal.telemetry import metrics

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_LISTED = 1000


class ReadHandlers:
    """The handlers of one worker."""

    def __init__(self, substituter: Substituter, answers: HotAnswers) -> None:
        self._substituter = substituter
        self._services = substituter.services
        self._answers = answers
        #: Those of NAR files.
        self.nars = NarHandlers(substituter, answers)
        self._page = jinja2.Environment(
            loader=jinja2.PackageLoader("narseal.server"), autoescape=True
        ).get_template("status.html")
        self.draining = False

    async def cache_info(self, _: web.Request) -> web.Response:
        """Our own nix-cache-info, never an upstream's."""
        text = self._substituter.cache_info.render()
        return web.Response(text=text, content_type="text/x-nix-cache-info", headers=cache(SHORT))

    async def narinfo(self, request: web.Request) -> web.StreamResponse:
        """A countersigned narinfo."""
        if is_upload(request):
            body = await self._substituter.stored.narinfo(request.match_info["hash"])
            return whole(request, body, NARINFO, "no-store", etag_of(body))
        only_looks = request.method == "HEAD"
        hash_part = request.match_info["hash"]
        body = (await self._answers.narinfo(hash_part, only_looks=only_looks)).body
        return whole(request, body, NARINFO, SHORT, etag_of(body))

    async def side_file(self, request: web.Request) -> web.StreamResponse:
        """A listing, a log or a debug-info pointer."""
        name = request.match_info["name"]
        found = await view_of(self._substituter, request).side_file(name)
        return await self._file(request, found.file, found.content_type)

    async def realisation(self, request: web.Request) -> web.StreamResponse:
        """A countersigned realisation."""
        name = request.match_info["name"]
        body = await view_of(self._substituter, request).realisations.get(name)
        return whole(request, body, "application/json", SHORT, etag_of(body))

    async def bundle(self, request: web.Request) -> web.StreamResponse:
        """The Sigstore bundle of a NAR file."""
        file = request.match_info["file"]
        await self._substituter.everything.nars.check(file)
        found = await self._substituter.signatures.bundle_of(file)
        if isinstance(found, bytes):
            return whole(request, found, _BUNDLE, SHORT, etag_of(found))
        return await self._file(request, found, _BUNDLE)

    async def signature(self, request: web.Request) -> web.StreamResponse:
        """A NAR file's own signature, for older cosign."""
        file = request.match_info["file"]
        await self._substituter.everything.nars.check(file)
        body = await self._substituter.signatures.signature_of(file)
        return whole(request, body, "text/plain", SHORT, etag_of(body))

    async def certificate(self, request: web.Request) -> web.StreamResponse:
        """The certificate of that signature, for older cosign."""
        file = request.match_info["file"]
        await self._substituter.everything.nars.check(file)
        body = await self._substituter.signatures.certificate_of(file)
        return whole(request, body, "application/x-pem-file", SHORT, etag_of(body))

    async def attestations(self, request: web.Request) -> web.StreamResponse:
        """Every bundle whose statement covers a digest, or a path's NAR, a line each."""
        signatures = self._substituter.signatures
        if "path" in request.match_info:
            digests = await signatures.attestations_of_path(
                StorePath.parse(request.match_info["path"])
            )
        else:
            digests = await signatures.attestations_of(Hash.parse(request.match_info["digest"]))
        head = Head("application/jsonl", SHORT, etag_of(b"".join(digests)))
        with noting_faults(request.path):
            return await send_lines(request, self._services, head, signatures.bundles(digests))

    async def keys(self, _: web.Request) -> web.Response:
        """All public keys, as JSON."""
        return web.json_response(await self._substituter.signatures.keys(), headers=cache(SHORT))

    async def cosign_key(self, _: web.Request) -> web.Response:
        """The cosign.pub with which files and statements verify."""
        return web.Response(text=self._substituter.signatures.public_key(), headers=cache(SHORT))

    async def trusted_root(self, request: web.Request) -> web.StreamResponse:
        """The trusted root of a private Sigstore instance."""
        body = self._substituter.signatures.trusted_root()
        return whole(request, body, "application/json", SHORT, etag_of(body))

    async def paths(self, request: web.Request) -> web.Response:
        """Hash parts of what is served, a line each, beyond `after`; for loopback callers."""
        if not _is_loopback(request.remote):
            raise web.HTTPNotFound(text="the list of paths is for loopback callers\n")
        after = request.match_info.get("after", "")
        found = await self._substituter.signatures.paths(after=after, limit=_LISTED)
        text = "".join(f"{hash_part}\n" for hash_part in found)
        return web.Response(text=text, headers=cache("no-store"))

    async def status_of_all(self, request: web.Request) -> web.Response:
        """How it stands with keys, signatures and queues; for loopback callers."""
        if not _is_loopback(request.remote):
            raise web.HTTPNotFound(text="the status is for loopback callers\n")
        return web.json_response(await self._substituter.status.tree(), headers=cache("no-store"))

    async def status_of(self, request: web.Request) -> web.Response:
        """What is known of a store path, and what policy says of it."""
        tree = await self._substituter.provenance.status(
            StorePath.parse(request.match_info["path"])
        )
        return web.json_response(tree, headers=cache("no-store"))

    async def healthz(self, _: web.Request) -> web.Response:
        """200 as long as the process answers."""
        return web.Response(text="ok\n", headers=cache("no-store"))

    async def readyz(self, _: web.Request) -> web.Response:
        """200 when requests can be served: the index answers and no shutdown has begun."""
        if self.draining:
            return web.Response(status=503, text="shutting down\n", headers=cache("no-store"))
        await self._substituter.status.ready()
        return web.Response(text="ready\n", headers=cache("no-store"))

    async def pubkey(self, _: web.Request) -> web.Response:
        """The operator's public keys, a line each, for trusted-public-keys."""
        keys = await self._substituter.status.public_keys()
        return web.Response(text="".join(f"{key}\n" for key in keys), headers=cache(SHORT))

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus's text format, of all workers."""
        text = await self._services.threads.run(metrics.render)
        return web.Response(body=text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def metrics_for_loopback(self, request: web.Request) -> web.Response:
        """/metrics on the main port, unless it has one of its own."""
        own = self._services.config.metrics.listen is not None
        if own or not _is_loopback(request.remote):
            raise web.HTTPNotFound(text="metrics are for loopback callers; see metrics.listen\n")
        return await self.metrics(request)

    async def status(self, request: web.Request) -> web.Response:
        """A page for people: the address, the keys, the lines for nix.conf."""
        substituter = self._substituter
        page = self._page.render(
            version=__version__,
            url=f"{request.scheme}://{request.host}",
            keys=[str(key) for key in await substituter.status.public_keys()],
            upstreams=[upstream.config for upstream in self._services.upstreams],
            config=self._services.config,
        )
        return web.Response(text=page, content_type="text/html", headers=cache("no-store"))

    async def _file(
        self, request: web.Request, file: OpenFile, content_type: str
    ) -> web.StreamResponse:
        """A file whose name is not its content's."""
        with noting_faults(request.path):
            if file.size <= SMALL:
                body = await self._services.threads.run(_read, file)
                return whole(request, body, content_type, SHORT, etag_of(body))
            head = Head(content_type, SHORT, etag_of_file(file.descriptor))
            return await send_file(request, self._services, head, file.descriptor, file.size)


def _read(file: OpenFile) -> bytes:
    with storage_errors():
        return file.read()


def _is_loopback(remote: str | None) -> bool:
    """Whether the peer is on this machine; a Unix socket's peer has no address."""
    return not remote or ipaddress.ip_address(remote.partition("%")[0]).is_loopback
