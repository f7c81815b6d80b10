"""An upstream over HTTP: bounded, without cookies, never decompressing behind our back.

Small files come through aiohttp on the loop and are decoded in a thread, NARs through `bulk.py`. Redirects are
followed by hand, at most five; another origin only to public addresses, checked on the address
that is connected to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from time import monotonic
from urllib.parse import quote

import aiohttp
from yarl import URL

from narseal import __version__
from narseal.config import UpstreamConfig
from narseal.errors import Refused, UpstreamTimeout, UpstreamTrouble
from narseal.nix.encoded import EncodedBody
from narseal.runtime.budget import Claim, counted
from narseal.runtime.portions import READ_AHEAD, in_portions, in_turns
from narseal.runtime.slots import FairSlots, aside
from narseal.upstream.addresses import public_socket
from narseal.upstream.breaker import Breaker
from narseal.upstream.bulk import Bulk
from narseal.upstream.redirects import ABSENT, HOPS, REDIRECTS, Reach, next_hop
from narseal.upstream.source import Body

_CONNECTIONS = 64
_DECODERS = 2  # threads
_FAILURES = (aiohttp.ClientError, OSError, asyncio.IncompleteReadError)


class HttpUpstream:
    """The cache behind an `http(s)://` URL."""

    def __init__(self, config: UpstreamConfig, *, lookups: int) -> None:
        """It is asked for at most `lookups` small files at a time."""
        self.config = config
        self._lookups = FairSlots(lookups)
        self._base = config.url + "/"
        self._reach = Reach(config)
        self._breaker = Breaker()
        self._bulk = Bulk(config, self._reach)
        # of each upstream its own: what is costly to decode holds up nobody else's answers
        self._decoding = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._own = _session(config, aiohttp.TCPConnector(limit=_CONNECTIONS))
        self._foreign = _session(
            config, aiohttp.TCPConnector(limit=_CONNECTIONS, socket_factory=public_socket)
        )

    async def get(self, name: str, *, limit: int, claim: Claim | None = None) -> bytes | None:
        """See Upstream.get."""
        body = bytearray()
        write = claim.counting(body.extend) if claim else body.extend
        async with aside(), self._lookups.taken():
            found = await self._take(name, write, limit=limit, claim=claim, on_loop=True)
        return None if found is None else bytes(body)

    async def save(self, name: str, write: Callable[[bytes], object], *, limit: int) -> int | None:
        """See Upstream.save."""
        return await self._take(name, write, limit=limit)

    async def _take(
        self,
        name: str,
        write: Callable[[bytes], object],
        *,
        limit: int,
        claim: Claim | None = None,
        on_loop: bool = False,
    ) -> int | None:
        """Give a file to `write`, decoded: in a thread unless it is plain and may stay `on_loop`."""
        url = self._base + quote(name, safe="/:+=")
        with self._watched():
            try:
                async with asyncio.timeout(self.config.timeout), self._follow(url) as response:
                    if response.status in ABSENT:
                        return None
                    if response.status != 200:
                        raise UpstreamTrouble(f"{url}: {response.status} {response.reason or ''}")
                    encoding = response.headers.get("Content-Encoding", "identity")
                    body = EncodedBody(encoding, limit=limit, write=write)
                    chunks: AsyncIterator[bytes] = response.content.iter_any()
                    if body.is_plain and on_loop:
                        async for chunk in in_turns(chunks):
                            body.feed(chunk)
                    else:
                        if claim:
                            chunks = counted(chunks, claim)
                        await in_portions(chunks, body.feed, self._in_thread)
                    body.finish()
                    return body.size
            except TimeoutError as error:
                raise UpstreamTimeout(f"{url}: no answer in {self.config.timeout} s") from error
            except _FAILURES as error:
                raise UpstreamTrouble(f"{url}: {type(error).__name__}: {error}") from error
            except Refused as error:
                raise Refused(error.reason, f"{url}: {error}") from error

    def _in_thread(self, work: Callable[[bytes], object], data: bytes) -> asyncio.Future[object]:
        return asyncio.get_running_loop().run_in_executor(self._decoding, work, data)

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
        self._decoding.shutdown(cancel_futures=True)

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
        read_bufsize=READ_AHEAD,
        headers={"Accept-Encoding": "identity", "User-Agent": f"narseal/{__version__}"},
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=config.connect_timeout, sock_read=config.timeout
        ),
    )
