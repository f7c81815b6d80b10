"""Signing everything that is admitted with the keys that came later, in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import closing

from narseal.errors import Denied, NarsealError, Unavailable
from narseal.pipeline.paths.renewal import Renewal
from narseal.pipeline.services import Services
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)
_PAGE = 200
_LOOK = 5.0  # seconds between two looks for work


class Rotation:
    """One worker of all does it, at a bounded rate; readers meanwhile sign what they ask for."""

    def __init__(self, services: Services, renewal: Renewal) -> None:
        self._index = services.index
        self._countersigner = services.countersigner
        self._leadership = services.leadership("rotation")
        self._rate = services.config.signing.resign_rate
        self._renewal = renewal

    async def run(self) -> None:
        """Until cancelled: whenever keys become active, sign what lacks their signatures."""
        with closing(self._leadership):
            await self._leadership.lead()
            await self._follow_keys()

    async def _follow_keys(self) -> None:
        done: frozenset[str] = frozenset()
        while True:
            try:
                names = frozenset(k.public.name for k in await self._countersigner.active())
                if names and names != done:
                    await self._sign_all(names)
                    metrics.resign_waiting.set(await self._index.paths.count_lacking(names))
                    done = names
            except Unavailable as error:
                _log.warning("signing with new keys waits: %s", error)
            await asyncio.sleep(_LOOK)

    async def _sign_all(self, names: frozenset[str]) -> None:
        kinds = (
            (self._index.paths, self._renewal.renew_path),
            (self._index.realisations, self._renewal.renew_realisation),
        )
        for claims, renew in kinds:
            waiting = await claims.count_lacking(names)
            if waiting:
                _log.info("signing %d with keys that came later", waiting)
            after = ""
            while page := await claims.lacking(names, after=after, limit=_PAGE):
                for key in page:
                    start = time.monotonic()
                    await _sign(key, renew)
                    waiting = max(0, waiting - 1)
                    metrics.resign_waiting.set(waiting)
                    await asyncio.sleep(max(0.0, 1 / self._rate - (time.monotonic() - start)))
                after = page[-1]


async def _sign(key: str, renew: Callable[[str], Awaitable[None]]) -> None:
    try:
        await renew(key)
    except Unavailable:
        raise
    except Denied:
        metrics.resigned.labels("kept-back").inc()
    except NarsealError as error:
        metrics.resigned.labels("refused").inc()
        _log.warning("%s is not signed anew: %s", key, error)
    else:
        metrics.resigned.labels("signed").inc()
