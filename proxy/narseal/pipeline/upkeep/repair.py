"""Making the folder of narinfo files say what the index and policy say.

A crash may have left a file out, between the index's row and the file; and rules change.
"""

from __future__ import annotations

import logging

from narseal.errors import NarsealError
from narseal.pipeline.nars.publisher import Publisher
from narseal.pipeline.services import Services
from narseal.pipeline.trust.policy import content_digests
from narseal.storage import LocalStorage

_log = logging.getLogger(__name__)
_PAGE = 1000


class Repair:
    """Once, at the start, in the background: so the folder is a whole binary cache again."""

    def __init__(self, services: Services, publisher: Publisher) -> None:
        self._index = services.index
        self._folder = services.folder
        self._policy = services.policy
        self._threads = services.threads
        self._publisher = publisher

    async def run(self) -> None:
        """Look after the narinfo file of every path whose NAR is stored."""
        after = ""
        try:
            while page := await self._index.with_stored_nar(after=after, limit=_PAGE):
                without = await self._threads.run(_without_file, self._folder.local, page)
                for hash_part in page if self._policy.active else without:
                    await self._mend(hash_part, is_without=hash_part in without)
                after = page[-1]
        except NarsealError as error:
            _log.warning("not every narinfo file could be looked after: %s", error)

    async def _mend(self, hash_part: str, *, is_without: bool) -> None:
        found = await self._index.path(hash_part)
        if found is None or found[0].withdrawn:
            return
        path, nar = found
        if is_without:
            await self._publisher.narinfo(path, nar)
        elif not await self._policy.passes(path.info, content_digests(path.info, nar)):
            await self._publisher.remove_narinfo(hash_part)


def _without_file(storage: LocalStorage, hash_parts: list[str]) -> set[str]:
    return {part for part in hash_parts if not storage.path(f"{part}.narinfo").exists()}
