"""Bringing NARs into storage: one transfer a file, then fsync, rename, index row."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

from narseal.errors import Malformed, NarsealError, Refused
from narseal.nix.inspection import Measured
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.nars.elsewhere import follow
from narseal.pipeline.nars.pace import Slots
from narseal.pipeline.nars.publisher import Publisher
from narseal.pipeline.nars.recompress import Recompression
from narseal.pipeline.nars.transfer import Origin, Reader, Sink, Transfer, of_nar
from narseal.pipeline.services import Services
from narseal.runtime.shared_flights import PATIENCE, Flight
from narseal.runtime.slots import aside, asker
from narseal.storage import NarRecord, file_name
from narseal.storage.folder import Incoming
from narseal.telemetry import metrics
from narseal.telemetry.rejections import reject

_log = logging.getLogger(__name__)

#: How long an upstream's file that was wrong is not asked for.
REFUSED_SECONDS = 3600.0


class Fetcher:
    """Transfers under way, by file name, and what becomes of them."""

    def __init__(self, services: Services, publisher: Publisher) -> None:
        self._config = services.config
        limits = self._config.limits
        self._folder = services.folder
        self._index = services.index
        self._shared = services.flights
        self._tasks = services.tasks
        self._threads = services.threads
        #: What puts the files where they can be seen.
        self.publisher = publisher
        self._slots = Slots(limits.transfers, least_rate=limits.least_rate)
        self._running: dict[str, Transfer] = {}

    def is_running(self, file: str) -> bool:
        """Whether a transfer of a file is under way."""
        return file in self._running

    def join(self, file: str) -> Reader | None:
        """Read along with the transfer of a file that is under way."""
        transfer = self._running.get(file)
        if transfer is None:
            return None
        metrics.flights_joined.inc()
        transfer.wanted_by(asker.get())
        return Reader(transfer)

    async def start(
        self, record: NarRecord, info: NarInfo, origins: Callable[[], AsyncIterator[Origin]]
    ) -> Reader | None:
        """Fetch the file of an admitted narinfo, or join the transfer that does.

        When it has arrived it is published, under its true file hash. None if that has
        happened since the caller looked.
        """
        flight = self._flight(record)
        if flight and not flight.begin():
            if reader := self.join(record.file):
                return reader
            if not flight.is_stuck:
                metrics.flights_joined.inc()
                with suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE):
                        is_published = partial(self._is_now, record.file)
                        return await follow(flight, self._folder, is_published)
            flight = None  # nobody knows what the other worker is at
        with ExitStack() as ends:
            if flight:
                ends.callback(flight.end)
            incoming = await self._folder.incoming()
            now = await self._index.nar(record.file)
            reader = self.join(record.file)
            if reader or now != record:
                await self._folder.discard(incoming)
                return reader
            transfer = self._transfer(info, incoming)
            self._running[record.file] = transfer
            bringing = self._bring(record, transfer, origins(), flight)
            self._tasks.start(bringing, of_nar(record.file))
            ends.pop_all()
        return Reader(transfer)

    def _flight(self, record: NarRecord) -> Flight | None:
        return self._shared.flight(of_nar(record.file)) if self._shared else None

    async def _is_now(self, file: str, descriptor: int) -> bool:
        """Whether an open file is the one that was verified and stored as a name says."""
        record = await self._index.nar(file)
        if record and record.published_as:
            record = await self._index.nar(record.published_as)
        if record is None or not record.stored:
            return False
        return await self._folder.is_published(descriptor, f"nar/{record.file}")

    async def _bring(
        self,
        record: NarRecord,
        transfer: Transfer,
        origins: AsyncIterator[Origin],
        flight: Flight | None,
    ) -> None:
        try:
            if flight:
                transfer.progress = flight.show(transfer.path.name)
                # nobody could follow it: who wants it had better fetch it himself
                if transfer.progress is None:
                    flight.end()
            measured = await transfer.run(
                origins, on_wrong=lambda wrong, error: self._wrong(record, wrong, error)
            )
            await self._publish(record, transfer, measured)
        except NarsealError as error:
            _log.warning("NAR %s: %s", record.file, error)
            if flight:
                flight.tell(error)
        finally:
            del self._running[record.file]
            try:
                await self._end(transfer)
            finally:
                if transfer.progress:
                    transfer.progress.end()
                if flight:
                    flight.end()
        if transfer.failure and transfer.released:
            await self._judge(record, transfer.info, transfer.suspects)

    async def _judge(self, record: NarRecord, info: NarInfo, suspects: list[Origin]) -> None:
        """Readers got wrong bytes that several gave: ask each alone; who has them right is taken."""
        for origin in suspects:
            if record.file in self._running:
                return
            flight = self._flight(record)
            if flight and not flight.begin():
                return
            with ExitStack() as ends:
                if flight:
                    ends.callback(flight.end)
                incoming = await self._folder.incoming()
                if record.file in self._running:  # by now
                    await self._folder.discard(incoming)
                    return
                transfer = self._transfer(info, incoming, is_awaited=True)
                self._running[record.file] = transfer
                await self._bring(record, transfer, _once(origin), flight)
            if transfer.measured:
                return

    def _transfer(
        self,
        info: NarInfo,
        incoming: Incoming,
        *,
        sink: Sink | None = None,
        scan: bool = False,
        is_awaited: bool = False,
    ) -> Transfer:
        transfer = Transfer(
            info,
            incoming=incoming,
            threads=self._threads,
            slots=self._slots,
            sink=sink,
            scan=scan,
        )
        if is_awaited:
            transfer.readers = 1  # we are
        return transfer

    async def _publish(self, record: NarRecord, transfer: Transfer, measured: Measured) -> None:
        publisher = self.publisher
        true = await publisher.named(record, measured)
        await publisher.nar((transfer.descriptor, transfer.path), record, true)
        await publisher.narinfos_of([(record, true)])

    async def fetch_first(
        self,
        info: NarInfo,
        origin: Origin,
        check: Callable[[Measured], Awaitable[None]],
        *,
        scan: bool = False,
    ) -> NarRecord:
        """Fetch, verify and publish a NAR before its path is admitted.

        `check` has the last word on it; what it raises, the NAR is not published with. With `scan`,
        it is told which references the NAR lacks.
        With recompression on, xz and bzip2 become zstd here, before anybody saw the narinfo.
        """
        incoming = await self._folder.incoming()
        recompression = None
        if self._config.storage.recompress and info.compression in ("xz", "bzip2"):
            recompression = Recompression(
                self._config.storage.recompress_level,
                await self._folder.incoming(),
            )
        transfer = self._transfer(info, incoming, sink=recompression, scan=scan, is_awaited=True)
        try:
            async with aside():
                measured = await transfer.run(_once(origin), on_wrong=_leave_to_caller)
            await check(measured)
            nar = NarRecord.of(info, origin.upstream.config.url)
            if recompression:
                measured = await self._threads.run(recompression.finish)
                incoming = recompression.descriptor, recompression.path
                nar = replace(nar, compression="zstd", url="")
            nar = replace(
                nar,
                file=file_name(measured.file_hash, nar.compression),
                file_hash=measured.file_hash,
                file_size=measured.file_size,
            )
            bound = await self._index.bind(nar)
            stored = replace(nar, file=bound.file, stored=True)
            await self.publisher.nar(incoming, bound, stored)
            return stored
        finally:
            await self._end(transfer)
            if recompression:
                await self._folder.discard((recompression.descriptor, recompression.path))

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
            await self.publisher.narinfo(hash_part)

    async def _end(self, transfer: Transfer) -> None:
        await transfer.settle()
        failure = transfer.failure
        if isinstance(failure, Refused | Malformed) and transfer.path.exists():
            label = f"{transfer.info.store_path.hash_part}.{failure.reason}"
            await self._folder.quarantine(transfer.path, label)
        await self._folder.discard((transfer.descriptor, transfer.path))


async def _leave_to_caller(_origins: set[Origin], _error: Refused | Malformed) -> None:
    """Nothing was promised to anybody yet."""


async def _once(origin: Origin) -> AsyncIterator[Origin]:
    yield origin
