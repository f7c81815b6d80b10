"""NAR files in storage: opened for readers, hashed again in time, struck off when they are wrong."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from narseal.errors import StorageBroken
from narseal.pipeline.nars.publisher import Publisher
from narseal.pipeline.services import Services
from narseal.runtime.single_flight import SingleFlight
from narseal.storage import NarRecord, storage_errors
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)
_PIECE = 4 << 20

#: Told of each number of bytes that was hashed; it may wait.
Pace = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class StoredNar:
    """A complete file, open for reading. To be closed."""

    descriptor: int
    size: int

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.descriptor)


class StoredFiles:
    """The files below nar/. What is found wrong is not served again."""

    def __init__(self, services: Services, publisher: Publisher) -> None:
        self._folder = services.folder
        self._index = services.index
        self._threads = services.threads
        self._publisher = publisher
        self._reverify_after = services.config.storage.reverify_after
        self._hashing: SingleFlight[str, None] = SingleFlight(
            services.tasks, on_joined=metrics.flights_joined.inc
        )

    async def open(self, record: NarRecord) -> StoredNar | None:
        """The file of a record that says it is stored; None if it is not there.

        One that was not hashed for `storage.reverify_after` is hashed first. StorageBroken if it
        cannot be read or is not what was verified.
        """
        name = f"nar/{record.file}"
        descriptor = await self._threads.run(self._folder.local.open, name)
        if descriptor is None:
            return None
        stored = StoredNar(descriptor, os.fstat(descriptor).st_size)
        try:
            if stored.size != record.file_size:
                raise StorageBroken(
                    "wrong-content", f"{name} has {stored.size} bytes, not {record.file_size}"
                )
            if self.is_old(record):
                await self._hashing.join(record.file, lambda: self.verify(record))
        except BaseException:
            stored.close()
            raise
        return stored

    def is_old(self, record: NarRecord, share: float = 1.0) -> bool:
        """Whether a file was not hashed for `storage.reverify_after`, or a share of that."""
        age = time.time() - (record.verified_at or 0.0)
        return age > self._reverify_after * share or age < 0

    async def verify(self, record: NarRecord, pace: Pace | None = None) -> None:
        """Hash a stored file again; StorageBroken if it is not what was verified."""
        name = f"nar/{record.file}"
        descriptor = await self._threads.run(self._folder.local.open, name)
        if descriptor is None:
            raise StorageBroken("wrong-content", f"{name} is not there")
        try:
            digest, size = hashlib.sha256(), 0
            while piece := await self._threads.run_transfer(_hash_piece, digest, descriptor, size):
                size += piece
                if pace:
                    await pace(piece)
        finally:
            os.close(descriptor)
        if record.file_hash is None or digest.digest() != record.file_hash.digest:
            raise StorageBroken("wrong-content", f"{name} has other content than was verified")
        if self.is_old(record, share=0.1):  # not one transaction a file in every round
            await self._index.verified(record.file, time.time())

    async def strike(self, record: NarRecord, error: StorageBroken | None) -> bool:
        """Strike a file off the index: it is fetched again when it is asked for.

        It goes into quarantine. What came from no upstream is withdrawn. Without an `error` it
        just was not there. False if it was published, hashed or struck off since `record` was
        read: that file is another one. StorageGone if the folder is not the index's: that says
        nothing of the file.
        """
        await self._folder.check()
        now = await self._index.nar(record.file)
        if now != record or now.verified_at != record.verified_at:
            return False
        name = f"nar/{record.file}"
        self.note(name, error or StorageBroken("wrong-content", f"{name} is not there"))
        await self._folder.quarantine(self._folder.path(name), record.file)
        await self._index.unpublish(record.file)
        if not record.url:
            await self._withdraw(record)
        for path, _ in await self._index.paths_of(record.file):
            await self._publisher.narinfo(path.info.store_path.hash_part)
        return True

    def note(self, name: str, error: StorageBroken) -> None:
        """Count and log a fault of a stored file."""
        metrics.storage_errors.labels(error.kind).inc()
        _log.error("stored %s: %s", name, error, extra={"object": name, "kind": error.kind})

    async def _withdraw(self, record: NarRecord) -> None:
        """No upstream has just this file: its path is asked for anew, and may be gone."""
        for path, _ in await self._index.paths_of(record.file):
            if path.evidence.startswith(("upload ", "folder ")):
                self.lost(str(path.info.store_path), f"nar/{record.file} was its only copy here")
        await self._index.withdraw(record.file)

    def lost(self, what: str, why: str) -> None:
        """Say that content is lost, unless somebody brings it again."""
        metrics.storage_errors.labels("lost").inc()
        text = "%s is lost unless an upstream has it or it is uploaded again: %s"
        _log.error(text, what, why, extra={"object": what})


def _hash_piece(digest: hashlib._Hash, descriptor: int, start: int) -> int:
    """Hash one piece from `start` on; returns its size, 0 at the end."""
    with storage_errors():
        piece = os.pread(descriptor, _PIECE, start)
    digest.update(piece)
    return len(piece)
