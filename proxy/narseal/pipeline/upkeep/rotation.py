"""Signing everything that is admitted with the keys that came later, in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from narseal.errors import Denied, NarsealError, Unavailable
from narseal.pipeline.paths.admission import Admission
from narseal.pipeline.paths.realisations import Realisations
from narseal.pipeline.trust.countersign import Countersigner
from narseal.storage import Index, Leadership
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)
_PAGE = 200
_LOOK = 5.0  # seconds between two looks for work
_LEAD = 1.0


class Rotation:
    """One worker of all does it, at a bounded rate; readers meanwhile sign what they ask for."""

    def __init__(
        self,
        *,
        index: Index,
        admission: Admission,
        realisations: Realisations,
        countersigner: Countersigner,
        leadership: Leadership,
        rate: float,
    ) -> None:
        self._index = index
        self._admission = admission
        self._realisations = realisations
        self._countersigner = countersigner
        self._leadership = leadership
        self._rate = rate

    async def run(self) -> None:
        """Until cancelled: whenever keys become active, sign what lacks their signatures."""
        while not self._leadership.take():  # noqa: ASYNC110 (a lock between processes)
            await asyncio.sleep(_LEAD)
        done: frozenset[str] = frozenset()
        while True:
            try:
                names = frozenset(k.public.name for k in await self._countersigner.active())
                if names and names != done:
                    await self._sign_all(names)
                    metrics.resign_waiting.set(await self._index.count_lacking(names))
                    done = names
            except Unavailable as error:
                _log.warning("signing with new keys waits: %s", error)
            await asyncio.sleep(_LOOK)

    def close(self) -> None:
        """Let go of the lead."""
        self._leadership.close()

    async def _sign_all(self, names: frozenset[str]) -> None:
        waiting = await self._index.count_lacking(names)
        if waiting:
            _log.info("signing %d paths with keys that came later", waiting)
        after = ""
        while page := await self._index.lacking(names, after=after, limit=_PAGE):
            for hash_part in page:
                start = time.monotonic()
                await self._sign(hash_part)
                waiting = max(0, waiting - 1)
                metrics.resign_waiting.set(waiting)
                await asyncio.sleep(max(0.0, 1 / self._rate - (time.monotonic() - start)))
            after = page[-1]
        after = ""
        while keys := await self._index.realisation_keys(after=after, limit=_PAGE):
            for key in keys:
                with suppress(Denied):
                    await self._realisations.get(key, stored_only=True)
            after = keys[-1]

    async def _sign(self, hash_part: str) -> None:
        try:
            await self._admission.renew(hash_part)
        except Unavailable:
            raise
        except Denied:
            metrics.resigned.labels("kept-back").inc()
        except NarsealError as error:
            metrics.resigned.labels("refused").inc()
            _log.warning("%s is not signed anew: %s", hash_part, error)
        else:
            metrics.resigned.labels("signed").inc()
