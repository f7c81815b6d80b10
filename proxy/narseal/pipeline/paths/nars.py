"""NAR files as readers get them: from storage, or while they come in."""

from __future__ import annotations

import os
from dataclasses import dataclass

from narseal.errors import Denied, NotFound
from narseal.pipeline.nars.fetcher import Fetcher
from narseal.pipeline.nars.transfer import Reader
from narseal.pipeline.paths.finder import Finder
from narseal.pipeline.services import Services
from narseal.pipeline.trust.policy import content_digests
from narseal.storage import NarRecord

_KNOWN = 20_000


@dataclass(frozen=True, slots=True)
class StoredNar:
    """A complete, verified file, open for reading. To be closed."""

    descriptor: int
    size: int

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.descriptor)


class Nars:
    """The files that admitted narinfos name. Without upstreams, only those in storage."""

    def __init__(self, services: Services, finder: Finder, fetcher: Fetcher) -> None:
        self._services = services
        self._index = services.index
        self._policy = services.policy
        self._finder = finder
        self._fetcher = fetcher
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
            if (known := self._known.pop(file, None)) and (stored := await self._open(known)):
                self._known[file] = known
                return stored
            record = await self._index.nar(file)
            if record is None:
                raise NotFound(f"no narinfo that was served names nar/{file}")
            if (stored := await self._stored(record)) is not None:
                return stored
            if not self._services.upstreams:
                raise NotFound(f"nar/{file} is not in storage")
            if (begun := await self._fetch(record)) is not None:
                return begun

    async def check(self, file: str) -> None:
        """Denied if policy keeps back every path that a NAR file is of."""
        if not self._policy.active or (record := await self._index.nar(file)) is None:
            return
        denied: Denied | None = None
        for path, nar in await self._index.paths_of(record.published_as or file):
            try:
                await self._policy.check(path.info, content_digests(path.info, nar))
            except Denied as error:
                denied = error
            else:
                return
        if denied:
            raise denied

    async def _fetch(self, record: NarRecord) -> Reader | None:
        paths = await self._index.paths_of(record.published_as or record.file)
        if not paths:
            raise NotFound(f"no narinfo names nar/{record.file} any more")
        info = paths[0][0].info
        return await self._fetcher.start(record, info, lambda: self._finder.origins(record, info))

    async def _open(self, record: NarRecord) -> StoredNar | None:
        """The file of a record, None unless it is there with its size."""
        path = self._services.folder.path(f"nar/{record.file}")
        stored = await self._services.threads.run(_open, str(path))
        if stored is None or stored.size == record.file_size:
            return stored
        stored.close()
        return None

    async def _stored(self, record: NarRecord) -> StoredNar | None:
        """The published file, if it is there and whole; a lost one is struck off the index."""
        if record.published_as:
            target = await self._index.nar(record.published_as)
            return await self._stored(target) if target else None
        if not record.stored:
            return None
        if (stored := await self._open(record)) is not None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[record.file] = record
            return stored
        await self._index.unpublish(record.file)
        if not record.url:  # recompressed here: its path has to be admitted anew
            await self._index.withdraw(record.file)
        return None


def _open(path: str) -> StoredNar | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    return StoredNar(descriptor, os.fstat(descriptor).st_size)
