"""An upstream over HTTP: bounded, without cookies, never decompressing behind our back.

Small files come through aiohttp on the loop, NARs through `bulk.py` in a thread. Redirects are
followed by hand, at most five; another origin only to public addresses, checked on the address
that is connected to.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from narseal import __version__
from narseal.config import UpstreamConfig
from narseal.errors import Refused, UpstreamTimeout, UpstreamTrouble
from narseal.nix.compression import CONTENT_ENCODINGS, decompressor
from narseal.upstream.breaker import Breaker
from narseal.upstream.bulk import Bulk
from narseal.upstream.redirects import ABSENT, HOPS, REDIRECTS, Reach, check_public, next_hop
from narseal.upstream.source import Body

_CONNECTIONS = 64
_FAILURES = (aiohttp.ClientError, OSError, asyncio.IncompleteReadError)


class HttpUpstream:
    """The cache behind an `http(s)://` URL."""

    def __init__(self, config: UpstreamConfig) -> None:
        self.config = config
        self._base = config.url + "/"
        self._reach = Reach(config)
        self._breaker = Breaker()
        self._bulk = Bulk(config, self._reach)
        self._own = _session(config, aiohttp.TCPConnector(limit=_CONNECTIONS))
        self._foreign = _session(
            config, aiohttp.TCPConnector(limit=_CONNECTIONS, socket_factory=_public_socket)
        )

    async def get(self, name: str, *, limit: int) -> bytes | None:
        """See Upstream.get."""
        url = self._base + quote(name, safe="/:+=")
        with self._watched():
            try:
                async with asyncio.timeout(self.config.timeout), self._follow(url) as response:
                    if response.status in ABSENT:
                        return None
                    if response.status != 200:
                        raise UpstreamTrouble(f"{url}: {response.status} {response.reason or ''}")
                    return await _read(response, limit, url)
            except TimeoutError as error:
                raise UpstreamTimeout(f"{url}: no answer in {self.config.timeout} s") from error
            except _FAILURES as error:
                raise UpstreamTrouble(f"{url}: {type(error).__name__}: {error}") from error

    @contextmanager
    def open(self, url: str, offset: int) -> Iterator[Body]:
        """See Upstream.open."""
        with self._watched(), self._bulk.open(self._base + url, offset) as body:
            self._breaker.good()  # it answers; a line that breaks later is another matter
            yield body

    async def close(self) -> None:
        """Close every connection."""
        self._bulk.close()
        await self._own.close()
        await self._foreign.close()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Leave an upstream alone for a moment that failed several times in a row."""
        if self._breaker.is_open(monotonic()):
            raise UpstreamTrouble(f"{self.config.url} failed several times; it is tried again soon")
        try:
            yield
        except UpstreamTrouble:
            self._breaker.bad(monotonic())
            raise
        self._breaker.good()

    @asynccontextmanager
    async def _follow(self, address: str) -> AsyncIterator[aiohttp.ClientResponse]:
        url = URL(address, encoded=True)
        for _ in range(HOPS + 1):
            session = self._own if self._reach.is_trusted(url) else self._foreign
            async with session.get(
                url, headers=self._reach.credentials(url), allow_redirects=False
            ) as response:
                if response.status not in REDIRECTS:
                    yield response
                    return
                url = next_hop(url, response.headers.get("Location", ""))
        raise UpstreamTrouble(f"{address}: more than {HOPS} redirects")


def _session(config: UpstreamConfig, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity", "User-Agent": f"narseal/{__version__}"},
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=config.connect_timeout, sock_read=config.timeout
        ),
    )


def _public_socket(address: Any) -> socket.socket:
    """A socket for a public address; OSError for one that a redirect must not reach."""
    family, kind, protocol, _, where = address
    check_public(where[0])
    return socket.socket(family, kind, protocol)


async def _read(response: aiohttp.ClientResponse, limit: int, url: str) -> bytes:
    """A whole small body, decoded, never more than `limit` bytes in memory."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in CONTENT_ENCODINGS:
        raise Refused("unsupported-compression", f"{url}: Content-Encoding {encoding[:40]!r}")
    decoder = decompressor(CONTENT_ENCODINGS[encoding])
    body = bytearray()
    async for chunk in response.content.iter_any():
        for piece in decoder.feed(chunk):
            body += piece
            if len(body) > limit:
                raise Refused("too-large", f"{url}: more than {limit} bytes")
    decoder.finish()
    return bytes(body)
