"""NAR files as readers get them: from storage, or while they come in."""

from __future__ import annotations

from contextlib import suppress

from narseal.errors import NotFound, StorageBroken
from narseal.pipeline.nars.fetcher import Fetcher
from narseal.pipeline.nars.small import SmallNars, is_small
from narseal.pipeline.nars.stored import StoredFiles, StoredNar
from narseal.pipeline.nars.transfer import Reader
from narseal.pipeline.paths.finder import Finder
from narseal.pipeline.services import Services
from narseal.storage import NarRecord

_KNOWN = 20_000


class Nars:
    """The files that admitted narinfos name. Without upstreams, only those in storage."""

    def __init__(
        self, services: Services, finder: Finder, fetcher: Fetcher, small: SmallNars
    ) -> None:
        self._services = services
        self._index = services.index
        self._policy = services.policy
        self._finder = finder
        self._fetcher = fetcher
        self._small = small
        self._files = StoredFiles(services, fetcher.publisher)
        #: Stored files, so that one that is asked for again costs no question to the index.
        self._known: dict[str, NarRecord] = {}

    async def get(self, file: str) -> StoredNar | Reader:
        """The file of an admitted narinfo: from storage, or while it is being fetched.

        NotFound for a name that no admitted narinfo mentions; Denied if policy keeps back every
        path that it is of.
        """
        self._index.presence.check()
        await self.check(file)
        while True:
            if self._services.upstreams and (reader := self._fetcher.join(file)) is not None:
                return reader
            if (known := await self._opened_before(file)) is not None:
                return known
            record = await self._index.nar(file)
            if record is None:
                raise _unnamed(file)
            if (stored := await self._stored(record)) is not None:
                return stored
            if not self._services.upstreams:
                raise NotFound(f"nar/{file} is not in storage")
            if (begun := await self._fetch(record)) is not None:
                return begun

    async def small(self, file: str) -> bytes | None:
        """A small file that is not in storage yet, whole and verified; None if `get` is to give it.

        Raises as `get` does.
        """
        self._index.presence.check()
        await self.check(file)
        if (waiting := self._small.waiting(file)) is not None:
            return waiting
        if file in self._known or self._fetcher.is_running(file):
            return None
        record = await self._index.nar(file)
        if record is None:
            raise _unnamed(file)
        if record.stored or not is_small(record) or not self._services.upstreams:
            return None
        mark = self._services.epoch.read()
        found = await self._index.path_of(file)
        origin = await self._finder.own_origin(record)
        if found is None or origin is None:
            return None
        body = await self._small.fetch(record, found[0].info, origin)
        if body is not None and mark != self._services.epoch.read():
            await self.check(file)
        return body

    async def bring(self, file: str) -> bool:
        """Bring a small file, if it is not here or on its way; whether it was brought. Raises as `get` does."""
        if self._small.waiting(file) is not None:
            return False
        return await self.small(file) is not None

    async def check(self, file: str) -> None:
        """Denied if policy keeps back every path that a NAR file is of."""
        if not self._policy.active or (record := await self._index.nar(file)) is None:
            return
        await self._policy.check_any(await self._index.paths_of(record.published_as or file))

    async def distrust(self, file: str, error: StorageBroken) -> None:
        """Strike off a file that could not be read, unless it is an only copy that can be now."""
        record = await self._index.nar(file)
        if record and record.published_as:
            record = await self._index.nar(record.published_as)
        if record is None or not record.stored:
            self._files.note(f"nar/{file}", error)
            return
        self._known.pop(record.file, None)
        if not record.url:  # one fault of reading condemns nothing that nobody else has
            try:
                await self._files.verify(record)
            except StorageBroken as again:
                error = again
            else:
                self._files.note(f"nar/{file}", error)
                return
        await self._files.strike(record, error)

    async def _fetch(self, record: NarRecord) -> Reader | None:
        found = await self._index.path_of(record.published_as or record.file)
        if found is None:
            raise NotFound(f"no narinfo names nar/{record.file} any more")
        info = found[0].info
        return await self._fetcher.start(record, info, lambda: self._finder.origins(record, info))

    async def _opened_before(self, file: str) -> StoredNar | None:
        """A stored file that costs no question to the index, unless it is to be looked at."""
        known = self._known.pop(file, None)
        if known is None or self._files.is_old(known):
            return None
        with suppress(StorageBroken):  # the index's own record is held to the file next
            if (stored := await self._files.open(known)) is not None:
                self._known[file] = known
                return stored
        return None

    async def _stored(self, record: NarRecord) -> StoredNar | None:
        """The published file, if it is there and whole; a lost one is struck off the index."""
        if record.published_as:
            target = await self._index.nar(record.published_as)
            return await self._stored(target) if target else None
        if not record.stored:
            return None
        try:
            stored, broken = await self._files.open(record), None
        except StorageBroken as error:
            stored, broken = None, error
        if stored is None:
            await self._files.strike(record, broken)
            return None
        if len(self._known) >= _KNOWN:
            self._known.clear()
        self._known[record.file] = record
        return stored


def _unnamed(file: str) -> NotFound:
    return NotFound(f"no narinfo that was served names nar/{file}")
