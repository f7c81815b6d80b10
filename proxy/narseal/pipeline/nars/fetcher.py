"""Bringing NARs into storage: one transfer a file, then fsync, rename, index row."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

from narseal.config import Config
from narseal.errors import Malformed, NarsealError, Refused
from narseal.nix.inspection import Measured
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.caches import HotMap
from narseal.pipeline.nars.inspect import inspect_stored
from narseal.pipeline.nars.recompress import Recompression
from narseal.pipeline.nars.transfer import Origin, Reader, Transfer
from narseal.pipeline.trust.policy import Policy, content_digests
from narseal.runtime.tasks import BackgroundTasks
from narseal.runtime.threads import ThreadPools
from narseal.storage import Epoch, Index, LocalStorage, NarRecord, PathRecord, file_name
from narseal.telemetry import metrics
from narseal.telemetry.rejections import reject

_log = logging.getLogger(__name__)

#: How long an upstream's file that was wrong is not asked for.
REFUSED_SECONDS = 3600.0


class Fetcher:
    """Transfers under way, by file name, and what becomes of them."""

    def __init__(
        self,
        config: Config,
        *,
        storage: LocalStorage,
        index: Index,
        epoch: Epoch,
        hot: HotMap,
        tasks: BackgroundTasks,
        threads: ThreadPools,
        policy: Policy,
    ) -> None:
        self._config = config
        self._policy = policy
        self._storage = storage
        self._index = index
        self._epoch = epoch
        self._hot = hot
        self._tasks = tasks
        self._threads = threads
        self._slots = asyncio.Semaphore(config.limits.transfers)
        self._running: dict[str, Transfer] = {}

    def join(self, file: str) -> Reader | None:
        """Read along with the transfer of a file that is under way."""
        transfer = self._running.get(file)
        if transfer is None:
            return None
        metrics.flights_joined.inc()
        return Reader(transfer)

    async def start(
        self, record: NarRecord, info: NarInfo, origins: Callable[[], AsyncIterator[Origin]]
    ) -> Reader | None:
        """Fetch the file of an admitted narinfo, or join the transfer that does.

        When it has arrived it is published, under its true file hash. None if that has
        happened since the caller looked.
        """
        incoming = await self._threads.run(self._storage.incoming)
        now = await self._index.nar(record.file)
        reader = self.join(record.file)
        if reader or now != record:
            await self._threads.run(self._storage.discard, incoming)
            return reader
        transfer = Transfer(info, incoming=incoming, threads=self._threads)
        self._running[record.file] = transfer
        self._tasks.start(self._bring(record, transfer, origins()), f"nar {record.file}")
        return Reader(transfer)

    async def _bring(
        self, record: NarRecord, transfer: Transfer, origins: AsyncIterator[Origin]
    ) -> None:
        try:
            async with self._slots:
                measured = await transfer.run(
                    origins, on_wrong=lambda wrong, error: self._wrong(record, wrong, error)
                )
            await self._publish(record, transfer, measured)
        except NarsealError as error:
            _log.warning("NAR %s: %s", record.file, error)
        finally:
            del self._running[record.file]
            await self._end(transfer)

    async def _publish(self, record: NarRecord, transfer: Transfer, measured: Measured) -> None:
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
        await self._threads.run(
            self._storage.publish, transfer.descriptor, transfer.path, f"nar/{true.file}"
        )
        await self._index.publish(record, true)
        for path, nar in await self._index.paths_of(true.file):
            await self.write_narinfo(path, nar)
            if true != replace(record, stored=True):  # else the narinfo says just what it said
                self._hot.drop(f"/{path.info.store_path.hash_part}.narinfo".encode())
        if not known:
            self._epoch.advance()

    async def fetch_first(
        self, info: NarInfo, origin: Origin, check: Callable[[Measured], Awaitable[None]]
    ) -> NarRecord:
        """Fetch, verify and publish a NAR before its path is admitted.

        `check` has the last word on it; what it raises, the NAR is not published with.
        With recompression on, xz and bzip2 become zstd here, before anybody saw the narinfo.
        """
        incoming = await self._threads.run(self._storage.incoming)
        recompression = None
        if self._config.storage.recompress and info.compression in ("xz", "bzip2"):
            recompression = Recompression(
                self._config.storage.recompress_level,
                await self._threads.run(self._storage.incoming),
            )
        transfer = Transfer(info, incoming=incoming, threads=self._threads, sink=recompression)
        try:
            async with self._slots:
                measured = await transfer.run(_once(origin), on_wrong=_leave_to_caller)
            await check(measured)
            nar = NarRecord.of(info, origin.upstream.config.url)
            descriptor, path = incoming
            if recompression:
                measured = await self._threads.run(recompression.finish)
                descriptor, path = recompression.descriptor, recompression.path
                nar = replace(nar, compression="zstd", url="")
            nar = replace(
                nar,
                file=file_name(measured.file_hash, nar.compression),
                file_hash=measured.file_hash,
                file_size=measured.file_size,
            )
            bound = await self._index.bind(nar)
            await self._threads.run(self._storage.publish, descriptor, path, f"nar/{bound.file}")
            stored = replace(nar, file=bound.file, stored=True)
            await self._index.publish(bound, stored)
            return stored
        finally:
            await self._end(transfer)
            if recompression:
                await self._threads.run(
                    self._storage.discard, (recompression.descriptor, recompression.path)
                )

    async def _wrong(
        self, record: NarRecord, origins: set[Origin], error: Refused | Malformed
    ) -> None:
        """An upstream's bytes were wrong: count, log, refuse them for a time, withdraw the paths."""
        for origin in origins:
            upstream = origin.upstream.config.url
            reject(error, upstream=upstream, thing=f"nar/{record.file}")
            await self._index.refuse(
                upstream, origin.url, record.nar_hash, error.reason, for_seconds=REFUSED_SECONDS
            )
        for hash_part in await self._index.withdraw(record.file):
            await self._threads.run(self._storage.remove, f"{hash_part}.narinfo")
        self._epoch.advance()

    async def write_narinfo(self, path: PathRecord, nar: NarRecord) -> None:
        """Put a path's narinfo beside its stored NAR, so that the folder is a binary cache.

        Not that of a path that policy keeps back.
        """
        if not await self._policy.passes(path.info, content_digests(path.info, nar)):
            return
        text = served(path, nar).render()
        name = f"{path.info.store_path.hash_part}.narinfo"
        await self._threads.run(self._storage.write, name, text)

    async def remove_narinfo(self, info: NarInfo) -> None:
        """Take a path's narinfo out of the folder."""
        name = f"{info.store_path.hash_part}.narinfo"
        await self._threads.run(self._storage.remove, name)

    async def verify_stored(self, info: NarInfo, nar: NarRecord) -> None:
        """Hash a path's file in storage again; Refused or Malformed if it is not what it was."""
        if not nar.stored:
            raise Refused("unsigned", f"{info.store_path}: its content is not in storage")
        path = self._storage.path(f"nar/{nar.file}")
        found = replace(info, compression=nar.compression)
        measured = await self._threads.run_transfer(inspect_stored, found, path)
        if measured.file_hash != nar.file_hash:
            raise Refused("content-mismatch", f"nar/{nar.file}: its hash is {measured.file_hash}")

    async def _end(self, transfer: Transfer) -> None:
        await transfer.settle()
        failure = transfer.failure
        if isinstance(failure, Refused | Malformed) and transfer.path.exists():
            label = f"{transfer.info.store_path.hash_part}.{failure.reason}"
            await self._threads.run(self._storage.quarantine, transfer.path, label)
        await self._threads.run(self._storage.discard, (transfer.descriptor, transfer.path))


def served(path: PathRecord, nar: NarRecord) -> NarInfo:
    """The narinfo as clients get it: our URL, our measured values, all signatures."""
    return replace(
        path.info,
        url=f"nar/{nar.file}",
        compression=nar.compression,
        file_hash=nar.file_hash,
        file_size=nar.file_size,
    )


async def _leave_to_caller(_origins: set[Origin], _error: Refused | Malformed) -> None:
    """Nothing was promised to anybody yet."""


async def _once(origin: Origin) -> AsyncIterator[Origin]:
    yield origin
