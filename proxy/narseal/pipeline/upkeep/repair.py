"""Making the folder of narinfo files say what the index and policy say.

A crash may have left a file out, between the index's row and the file; and rules change.
"""

from __future__ import annotations

import logging

from narseal.errors import NarsealError
from narseal.pipeline.nars.fetcher import Fetcher
from narseal.pipeline.trust.policy import Policy, content_digests
from narseal.runtime.threads import ThreadPools
from narseal.storage import Index, LocalStorage

_log = logging.getLogger(__name__)
_PAGE = 1000


async def mend(
    index: Index, storage: LocalStorage, fetcher: Fetcher, policy: Policy, threads: ThreadPools
) -> None:
    """Once, at the start, in the background: so the folder is a whole binary cache again."""
    after = ""
    try:
        while page := await index.with_stored_nar(after=after, limit=_PAGE):
            without = await threads.run(_without_file, storage, page)
            for hash_part in page if policy.active else without:
                found = await index.path(hash_part)
                if found is None or found[0].withdrawn:
                    continue
                path, nar = found
                if hash_part in without:
                    await fetcher.write_narinfo(path, nar)
                elif not await policy.passes(path.info, content_digests(path.info, nar)):
                    await threads.run(storage.remove, f"{hash_part}.narinfo")
            after = page[-1]
    except NarsealError as error:
        _log.warning("not every narinfo file could be looked after: %s", error)


def _without_file(storage: LocalStorage, hash_parts: list[str]) -> set[str]:
    return {part for part in hash_parts if not storage.path(f"{part}.narinfo").exists()}
