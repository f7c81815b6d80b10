"""The aiohttp application: routes with full-match patterns, and one middleware for all of them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from time import perf_counter

from aiohttp import web
from aiohttp.typedefs import Middleware

from narseal.errors import NarsealError
from narseal.nix.base32 import CHARS
from narseal.runtime.slots import asker
from narseal.server.auth import Gate
from narseal.server.bounded import connection_of
from narseal.server.failure import failure, fault
from narseal.server.file_answers import Broken
from narseal.server.handlers import ReadHandlers
from narseal.server.misses import FILE
from narseal.server.nar_handlers import UPLOAD
from narseal.server.tally import Tally
from narseal.server.upload_handlers import UploadHandlers
from narseal.telemetry.logs import new_request_id, request_id

_HASH = f"{CHARS}{{32}}"
_PATH = rf"{CHARS}{{32}}-[0-9a-zA-Z+\-._?=]{{1,211}}"
_OUTPUT = r"[0-9a-zA-Z+\-._?=]{1,211}"
_FILE = f"{{file:{FILE}}}"
_ID = web.RequestKey("id", str)
_REQUEST_ID = re.compile(r"[0-9A-Za-z._-]{1,64}", re.ASCII)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(
    handlers: ReadHandlers, tally: Tally, putting: UploadHandlers | None, gate: Gate | None
) -> web.Application:
    """Every route of the substituter; what matches none is 404."""

    async def finish_head(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = "narseal"
        response.headers["X-Request-Id"] = request.get(_ID, "")
        is_left = request.body_exists and not request.content.at_eof()
        if handlers.draining or is_left:
            response.force_close()  # a body that nobody read ends with its connection
            response.headers["Connection"] = "close"
        if is_left:
            connection_of(request).drop_body(request.content)

    middlewares = [accounting(tally), *([reading(gate)] if gate else [])]
    app = web.Application(middlewares=middlewares, client_max_size=1 << 20)
    app.on_response_prepare.append(finish_head)
    table: list[tuple[str, str, Handler]] = [
        ("nix-cache-info", "/nix-cache-info", handlers.cache_info),
        ("narinfo", f"/{{hash:{_HASH}}}.narinfo", handlers.narinfo),
        ("nar", f"/nar/{_FILE}", handlers.nars.nar),
        ("signature", f"/nar/{_FILE}.sigstore.json", handlers.bundle),
        ("signature-sig", f"/nar/{_FILE}.sig", handlers.signature),
        ("signature-pem", f"/nar/{_FILE}.pem", handlers.certificate),
        ("attestations", "/attestations/{digest:sha256:[0-9a-z]{52,64}}", handlers.attestations),
        ("attestations-of", f"/attestations/{{path:{_PATH}}}", handlers.attestations),
        ("status-of-all", "/status", handlers.status_of_all),
        ("status-of", f"/status/{{path:{_PATH}}}", handlers.status_of),
        ("keys", "/keys", handlers.keys),
        ("cosign-pub", "/cosign.pub", handlers.cosign_key),
        ("trusted-root", "/trusted_root.json", handlers.trusted_root),
        ("paths", "/paths", handlers.paths),
        ("paths-after", f"/paths/{{after:{_HASH}}}", handlers.paths),
        ("ls", f"/{{name:{_HASH}\\.ls}}", handlers.side_file),
        ("log", f"/{{name:log/{_PATH}}}", handlers.side_file),
        ("debuginfo", r"/{name:debuginfo/[0-9a-f]{40}(\.debug)?}", handlers.side_file),
        (
            "realisations",
            rf"/{{name:realisations/sha256:[0-9a-f]{{64}}!{_OUTPUT}\.doi}}",
            handlers.realisation,
        ),
        (
            "build-trace-v2",
            rf"/{{name:build-trace-v2/{_PATH}/{_OUTPUT}\.doi}}",
            handlers.realisation,
        ),
        ("healthz", "/healthz", handlers.healthz),
        ("readyz", "/readyz", handlers.readyz),
        ("pubkey", "/pubkey", handlers.pubkey),
        ("metrics", "/metrics", handlers.metrics_for_loopback),
        ("status", "/", handlers.status),
    ]
    for name, pattern, handler in table:
        app.router.add_get(pattern, handler, name=name, expect_handler=_unread)
    puts = putting.handlers() if putting else {}
    for name, pattern, handler in table:
        if putting is None or name not in puts:
            continue
        expect = putting.expect
        app.router.add_put(pattern, puts[name], name=f"put-{name}", expect_handler=expect)
        if "narinfo" in puts:
            below = f"/upload{pattern}"
            app.router.add_get(below, handler, name=f"{UPLOAD}{name}", expect_handler=_unread)
            app.router.add_put(below, puts[name], name=f"{UPLOAD}put-{name}", expect_handler=expect)
    app.router.add_route("*", "/{_:(?s:.*)}", _nothing, expect_handler=_unread)
    return app


async def _unread(_: web.Request) -> None:
    """`Expect: 100-continue` of what brings no body that is wanted: the answer comes at once."""


async def _nothing(request: web.Request) -> web.StreamResponse:
    """What no route has, or none with this method; a body that it brings is not read."""
    allowed: set[str] = set()
    for resource in list(request.app.router.resources())[:-1]:
        allowed |= (await resource.resolve(request))[1]
    if allowed:
        raise web.HTTPMethodNotAllowed(request.method, allowed)
    raise web.HTTPNotFound


#: What is for everybody though reading needs a token.
_OPEN = frozenset({"healthz", "readyz", "metrics"})


def reading(gate: Gate) -> Middleware:
    """The middleware that asks for a token before anything is looked up."""

    @web.middleware
    async def ask(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.route.name not in _OPEN:
            await gate.identify(request)
        return await handler(request)

    return ask


def accounting(tally: Tally) -> Middleware:
    """The middleware of every route."""

    @web.middleware
    async def account(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Request id, counting, and every error as a short text for whoever reads it."""
        start = perf_counter()
        given = request.headers.get("X-Request-Id", "")
        name = given if _REQUEST_ID.fullmatch(given) else new_request_id()
        token = request_id.set(name)
        request[_ID] = name
        asker.set(request.remote or "")
        route = (request.match_info.route.name or "other").removeprefix(UPLOAD)
        status = 499  # the client left, as nginx has it
        try:
            try:
                if request.body_exists and request.method in ("GET", "HEAD"):
                    raise web.HTTPBadRequest(text=f"a {request.method} brings no body\n")
                response = await handler(request)
            except NarsealError as error:
                response = failure(error)
            except web.HTTPException as error:
                response = error
            except Broken as broken:
                status = broken.status
                return broken.response
            except Exception as error:
                if isinstance(error, ConnectionError) and is_gone(request):
                    # what read its body is not to stay, with the bytes, for as long as aiohttp knows the error
                    error.__traceback__ = None
                    raise
                response = fault(f"{request.method} {request.path}")
            status = response.status
            if isinstance(response, web.HTTPException):
                raise response
            return response
        finally:
            request_id.reset(token)
            tally.answered(route, request.method, request.path, status, perf_counter() - start)

    return account


def is_gone(request: web.Request) -> bool:
    """Its client left."""
    return request.transport is None or request.transport.is_closing()


def metrics_application(handlers: ReadHandlers) -> web.Application:
    """/metrics alone, for a listener of its own."""
    app = web.Application()
    app.router.add_get("/metrics", handlers.metrics)
    return app
