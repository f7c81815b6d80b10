"""One worker: a loop, a substituter, a server on sockets that the supervisor opened."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp.http_parser
from aiohttp import web

from narseal.config import Config, LimitsConfig
from narseal.custody import expand
from narseal.custody.tokens import Tokens
from narseal.errors import ConfigError
from narseal.pipeline.caches import HotMap
from narseal.pipeline.substituter import Substituter
from narseal.runtime.portions import READ_AHEAD
from narseal.runtime.shared_flights import SharedFlights
from narseal.server.app import application, metrics_application
from narseal.server.auth import Gate
from narseal.server.handlers import ReadHandlers
from narseal.server.hot_answers import HotAnswers
from narseal.server.hotpath import HotServer
from narseal.server.misses import Misses
from narseal.server.oidc import Oidc
from narseal.server.tally import Tally
from narseal.server.tls import tls_context
from narseal.server.upload_handlers import UploadHandlers
from narseal.storage import Epoch
from narseal.telemetry import metrics

_LOOK = 0.1
_LONGEST = 6 * 3600.0  # of a download, when the configuration changed meanwhile
_LINGER = 2.0  # seconds that a body goes on coming which nobody reads
_MAX_LINE = 4096
_MAX_HEADERS = 64


async def work(
    config: Config,
    *,
    epoch: Epoch,
    flights: SharedFlights | None = None,
    sockets: Sequence[socket.socket],
    metrics_sockets: Sequence[socket.socket],
    ready: Callable[[], None],
    stop: Stop,
) -> None:
    """Serve until `stop`, then let running answers end."""
    metrics.prepare([upstream.label for upstream in config.upstream])
    async with (
        metrics.flushing(),
        Substituter.opened(config, epoch=epoch, flights=flights) as substituter,
    ):
        tally = Tally(access_log=config.log.access)
        answers = HotAnswers(substituter)
        handlers = ReadHandlers(substituter, answers)
        services, upload = substituter.services, config.upload
        gate = (
            Gate(
                Tokens(Path(expand(upload.tokens_file))) if upload.tokens_file else None,
                Oidc(upload.oidc, services.threads, services.tasks) if upload.oidc else None,
                services.threads,
            )
            if upload.tokens_file or upload.oidc
            else None
        )
        putting = UploadHandlers(substituter, gate) if gate else None
        app = application(handlers, tally, putting, gate if upload.private else None)
        # who may read is asked each time where reading needs a token
        misses = None if upload.private else Misses(answers, tally)
        runner = HotRunner(app, hot=services.hot, misses=misses, limits=config.limits, tally=tally)
        await runner.setup()
        metrics_runner = web.AppRunner(metrics_application(handlers), access_log=None)
        await metrics_runner.setup()
        tls = tls_context(config)
        for sock in sockets:
            await web.SockSite(runner, sock, ssl_context=tls, backlog=1024).start()
        for sock in metrics_sockets:
            await web.SockSite(metrics_runner, sock).start()
        ready()
        await stop.asked.wait()
        handlers.draining = True
        if not stop.soon.is_set():  # else nobody comes after this one
            substituter.give_way()
        await substituter.retire()
        await runner.drain(stop.soon)
        await runner.cleanup()
        await metrics_runner.cleanup()


class Stop:
    """How a worker is told to end: soon, or when its last reader has all."""

    def __init__(self) -> None:
        #: No new connections.
        self.asked = asyncio.Event()
        #: Nor more time than `limits.shutdown_timeout`.
        self.soon = asyncio.Event()

    def now(self) -> None:
        """Let running answers end, for a bounded time."""
        self.soon.set()
        self.asked.set()

    def in_time(self) -> None:
        """Another worker serves from now on; let running answers end."""
        self.asked.set()


class HotRunner(web.AppRunner):
    """An AppRunner whose connections have the hot path."""

    # web.AppRunner has slots; a subclass may add its own
    def __init__(
        self,
        app: web.Application,
        *,
        hot: HotMap,
        misses: Misses | None,
        limits: LimitsConfig,
        tally: Tally,
    ) -> None:
        # the pure Python parser is slower and has had its own holes
        if aiohttp.http_parser.HttpRequestParser is aiohttp.http_parser.HttpRequestParserPy:
            raise ConfigError("aiohttp runs without its C parser; install a build that has it")
        self._options: dict[str, Any] = {
            "auto_decompress": False,
            "access_log": None,
            "keepalive_timeout": limits.keepalive_timeout,
            "lingering_time": _LINGER,
            "read_bufsize": READ_AHEAD,
            "max_line_size": _MAX_LINE,
            "max_field_size": _MAX_LINE,
            "max_headers": _MAX_HEADERS,
        }
        super().__init__(app, shutdown_timeout=limits.shutdown_timeout, **self._options)
        self._hot = hot
        self._misses = misses
        self._limits = limits
        self._tally = tally

    async def drain(self, soon: asyncio.Event) -> None:
        """Take no more connections and wait until each is done, or until `soon`."""
        for site in list(self.sites):
            await site.stop()
        server = self.server
        assert isinstance(server, HotServer)  # it was set up
        server.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST):
                while server.connections and not soon.is_set():
                    server.drain()
                    await asyncio.sleep(_LOOK)

    async def _make_server(self) -> web.Server:
        inner = await super()._make_server()
        return HotServer(
            inner,
            self._options,
            hot=self._hot,
            misses=self._misses,
            limits=self._limits,
            tally=self._tally,
        )
