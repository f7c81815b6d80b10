"""Making the folder of narinfo files say what the index and policy say.

A crash may have left a file out, between the index's row and the file; and rules change.
"""

from __future__ import annotations

import asyncio
import logging

from narseal.errors import NarsealError
from narseal.pipeline.nars.publisher import Publisher
from narseal.pipeline.services import Services
from narseal.storage import LocalStorage

_log = logging.getLogger(__name__)
_PAGE = 1000
_LOOK = 1.0  # seconds between two looks whether there is work


class Repair:
    """In the background: so the folder is a whole binary cache again."""

    def __init__(self, services: Services, publisher: Publisher) -> None:
        self._index = services.index
        self._folder = services.folder
        self._policy = services.policy
        self._threads = services.threads
        self._publisher = publisher
        self._epoch = services.epoch

    async def run(self) -> None:
        """At the start, and whenever somebody asks for it, until cancelled."""
        while True:
            asked = self._epoch.repairs()
            await self.look_after_all()
            while asked == self._epoch.repairs():  # noqa: ASYNC110 (a number that processes share)
                await asyncio.sleep(_LOOK)

    async def look_after_all(self) -> None:
        """Once: every path whose NAR is stored."""
        after = ""
        try:
            while page := await self._index.with_stored_nar(after=after, limit=_PAGE):
                without = await self._threads.run(_without_file, self._folder.local, page)
                for hash_part in page if self._policy.active else without:
                    await self._publisher.narinfo(hash_part)
                after = page[-1]
        except NarsealError as error:
            _log.warning("not every narinfo file could be looked after: %s", error)


def _without_file(storage: LocalStorage, hash_parts: list[str]) -> set[str]:
    return {part for part in hash_parts if storage.lacks(f"{part}.narinfo")}
