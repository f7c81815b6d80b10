"""An upstream over HTTP: bounded, without cookies, never decompressing behind our back.

Redirects are followed by hand, at most five. Credentials go to the upstream's own origin only.
Another origin is followed only to public addresses, checked on the address that is connected to.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from narseal import __version__
from narseal.config import UpstreamConfig
from narseal.errors import NotFound, Refused, UpstreamTimeout, UpstreamTrouble
from narseal.nix.compression import CONTENT_ENCODINGS, decompressor
from narseal.upstream.breaker import Breaker
from narseal.upstream.credentials import credentials
from narseal.upstream.source import Body

_HOPS = 5
_CHUNK = 1 << 18
_CONNECTIONS = 64
_ABSENT = (403, 404, 410)  # S3 answers 403 for what is not there, and Nix takes it as absence
_REDIRECTS = (301, 302, 303, 307, 308)
_FAILURES = (aiohttp.ClientError, ConnectionError, OSError, asyncio.IncompleteReadError)


class HttpUpstream:
    """The cache behind an `http(s)://` URL."""

    def __init__(self, config: UpstreamConfig) -> None:
        self.config = config
        self._base = config.url + "/"
        self._origin = URL(config.url).origin()
        self._trusted = {
            self._origin,
            *(URL(origin).origin() for origin in config.redirect_origins),
        }
        self._credentials = credentials(config, self._origin.host or "")
        self._breaker = Breaker()
        self._own = _session(config, aiohttp.TCPConnector(limit=_CONNECTIONS))
        self._foreign = _session(
            config, aiohttp.TCPConnector(limit=_CONNECTIONS, socket_factory=_public_socket)
        )

    async def get(self, name: str, *, limit: int) -> bytes | None:
        """See Upstream.get."""
        url = self._base + quote(name, safe="/:+=")
        deadline = asyncio.timeout(self.config.timeout)
        try:
            async with deadline, self._request(url, {}) as response:
                if response.status in _ABSENT:
                    return None
                self._check(response, url, 200)
                return await _read(response, limit, url)
        except TimeoutError as error:
            self._breaker.bad(_now())
            raise UpstreamTimeout(f"{url}: no answer in {self.config.timeout} s") from error

    @asynccontextmanager
    async def open(self, url: str, offset: int) -> AsyncIterator[Body]:
        """See Upstream.open."""
        full = self._base + url
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._request(full, headers) as response:
            if response.status in _ABSENT:
                raise NotFound(f"{full}: {response.status}")
            self._check(response, full, 206 if offset else 200)
            yield Body(_whole_size(response, offset, full), _chunks(response, full))

    async def close(self) -> None:
        """Close both sessions."""
        await self._own.close()
        await self._foreign.close()

    def _check(self, response: aiohttp.ClientResponse, url: str, expected: int) -> None:
        if response.status != expected:
            raise UpstreamTrouble(f"{url}: {response.status} {response.reason or ''}".rstrip())

    @asynccontextmanager
    async def _request(
        self, url: str, headers: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer behind any redirects; failures before and while it is read are ours."""
        if self._breaker.is_open(_now()):
            raise UpstreamTrouble(f"{self.config.url} failed several times; it is tried again soon")
        try:
            async with await self._follow(URL(url, encoded=True), headers) as response:
                if response.status < 500:
                    self._breaker.good()
                else:
                    self._breaker.bad(_now())
                yield response
        except TimeoutError as error:  # aiohttp's, of a connect or a read
            self._breaker.bad(_now())
            raise UpstreamTimeout(f"{url}: the upstream stalls") from error
        except _FAILURES as error:
            self._breaker.bad(_now())
            raise UpstreamTrouble(f"{url}: {type(error).__name__}: {error}") from error

    async def _follow(self, url: URL, headers: dict[str, str]) -> aiohttp.ClientResponse:
        for _ in range(_HOPS + 1):
            trusted = url.origin() in self._trusted
            session = self._own if trusted else self._foreign
            more = self._credentials if url.origin() == self._origin else {}
            response = await session.get(url, headers=headers | more, allow_redirects=False)
            if response.status not in _REDIRECTS:
                return response
            location = response.headers.get("Location", "")
            response.release()
            target = url.join(URL(location, encoded=True)) if location else url
            if target.scheme not in ("http", "https") or not target.host:
                raise UpstreamTrouble(f"{url}: redirects to {location[:200]!r}")
            if url.scheme == "https" and target.scheme == "http":
                raise UpstreamTrouble(f"{url}: redirects from https to http")
            url = target
        raise UpstreamTrouble(f"{url}: more than {_HOPS} redirects")


def _now() -> float:
    return asyncio.get_running_loop().time()


def _session(config: UpstreamConfig, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=_CHUNK,
        headers={"Accept-Encoding": "identity", "User-Agent": f"narseal/{__version__}"},
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=config.connect_timeout, sock_read=config.stall_timeout
        ),
    )


def _public_socket(address: Any) -> socket.socket:
    """A socket for a public address; OSError for one that a redirect must not reach."""
    family, kind, protocol, _, where = address
    if not ipaddress.ip_address(where[0].partition("%")[0]).is_global:
        raise OSError(f"a redirect to {where[0]}, which is not public; see redirect_origins")
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


async def _chunks(response: aiohttp.ClientResponse, url: str) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.content.iter_any():
            yield chunk
    except TimeoutError as error:
        raise UpstreamTimeout(f"{url}: the upstream stalls") from error
    except _FAILURES as error:
        raise UpstreamTrouble(f"{url}: {type(error).__name__}: {error}") from error


def _whole_size(response: aiohttp.ClientResponse, offset: int, url: str) -> int | None:
    if not offset:
        return response.content_length
    content_range = response.headers.get("Content-Range", "")
    unit, _, rest = content_range.partition(" ")
    span, _, size = rest.partition("/")
    if unit != "bytes" or span.partition("-")[0] != str(offset):
        raise UpstreamTrouble(f"{url}: asked from byte {offset}, got {content_range[:80]!r}")
    return int(size) if size.isascii() and size.isdigit() else None
