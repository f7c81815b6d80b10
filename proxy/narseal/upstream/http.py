"""An upstream over HTTP: bounded, without cookies, never decompressing behind our back.

Small files come through `plain.py` on the loop and are decoded in a thread, large NARs through `bulk.py`. Redirects
are followed by hand, at most five; another origin only to public addresses, checked on the address
that is connected to.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from time import monotonic
from urllib.parse import quote

from yarl import URL

from narseal.config import UpstreamConfig
from narseal.errors import Refused, UpstreamTimeout, UpstreamTrouble
from narseal.nix.encoded import EncodedBody
from narseal.runtime.budget import Claim, counted
from narseal.runtime.portions import in_portions
from narseal.runtime.slots import FairSlots, aside, asker
from narseal.upstream.breaker import Breaker
from narseal.upstream.bulk import Bulk
from narseal.upstream.plain import CONNECTIONS, Answer, Client, Place
from narseal.upstream.redirects import ABSENT, HOPS, REDIRECTS, Reach, next_hop
from narseal.upstream.source import Body

_DECODERS = 2  # threads
#: Seconds in which all of a small NAR comes, if it comes `at_once`.
_AT_ONCE = 3.0


class _NotAtOnce(UpstreamTrouble):
    """It was late, or broke off; whether that is a fault, who asks more patiently finds out."""


class _Clients:
    """Connections to an upstream and to where it redirects, and how many may ask for something at a time."""

    def __init__(self, config: UpstreamConfig, count: int) -> None:
        seconds = config.connect_timeout
        self.own = Client(_tls(), connect_timeout=seconds)
        self.foreign = Client(_tls(), connect_timeout=seconds, public_only=True)
        self.slots = FairSlots(count)


class HttpUpstream:
    """The cache behind an `http(s)://` URL."""

    def __init__(self, config: UpstreamConfig, *, lookups: int) -> None:
        """It is asked for at most `lookups` small files at a time."""
        self.config = config
        # small NARs that do not come hold up no narinfos
        self._lookups, self._nars = _Clients(config, lookups), _Clients(config, CONNECTIONS)
        self._base = config.url + "/"
        url = URL(config.url, encoded=True)
        self._path = url.raw_path.rstrip("/") + "/"
        self._reach = Reach(config)
        self._place = Place(url, self._reach.credentials(url))
        self._breaker = Breaker()
        self._bulk = Bulk(config, self._reach)
        # of each upstream its own: what is costly to decode holds up nobody else's answers
        self._decoding = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")

    async def get(self, name: str, *, limit: int, claim: Claim | None = None) -> bytes | None:
        """See Upstream.get."""
        body = bytearray()
        write = claim.counting(body.extend) if claim else body.extend
        async with aside(), self._lookups.slots.taken():
            found = await self._take(_quoted(name), write, limit=limit, claim=claim, on_loop=True)
        return None if found is None else bytes(body)

    async def fetch(self, url: str, *, limit: int) -> bytes | None:
        """See Upstream.fetch."""
        body = bytearray()
        source = asker.get()
        try:
            async with asyncio.timeout(_AT_ONCE):
                await self._nars.slots.take(source)
        except TimeoutError as error:
            raise _NotAtOnce(f"{self.config.url}: too many small NARs are asked for") from error
        try:
            found = await self._take(url, body.extend, limit=limit, on_loop=True, at_once=True)
        finally:
            self._nars.slots.give(source)
        return None if found is None else bytes(body)

    async def save(self, name: str, write: Callable[[bytes], object], *, limit: int) -> int | None:
        """See Upstream.save."""
        return await self._take(_quoted(name), write, limit=limit)

    async def _take(
        self,
        target: str,
        write: Callable[[bytes], object],
        *,
        limit: int,
        claim: Claim | None = None,
        on_loop: bool = False,
        at_once: bool = False,
    ) -> int | None:
        """Give a file to `write`, decoded: in a thread unless it is plain and may stay `on_loop`.

        What does not come `at_once` is left to a transfer, and is no fault of the upstream's.
        """
        url = self._base + target
        clients = self._nars if at_once else self._lookups
        seconds = min(_AT_ONCE, self.config.timeout) if at_once else self.config.timeout
        has_answered = False
        with self._watched():
            try:
                async with asyncio.timeout(seconds):
                    answer = await self._follow(clients, url, self._path + target)
                    has_answered = True
                    with answer:
                        if answer.status in ABSENT:
                            return None
                        if answer.status != 200:
                            raise UpstreamTrouble(f"{url}: {answer.status}")
                        encoding = answer.field(b"content-encoding", "identity")
                        body = EncodedBody(encoding, limit=limit, write=write)
                        if body.is_plain and on_loop:
                            while data := await answer.read():
                                body.feed(data)
                        else:
                            pieces = answer.pieces()
                            if claim:
                                pieces = counted(pieces, claim)
                            await in_portions(pieces, body.feed, self._in_thread)
                        body.finish()
                        return body.size
            except TimeoutError as error:
                late = str(error) or f"no answer in {seconds} s"
                raise (_NotAtOnce if at_once else UpstreamTimeout)(f"{url}: {late}") from error
            except OSError as error:
                kind = _NotAtOnce if at_once and has_answered else UpstreamTrouble
                raise kind(f"{url}: {type(error).__name__}: {error}") from error
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
        for clients in (self._lookups, self._nars):
            await clients.own.close()
            await clients.foreign.close()
        self._decoding.shutdown(cancel_futures=True)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Leave an upstream alone for a moment that failed several times in a row."""
        if self._breaker.is_open(monotonic()):
            raise UpstreamTrouble(f"{self.config.url} failed several times; it is tried again soon")
        try:
            yield
        except _NotAtOnce:
            raise
        except UpstreamTrouble:
            self._breaker.bad(monotonic())
            raise
        self._breaker.good()

    async def _follow(self, clients: _Clients, url: str, target: str) -> Answer:
        """The answer of the upstream, or of where it sends us; a context."""
        client, place = clients.own, self._place
        for _ in range(HOPS + 1):
            answer = await client.ask(place, target)
            if answer.status not in REDIRECTS:
                return answer
            with answer:
                hop = next_hop(URL(url, encoded=True), answer.field(b"location"))
            client = clients.own if self._reach.is_trusted(hop) else clients.foreign
            place = Place(hop, self._reach.credentials(hop))
            url, target = str(hop), hop.raw_path_qs
        raise UpstreamTrouble(f"{self._base}: more than {HOPS} redirects")


def _quoted(name: str) -> str:
    return quote(name, safe="/:+=")


@cache
def _tls() -> ssl.SSLContext:
    """Certificates are verified, by the system's authorities or those of SSL_CERT_FILE."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
