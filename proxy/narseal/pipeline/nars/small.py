"""Small NARs: fetched whole, held to everything in memory, answered, and published behind that in groups.

A path that an upstream has can be fetched again: so its bytes need not be on disk when they are answered.
The index says that they are stored only when they are (`Publisher.small_nars`).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from contextvars import Context
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from time import perf_counter

from narseal.errors import NarsealError, Unavailable
from narseal.nix.inspection import Measured, inspect_file
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.nars.publisher import GATHERING, GROUP, Publisher
from narseal.pipeline.nars.transfer import Origin, of_nar
from narseal.pipeline.services import Services
from narseal.runtime.budget import Budget, Claim
from narseal.runtime.shared_flights import Flight, Progress
from narseal.runtime.single_flight import SingleFlight
from narseal.storage import NarRecord
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)

#: Bytes of a file, and of its NAR, that are fetched like this.
_MOST = 256 << 10
_MOST_PLAIN = 4 << 20
#: Bytes of a NAR that is decoded and hashed on the loop, since a thread would cost more.
_ON_LOOP = 256 << 10
#: Bytes of files that are on their way or wait to be published, in all and of each upstream, and what each
#: takes beside its bytes. For what finds no room there are transfers, which wait for the disk.
_ROOM = 32 << 20
_ROOM_OF_EACH = 16 << 20
_BESIDE = 16 << 10
#: Seconds for which another worker is waited for: it may have answered already, and wait for a disk that hangs.
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A file that was found to be right, and its room in memory."""

    body: bytes
    record: NarRecord
    measured: Measured
    room: Claim
    #: Until it is published, the other workers wait for it.
    flight: Flight | None
    handed: Progress | None


class SmallNars:
    """Those that are on their way, and those that wait to be published.

    Only what goes well is done here: whatever else there is to say of an upstream's file, that it is wrong,
    broken off, slow or not there, a transfer finds out and deals with.
    """

    def __init__(self, services: Services, publisher: Publisher) -> None:
        self._tasks = services.tasks
        self._threads = services.threads
        self._index = services.index
        self._shared = services.flights
        self._hot = services.hot
        self._room = Budget(_ROOM, each=_ROOM_OF_EACH)
        self._publisher = publisher
        self._flights: SingleFlight[str, bytes | None] = SingleFlight(
            services.tasks, on_joined=metrics.flights_joined.inc
        )
        #: By the file's claimed name, in the order in which they came.
        self._arrived: dict[str, _Arrived] = {}
        self._publishing: asyncio.Task[None] | None = None

    def waiting(self, file: str) -> bytes | None:
        """A file that waits to be published, whole and verified."""
        arrived = self._arrived.get(file)
        return arrived.body if arrived else None

    async def fetch(self, record: NarRecord, info: NarInfo, origin: Origin) -> bytes | None:
        """A small file, which is not stored; None if it takes a transfer, or is stored by now."""
        return await self._flights.join(record.file, lambda: self._bring(record, info, origin))

    async def _bring(self, record: NarRecord, info: NarInfo, origin: Origin) -> bytes | None:
        if (waiting := self.waiting(record.file)) is not None:  # since the caller looked
            return waiting
        if self._shared is None:
            return await self._brought(record, info, origin, None)
        flight = self._shared.flight(of_nar(record.file))
        while not flight.begin():
            try:
                if (body := await flight.handed(patience=_PATIENCE)) is not None:
                    return body
            except TimeoutError:
                return await self._brought(record, info, origin, None)
            if flight.shown():  # it comes in a file
                return None
        return await self._brought(record, info, origin, flight)

    async def _brought(
        self, record: NarRecord, info: NarInfo, origin: Origin, flight: Flight | None
    ) -> bytes | None:
        with ExitStack() as rooms:
            if flight:
                rooms.callback(flight.end)
            if await self._index.nar(record.file) != record:
                return None
            room = rooms.enter_context(self._room.claim(origin.upstream.config.url))
            try:
                room.take((record.file_size or 0) + _BESIDE)
                found = await self._fetched(record, info, origin)
            except NarsealError as error:
                level = logging.DEBUG if isinstance(error, Unavailable) else logging.INFO
                _log.log(level, "nar/%s: a transfer is tried next: %s", record.file, error)
                return None
            if found is None:
                return None
            body, measured = found
            handed = flight.hand(body) if flight else None
            self._arrived[record.file] = _Arrived(body, record, measured, room, flight, handed)
            rooms.pop_all()  # they are kept until the file is published
        if self._publishing is None:
            work = self._publish_all()  # on behalf of all who ask
            self._publishing = self._tasks.start(work, "publish small NARs", Context())
        return body

    async def _fetched(
        self, record: NarRecord, info: NarInfo, origin: Origin
    ) -> tuple[bytes, Measured] | None:
        """Its bytes, and what they are; None if they are not there."""
        body = await origin.upstream.fetch(origin.url, limit=record.file_size or 0)
        if body is None:
            return None
        start = perf_counter()
        if record.nar_size <= _ON_LOOP:
            measured = inspect_file(info, BytesIO(body))
        else:
            measured = await self._threads.run(inspect_file, info, BytesIO(body))
        metrics.observe_verification("content", "good", perf_counter() - start)
        return body, measured

    async def _publish_all(self) -> None:
        try:
            while self._arrived:
                if len(self._arrived) < GROUP:
                    await asyncio.sleep(GATHERING)
                group = list(islice(self._arrived.values(), GROUP))
                try:
                    await self._publish(group)
                except Exception as error:
                    fault = None if isinstance(error, NarsealError) else error
                    _log.warning("small NARs are not kept: %s", error, exc_info=fault)
                    for arrived in group:  # they are brought again when they are asked for
                        self._hot.drop(f"/nar/{arrived.record.file}".encode())
                finally:
                    for arrived in group:
                        del self._arrived[arrived.record.file]
                        arrived.room.release()
                        if arrived.handed:
                            arrived.handed.end()
                        if arrived.flight:
                            arrived.flight.end()
        finally:
            self._publishing = None

    async def _publish(self, group: list[_Arrived]) -> None:
        publisher = self._publisher
        arrived = [
            (each.body, each.record, await publisher.named(each.record, each.measured))
            for each in group
        ]
        try:
            await publisher.small_nars(arrived)
        finally:  # some may be stored though others could not be
            await publisher.narinfos_of((claimed, true) for _, claimed, true in arrived)


def is_small(record: NarRecord) -> bool:
    """Whether a file is one of those, by what its narinfo says."""
    size = record.file_size or 0
    return not record.published_as and 0 < size <= _MOST and record.nar_size <= _MOST_PLAIN
