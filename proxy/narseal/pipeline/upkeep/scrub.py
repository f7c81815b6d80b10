"""Hashing all stored NARs again, slowly and for ever: bits rot where nobody reads them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing

from narseal.errors import NarsealError, NotFound, StorageBroken, Unavailable
from narseal.pipeline.nars.stored import StoredFiles
from narseal.pipeline.nars.transfer import Reader
from narseal.pipeline.paths.nars import Nars
from narseal.pipeline.services import Services
from narseal.storage import NarRecord
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)
_PAGE = 100
_PAUSE = 60.0  # seconds between two rounds


class Scrub:
    """One worker of all does it, at `storage.scrub_rate`."""

    def __init__(self, services: Services, nars: Nars, files: StoredFiles) -> None:
        self._index = services.index
        self._leadership = services.leadership("scrub")
        self._rate = services.config.storage.scrub_rate
        self._nars = nars
        self._files = files

    async def run(self) -> None:
        """Until cancelled: one round after another."""
        with closing(self._leadership):
            await self._leadership.lead()
            while True:
                try:
                    await self.go_round()
                except Unavailable as error:
                    _log.warning("stored NARs cannot be looked at: %s", error)
                await asyncio.sleep(_PAUSE)

    async def go_round(self) -> None:
        """Hash every stored NAR once; what is wrong is struck off and fetched again."""
        after = ""
        while page := await self._index.nars_page(after=after, limit=_PAGE):
            for record in page:
                await self._look_at(record)
            after = page[-1].file

    async def _look_at(self, record: NarRecord) -> None:
        try:
            await self._files.verify(record, self._pace)
        except StorageBroken as error:
            if await self._files.strike(record, error):
                metrics.scrubbed.labels("bad").inc()
                await self._fetch_again(record)
        else:
            metrics.scrubbed.labels("good").inc()

    async def _pace(self, size: int) -> None:
        metrics.scrub_bytes.inc(size)
        await asyncio.sleep(size / self._rate)

    async def _fetch_again(self, record: NarRecord) -> None:
        try:
            found = await self._nars.get(record.file)
            try:
                if isinstance(found, Reader):
                    await found.whole()
            finally:
                found.close()
        except NotFound as error:
            if record.url:  # of what never had one, it was said already
                self._files.lost(f"nar/{record.file}", str(error))
        except NarsealError as error:
            _log.warning("nar/%s is fetched again when it is asked for: %s", record.file, error)
