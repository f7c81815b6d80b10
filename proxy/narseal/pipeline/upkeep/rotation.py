"""Signing everything that is admitted with the keys that came later, in the background."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from narseal.errors import Denied, NarsealError, Unavailable
from narseal.nix.store_path import is_hash_part
from narseal.pipeline.paths.renewal import Renewal
from narseal.pipeline.services import Services
from narseal.runtime.files import sync_folder
from narseal.storage import Admitted, index_file
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)
_PAGE = 256
#: Paths that are published together, and the part of a second that they may stand for.
_GROUP = 256
_MOMENT = 0.25
_LOOK = 5.0  # seconds between two looks for work


class Rotation:
    """One worker of all does it, at a bounded rate; readers meanwhile sign what they ask for."""

    def __init__(self, services: Services, renewal: Renewal) -> None:
        self._index = services.index
        self._countersigner = services.countersigner
        self._leadership = partial(services.leadership, "rotation")
        self._rate = services.config.signing.resign_rate
        self._group = min(_GROUP, max(1, int(self._rate * _MOMENT)))
        self._renewal = renewal
        self._threads = services.threads
        #: Which paths are being signed: the index may say so already, and their narinfos not yet.
        self._noted = index_file(services.config.storage.index).with_suffix(".rotation")

    async def run(self) -> None:
        """Until cancelled: whenever keys become active, sign what lacks their signatures."""
        with closing(self._leadership()) as leadership:
            await leadership.lead()
            await self._follow_keys()

    async def _follow_keys(self) -> None:
        done: frozenset[str] = frozenset()
        while True:
            try:
                await self._finish()
                names = frozenset(k.public.name for k in await self._countersigner.active())
                if names and names != done:
                    await self.sign_all(names)
                    done = names
            except Unavailable as error:
                _log.warning("signing with new keys waits: %s", error)
            await asyncio.sleep(_LOOK)

    async def sign_all(self, names: frozenset[str]) -> None:
        """Once: everything that lacks a signature by one of some keys, as far as it may have it."""
        await self._sign_paths(names)
        await self._sign_realisations(names)

    async def _sign_paths(self, names: frozenset[str]) -> None:
        if not await self._told(names):
            return
        await self._sign_pages(names)
        await self._threads.run(_forget, self._noted)

    async def _sign_pages(self, names: frozenset[str]) -> None:
        async for page in self._index.lacking(names):
            for at in range(0, len(page), self._group):
                group = page[at : at + self._group]
                await self._paced(len(group), self._renew_paths(group))
                if not await self._told(names, is_first=False):
                    return

    async def _renew_paths(self, group: Sequence[Admitted]) -> list[NarsealError | None]:
        keys = [path.info.store_path.hash_part for path, _ in group]
        await self._threads.run(_note, self._noted, keys)
        return await self._renewal.renew_paths(group)

    async def _finish(self) -> None:
        """Show what a rotation signed that died before it had published it."""
        if keys := await self._threads.run(_noted_in, self._noted):
            await self._renewal.show(keys)
            await self._threads.run(_forget, self._noted)

    async def _sign_realisations(self, names: frozenset[str]) -> None:
        claims = self._index.realisations
        if not await claims.count_lacking(names):
            return
        after = ""
        while page := await claims.lacking(names, after=after, limit=_PAGE):
            for key in page:
                await self._paced(1, self._renew_realisation(key))
            after = page[-1]

    async def _renew_realisation(self, key: str) -> list[NarsealError | None]:
        try:
            await self._renewal.renew_realisation(key)
        except Unavailable:
            raise
        except NarsealError as error:
            return [error]
        return [None]

    async def _told(self, names: frozenset[str], *, is_first: bool = True) -> int:
        """How many paths lack signatures, as the metric says from now on."""
        waiting = await self._index.paths.count_lacking(names)
        metrics.resign_waiting.set(waiting)
        if waiting and is_first:
            _log.info("signing %d with keys that came later", waiting)
        return waiting

    async def _paced(
        self, count: int, work: Coroutine[Any, Any, list[NarsealError | None]]
    ) -> None:
        """Sign so many, and rest until the rate lets the next ones be signed."""
        start = time.monotonic()
        _count(await work)
        await asyncio.sleep(max(0.0, count / self._rate - (time.monotonic() - start)))


def _note(file: Path, keys: Sequence[str]) -> None:
    """Have a list on disk, under its name."""
    with _beside_index():
        with file.open("w") as opened:
            opened.write("".join(f"{key}\n" for key in keys))
            opened.flush()
            os.fsync(opened.fileno())
        sync_folder(file.parent)


def _noted_in(file: Path) -> list[str]:
    """What of it is there, and can be read."""
    with _beside_index():
        try:
            text = file.read_text("ascii", "replace")
        except FileNotFoundError:
            return []
        return [line for line in text.splitlines() if is_hash_part(line)]


def _forget(file: Path) -> None:
    with _beside_index():
        file.unlink(missing_ok=True)


@contextmanager
def _beside_index() -> Iterator[None]:
    """Unavailable if a file of ours beside the index, not in the storage folder, fails."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"the folder of storage.index fails: {error}; see to that disk"
        ) from error


def _count(outcomes: Iterable[NarsealError | None]) -> None:
    for error in outcomes:
        if error is None:
            metrics.resigned.labels("signed").inc()
        elif isinstance(error, Denied):
            metrics.resigned.labels("kept-back").inc()
        else:
            metrics.resigned.labels("refused").inc()
            _log.warning("not signed anew: %s", error)
