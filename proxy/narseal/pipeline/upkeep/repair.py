"""Making the folder of narinfo files say what the index and policy say.

A crash may have left a file out, between the index's row and the file; and rules change.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import closing
from functools import partial

from narseal.errors import NarsealError
from narseal.pipeline.nars.publisher import Publisher
from narseal.pipeline.services import Services
from narseal.storage import LocalStorage

_log = logging.getLogger(__name__)
_GROUP = 256  # narinfos that are published together
_LOOK = 1.0  # seconds between two looks whether there is work
_PAUSE = 60.0  # seconds before what could not be looked after is tried again


class Repair:
    """In the background: so the folder is a whole binary cache again. One worker of all does it."""

    def __init__(self, services: Services, publisher: Publisher) -> None:
        self._index = services.index
        self._folder = services.folder
        self._policy = services.policy
        self._threads = services.threads
        self._publisher = publisher
        self._epoch = services.epoch
        self._leadership = partial(services.leadership, "repair")

    async def run(self) -> None:
        """At the start, and whenever somebody asks for it, until cancelled."""
        with closing(self._leadership()) as leadership:
            await leadership.lead()
            while True:
                asked = self._epoch.repairs()
                if not await self.look_after_all(rests=True):
                    await asyncio.sleep(_PAUSE)
                    continue
                while asked == self._epoch.repairs():  # noqa: ASYNC110 (a number that processes share)
                    await asyncio.sleep(_LOOK)

    async def look_after_all(self, *, rests: bool = False) -> bool:
        """Once: every path whose NAR is stored; whether all could be. Who `rests` leaves half of the time to others."""
        began = time.monotonic()
        try:
            async for page in self._index.with_stored_nar():
                without = await self._threads.run(_without_file, self._folder.local, page)
                wanting = page if self._policy.active else without
                for at in range(0, len(wanting), _GROUP):
                    group = wanting[at : at + _GROUP]
                    await self._publisher.narinfos(group, looks=True, in_background=True)
                if rests:
                    await asyncio.sleep(time.monotonic() - began)
                    began = time.monotonic()
        except NarsealError as error:
            _log.warning("not every narinfo file could be looked after: %s", error)
            return False
        return True


def _without_file(storage: LocalStorage, hash_parts: list[str]) -> list[str]:
    return [part for part in hash_parts if storage.lacks(f"{part}.narinfo")]
