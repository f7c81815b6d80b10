"""What is answered from memory, and found where it is not there yet: narinfos and small NARs."""

from __future__ import annotations

import asyncio

from narseal.errors import UpstreamTimeout
from narseal.pipeline.caches import Hot
from narseal.pipeline.substituter import Substituter
from narseal.server.conditional import etag_of, file_etag
from narseal.telemetry import metrics

SHORT = "public, max-age=300"
IMMUTABLE = "public, max-age=31536000, immutable"
NARINFO = "text/x-nix-narinfo"
NAR = "application/x-nix-nar"
#: Bytes of a NAR file that is worth a place in memory.
SMALL = 64 << 10
#: Seconds; a client gives up after 300 without a byte (Nix's stalled-download-timeout).
FIRST_BYTE = 280.0


class HotAnswers:
    """The answers of one worker, with all upstreams behind them."""

    def __init__(self, substituter: Substituter) -> None:
        self._view = substituter.everything
        self._hot = substituter.services.hot

    async def narinfo(self, hash_part: str, *, only_looks: bool = False) -> Hot:
        """A countersigned narinfo; see `View.narinfo`."""
        target = f"/{hash_part}.narinfo".encode()
        mark = self._hot.mark()
        if (known := self._hot.get(target)) is not None:
            metrics.hot_hits.inc()
            return known
        body = await self._view.narinfo(hash_part, only_looks=only_looks)
        answer = _answer("narinfo", NARINFO, SHORT, body, etag_of(body))
        if not only_looks:  # who asks for it next is to be found, too: more is brought for him
            self._hot.put(target, answer, mark)
        return answer

    async def small_nar(self, file: str, *, only_looks: bool = False) -> Hot | None:
        """A small NAR that is not in storage yet; None: `Nars.get` is to give it, or say why not."""
        mark = self._hot.mark()
        try:
            async with asyncio.timeout(FIRST_BYTE):
                body = await self._view.small_nar(file, only_looks=only_looks)
        except TimeoutError as error:
            raise UpstreamTimeout(f"nar/{file}: nothing came in {FIRST_BYTE} s") from error
        if body is None:
            return None
        if only_looks:
            return _answer("nar", NAR, IMMUTABLE, body, file_etag(file))
        return self.nar(file, body, "upstream", mark)

    def nar(self, file: str, body: bytes, source: str, mark: int) -> Hot:
        """A complete, verified NAR file that was not in memory; `mark` is of before it was looked for."""
        answer = _answer("nar", NAR, IMMUTABLE, body, file_etag(file))
        if len(body) <= SMALL:
            self._hot.put(f"/nar/{file}".encode(), answer, mark)
        metrics.nar_bytes.labels(source).inc(len(body))
        return answer


def _answer(route: str, content_type: str, control: str, body: bytes, etag: str) -> Hot:
    head = (
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: {control}\r\nETag: {etag}\r\nAccept-Ranges: bytes\r\n"
        "Server: narseal\r\n\r\n"
    )
    return Hot(route, head.encode() + body, len(body))
