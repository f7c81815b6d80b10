"""The only way for bytes to become visible: a file in the folder, and what the index says of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import replace
from itertools import islice

from narseal.errors import NarsealError, Refused
from narseal.nix.inspection import Measured
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.nars.inspect import inspect_stored
from narseal.pipeline.services import Services
from narseal.pipeline.trust.policy import content_digests
from narseal.storage import NarRecord, PathRecord, file_name
from narseal.storage.folder import Incoming
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)
_TURN = 32  # narinfos that are made before others have a turn

#: Seconds in which files gather that are published behind their answers, and how many are a group: each group
#: waits for the disk a few times, however many it has.
GATHERING = 0.05
GROUP = 64
#: Narinfo files that wait to be written, at most, and seconds between two tries.
_MOST_BEHIND = 4096
_PAUSE = 5.0


class Publisher:
    """Publishes NAR files, and narinfos beside them, so that the folder is a binary cache."""

    def __init__(self, services: Services) -> None:
        self._policy = services.policy
        self._folder = services.folder
        self._index = services.index
        self._hot = services.hot
        self._epoch = services.epoch
        self._ring = services.countersigner.ring
        self._threads = services.threads
        self._tasks = services.tasks
        #: Hash parts whose narinfo files are written behind an answer.
        self._behind: dict[str, None] = {}
        self._writing: asyncio.Task[None] | None = None
        #: Whether other rules than ours are in force by now.
        self.retired = False

    async def named(self, record: NarRecord, measured: Measured) -> NarRecord:
        """What a claimed record is in truth, once its bytes were measured; under a name that is bound."""
        known = record.file_hash in (None, measured.file_hash)
        found = replace(
            record,
            file=record.file if known else file_name(measured.file_hash, record.compression),
            file_hash=measured.file_hash,
            file_size=measured.file_size,
        )
        if not known:  # the true name, too, may have been given to another NAR by a lie
            found = replace(found, file=(await self._index.bind(found)).file)
        true = replace(found, stored=True)
        if not known or record.file_size not in (None, measured.file_size):
            metrics.corrected.inc()
            _log.warning(
                "corrected FileHash or FileSize of %s",
                record.file,
                extra={"upstream": record.upstream, "url": record.url, "file": true.file},
            )
        return true

    async def narinfos_of(self, published: Iterable[tuple[NarRecord, NarRecord]]) -> None:
        """Publish the narinfos of NARs that just were, each as it was `claimed` and as it is.

        Where that differs, they are answered anew.
        """
        hash_parts: list[str] = []
        for claimed, true in published:
            paths = await self._index.paths_of(true.file)
            found = [path.info.store_path.hash_part for path, _ in paths]
            if true != replace(claimed, stored=True):  # else the narinfo says just what it said
                for hash_part in found:
                    self._hot.drop(f"/{hash_part}.narinfo".encode())
            hash_parts += found
        await self.narinfos(hash_parts)

    async def nar(self, incoming: Incoming, claimed: NarRecord, true: NarRecord) -> None:
        """Publish verified bytes: fsync, rename, fsync of the folder, index row.

        `true` is a bound name; `claimed`, where it is another, goes on as a name of the same bytes.
        """
        await self._folder.publish(incoming, f"nar/{true.file}")
        await self._index.publish(claimed, true)

    async def small_nars(self, arrived: Sequence[tuple[bytes, NarRecord, NarRecord]]) -> None:
        """The same, in this order, of several that are in memory: bytes, `claimed`, `true`.

        When it raises, no write is under way any more.
        """
        await self._folder.write_all({f"nar/{true.file}": body for body, _, true in arrived})
        done = await asyncio.gather(
            *(self._index.publish(was, true) for _, was, true in arrived), return_exceptions=True
        )
        for failure in filter(None, done):
            raise failure

    def narinfo_behind(self, hash_part: str) -> None:
        """Have it done soon, with others, and again until it succeeds: the index says already what is served.

        A crash before that leaves a file out, which another worker writes, or the next start (`upkeep/repair.py`).
        """
        if len(self._behind) >= _MOST_BEHIND:  # whoever looks after all finds it
            self._epoch.ask_for_repair()
            return
        self._behind[hash_part] = None
        if self._writing is None:
            work = self._write_behind()  # on behalf of all
            self._writing = self._tasks.start(work, "write narinfo files", Context())

    async def _write_behind(self) -> None:
        try:
            while self._behind:
                await asyncio.sleep(GATHERING)
                group = list(islice(self._behind, GROUP))
                for hash_part in group:
                    del self._behind[hash_part]
                try:
                    await self._write_each(group)
                except Exception as error:
                    fault = None if isinstance(error, NarsealError) else error
                    _log.warning(
                        "narinfo files are not written, and will be tried again: %s",
                        error,
                        exc_info=fault,
                    )
                    self._behind |= dict.fromkeys(group)  # behind the others
                    await asyncio.sleep(_PAUSE)
        finally:
            self._writing = None

    async def _write_each(self, group: list[str]) -> None:
        """All at once; where that fails one by one, so that only what fails is left."""
        try:
            await self.narinfos(group)
        except NarsealError:
            for hash_part in list(group):
                with suppress(NarsealError):
                    await self.narinfos([hash_part])
                    group.remove(hash_part)
            if group:
                raise

    async def narinfo(self, hash_part: str) -> None:
        """Make the folder say of a path what the index and policy say now; see `narinfos`."""
        await self.narinfos([hash_part])

    async def narinfos(
        self, hash_parts: Collection[str], *, looks: bool = False, in_background: bool = False
    ) -> None:
        """Make the folder say of paths what the index and policy say now.

        A narinfo is there if it is served and its NAR is stored. What was withdrawn while the files
        were being written is taken away again. Who `looks` writes only what is not there already;
        what nobody waits for is done `in_background`: others have their turn, and all files are
        synchronised at once.
        """
        if self.retired:  # the workers with the present rules look after it
            self._epoch.ask_for_repair()
            return
        seen = None
        while seen != (mark := self._epoch.read()):
            seen = mark
            revoked = (await self._index.revocations.now()).keys
            visible: dict[str, bytes] = {}
            hidden: list[str] = []
            for number, hash_part in enumerate(hash_parts, 1):
                if in_background and not number % _TURN:
                    await asyncio.sleep(0)
                found = await self._index.path(hash_part)
                name = f"{hash_part}.narinfo"
                if found and await self._is_visible(*found, revoked):
                    info = served(*found)
                    kept = tuple(s for s in info.signatures if s.key_name not in revoked)
                    visible[name] = info.with_signatures(kept).render()
                else:
                    hidden.append(name)
            if hidden:
                await self._folder.remove_all(hidden)
            if looks and visible:
                visible = await self._folder.other_than(visible)
            if visible:
                await self._folder.write_all(visible, together=in_background)

    async def _is_visible(self, path: PathRecord, nar: NarRecord, revoked: frozenset[str]) -> bool:
        if path.withdrawn or not nar.stored:
            return False
        ring = self._ring.without(revoked)
        if not path.ours - revoked and not ring.signer(path.message, path.signatures):
            return False  # it waits for a signature of ours
        return await self._policy.passes(path.info, content_digests(path.info, nar))

    async def verify_stored(self, info: NarInfo, nar: NarRecord) -> None:
        """Hash a path's file in storage again; Refused or Malformed if it is not what it was."""
        if not nar.stored:
            raise Refused("unsigned", f"{info.store_path}: its content is not in storage")
        found = replace(info, compression=nar.compression)
        measured = await self._threads.run_transfer(
            inspect_stored, found, self._folder.local, nar.file
        )
        if measured.file_hash != nar.file_hash:
            raise Refused("content-mismatch", f"nar/{nar.file}: its hash is {measured.file_hash}")


def served(path: PathRecord, nar: NarRecord) -> NarInfo:
    """The narinfo as clients get it: our URL, our measured values, all signatures."""
    return replace(
        path.info,
        url=f"nar/{nar.file}",
        compression=nar.compression,
        file_hash=nar.file_hash,
        file_size=nar.file_size,
    )
