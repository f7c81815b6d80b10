"""Writing the narinfo files that a crash left out, between the index's row and the file."""

from __future__ import annotations

import logging

from narseal.errors import NarsealError
from narseal.pipeline.blocking import Blocking
from narseal.pipeline.fetch import Fetcher
from narseal.storage import Index, LocalStorage

_log = logging.getLogger(__name__)
_PAGE = 1000


async def mend(index: Index, storage: LocalStorage, fetcher: Fetcher, blocking: Blocking) -> None:
    """Once, at the start, in the background: so the folder is a whole binary cache again."""
    after = ""
    try:
        while page := await index.with_stored_nar(after=after, limit=_PAGE):
            for hash_part in await blocking.run(_without_file, storage, page):
                if found := await index.path(hash_part):
                    await fetcher.write_narinfo(*found)
                    _log.info("wrote %s.narinfo, which a crash had left out", hash_part)
            after = page[-1]
    except NarsealError as error:
        _log.warning("not every narinfo file could be looked after: %s", error)


def _without_file(storage: LocalStorage, hash_parts: list[str]) -> list[str]:
    return [part for part in hash_parts if not storage.path(f"{part}.narinfo").exists()]
