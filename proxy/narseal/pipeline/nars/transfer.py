"""One NAR file on its way in: written, decoded and hashed as it comes, followed by readers.

The last block is withheld from readers until the whole was verified: nobody ever holds a
complete file that is wrong. What breaks is resumed at the same byte, from the same upstream or
the next that has the same file; what turns out wrong before a reader saw any of it starts anew
from the next one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol

from narseal.errors import (
    Malformed,
    NarsealError,
    NotFound,
    Refused,
    UpstreamTooSlow,
    UpstreamTrouble,
)
from narseal.nix.inspection import Inspection, Measured
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.nars.pace import Pace, Slots
from narseal.runtime.shared_flights import Progress
from narseal.runtime.slots import Taken
from narseal.runtime.threads import ThreadPools
from narseal.storage import storage_errors
from narseal.telemetry import metrics
from narseal.upstream import Upstream

_log = logging.getLogger(__name__)

WITHHELD = 1 << 20
_CHUNK = 1 << 19
#: Bytes of a file for which one thread is enough: each hand-over costs more than looking at them.
_SMALL = 1 << 18
_RESUMES = 16
_PAUSE = 0.2  # seconds before the same upstream is asked again


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a file can be had."""

    upstream: Upstream
    url: str


#: Told of the origins whose bytes were not what the narinfo says, before anything else happens.
OnWrong = Callable[[set[Origin], Refused | Malformed], Awaitable[None]]


class Sink(Protocol):
    """What may take the decompressed NAR beside the inspection (recompression)."""

    def feed(self, data: bytes) -> None:
        """The next bytes of the NAR."""

    def restart(self) -> None:
        """Forget what was fed."""


#: What is said to be a file's size from the time on when its upstream is asked, until more is known.
BEGUN = 1


def of_nar(file: str) -> str:
    """The name of the flight in which a file comes."""
    return f"nar {file}"


class Reader:
    """One who reads the file while it grows. To be closed."""

    #: The reader's own, good until closed whatever becomes of the transfer.
    descriptor: int

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        transfer.readers += 1
        self.descriptor = os.dup(transfer.descriptor)

    @property
    def size(self) -> int | None:
        """Of the whole file; known at the latest when `follow` first returned."""
        return self._transfer.size

    async def follow(self, beyond: int) -> int:
        """Wait until more than `beyond` bytes may be read; returns how many.

        The size itself once the whole was verified. Raises what the transfer failed with.
        """
        return await self._transfer.follow(beyond)

    async def whole(self) -> int:
        """Wait until the whole file was verified; returns its size."""
        while self._transfer.measured is None:
            await self._transfer.follow(self._transfer.released)
        return self._transfer.measured.file_size

    def close(self) -> None:
        """Let go of the file."""
        self._transfer.readers -= 1
        os.close(self.descriptor)


class _OtherSizeError(UpstreamTrouble):
    """An origin says that the file has another size than the one before said."""


class Transfer:
    """A file that grows; its readers are told how far they may go."""

    def __init__(
        self,
        info: NarInfo,
        *,
        incoming: tuple[int, Path],
        threads: ThreadPools,
        slots: Slots,
        sink: Sink | None = None,
        scan: bool = False,
    ) -> None:
        self.info = info
        self.descriptor, self.path = incoming
        #: Of the whole file, once the upstream said it.
        self.size: int | None = None
        #: Bytes from the start that readers may have.
        self.released = 0
        self.failure: NarsealError | None = None
        self.measured: Measured | None = None
        self._threads = threads
        self._sink = sink
        self._scan = scan
        self._slots = slots
        #: How many read along, or wait for the whole.
        self.readers = 0
        #: What it waits for, or has, to ask an upstream.
        self._slot: Taken | None = None
        #: Where other workers see how far it is.
        self.progress: Progress | None = None
        #: Who gave bytes since it was begun, or begun anew.
        self._sources: set[Origin] = set()
        #: Several gave bytes that together are wrong: who lied shows when each is asked alone.
        self.suspects: list[Origin] = []
        # no honest compression makes a file much larger than its NAR
        self._bound = info.nar_size + info.nar_size // 8 + 65536
        self._written = 0
        self._spent = 0.0
        self._given_up = False
        self._job: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._told = True
        self._inspection = self._inspect()
        self._news = asyncio.Event()

    async def follow(self, beyond: int) -> int:
        """See Reader.follow."""
        while self.released <= beyond and not self.measured:
            if self.failure:
                raise self.failure
            await self._news.wait()
        return self.released

    async def run(
        self,
        origins: AsyncIterator[Origin],
        *,
        on_wrong: OnWrong,
    ) -> Measured:
        """Fetch the file from the first of `origins` that has it whole and right.

        Raises what the last of them failed with.
        """
        try:
            self.measured = await self._fetch(origins, on_wrong)
            self.size = self.released = self.measured.file_size
            if self.progress:
                self.progress.advance(self.size, self.size, is_whole=True)
            return self.measured
        except NarsealError as error:
            self.failure = error
            raise
        except BaseException:
            self.failure = UpstreamTrouble("the transfer was given up")
            self._given_up = True
            raise
        finally:
            metrics.observe_verification("content", "good" if self.measured else "bad", self._spent)
            self._tell()

    async def settle(self) -> None:
        """Wait until no thread works on the file any more."""
        if self._job:
            await asyncio.wait([self._job])

    async def _fetch(
        self,
        origins: AsyncIterator[Origin],
        on_wrong: OnWrong,
    ) -> Measured:
        last: NarsealError = NotFound(f"no upstream has the NAR of {self.info.store_path}")
        async for origin in origins:
            try:
                return await self._from(origin)
            except (NotFound, UpstreamTrouble) as error:
                last = error
            except (Refused, Malformed) as error:
                last = error
                await self._blame(origin, error, on_wrong)
                if self.released:
                    break
                await self._restart()
        for origin in [] if self.released else self.suspects:
            await self._restart()
            try:
                return await self._from(origin)
            except (NotFound, UpstreamTrouble) as error:
                last = error
            except (Refused, Malformed) as error:
                last = error
                await on_wrong({origin}, error)
        raise last

    async def _blame(self, origin: Origin, error: Refused | Malformed, on_wrong: OnWrong) -> None:
        """One who gave all of the wrong bytes lied; of several, nobody knows yet who did."""
        if self._sources <= {origin}:
            await on_wrong({origin}, error)
        else:
            self._suspect(origin)

    def _suspect(self, origin: Origin) -> None:
        self.suspects += [o for o in (*self._sources, origin) if o not in self.suspects]

    async def _from(self, origin: Origin) -> Measured:
        """What is left of the file, from one origin; the whole, verified."""
        self._slot = self._slots.of(origin.upstream)
        async with self._slot:
            if self.progress and not self.released:
                self.progress.advance(BEGUN, 0)
            try:
                await self._pull_patiently(origin)
            except _OtherSizeError:
                self._suspect(origin)
                if self.released:
                    raise
                await self._restart()
                await self._pull_patiently(origin)
        return await self._finish()

    async def _pull_patiently(self, origin: Origin) -> None:
        """Pull the rest, resuming as long as the upstream still gives something."""
        fruitless = 0
        for _ in range(_RESUMES):
            before = self._written
            self._job = self._threads.run_transfer(self._pull, origin)
            try:
                return await asyncio.shield(self._job)
            except (UpstreamTooSlow, _OtherSizeError):
                raise
            except UpstreamTrouble as error:
                if self._written == self.size:
                    return None  # all was there; only the end of the line was not clean
                fruitless = 0 if self._written > before else fruitless + 1
                if fruitless > 1:
                    raise
                _log.info("resuming at byte %d: %s", self._written, error)
                await asyncio.sleep(_PAUSE)
        raise UpstreamTrouble(f"{origin.url}: broke off {_RESUMES} times")

    def _pull(self, origin: Origin) -> None:
        """In a thread: read and write, while another inspects the portion before."""
        with origin.upstream.open(origin.url, self._written) as body, self._inspecting() as inspect:
            self._agree(body.size)
            window = origin.upstream.config.stall_timeout
            pace = Pace(least=self._slots.least_rate, window=window, error=UpstreamTooSlow)
            while data := body.read(_CHUNK):
                if self._given_up:
                    raise UpstreamTrouble("the transfer was given up")
                pace.took(len(data), is_read=self._is_read)
                self._sources.add(origin)
                self._write(data)
                inspect(data)
                self._release()
        if self.size is not None and self._written != self.size:
            raise UpstreamTrouble(f"{origin.url}: ended after {self._written} of {self.size} bytes")

    def wanted_by(self, source: str) -> None:
        """Somebody else wants it, too: it need not wait behind what the first one asked for."""
        if self._slot:
            self._slot.wanted_by(source)

    @property
    def _is_read(self) -> bool:
        return self.readers > 0 or (self.progress is not None and self.progress.is_watched)

    @contextmanager
    def _inspecting(self) -> Iterator[Callable[[bytes], None]]:
        """Inspect portions one behind; at the end, whatever it is, all of them were."""
        running: Future[None] | None = None

        def inspect(data: bytes) -> None:
            nonlocal running
            if self.size is not None and self.size <= _SMALL:
                self._inspect_portion(data)
                return
            if running:
                running.result()
            running = self._threads.start(self._inspect_portion, data)

        try:
            yield inspect
        finally:
            if running:
                running.result()

    def _agree(self, size: int | None) -> None:
        if size is None and self.info.compression == "none":
            size = self.info.nar_size
        if (size or 0) > self._bound:
            raise Refused("too-large", f"{self.info.store_path}: a file of {size} bytes")
        if self._written and self.size is not None and size != self.size:
            raise _OtherSizeError(f"the file now has {size} bytes, before {self.size}")
        if not self._written:
            self.size = size

    def _write(self, data: bytes) -> None:
        if self._written + len(data) > min(self._bound, self.size or self._bound):
            raise Refused("too-large", f"{self.info.store_path}: more bytes than were announced")
        with storage_errors():
            view = memoryview(data)
            while view:
                done = len(data) - len(view)
                view = view[os.pwrite(self.descriptor, view, self._written + done) :]
        self._written += len(data)

    def _inspect_portion(self, data: bytes) -> None:
        start = perf_counter()
        self._inspection.feed(data)
        self._spent += perf_counter() - start

    def _release(self) -> None:
        """In a thread: let the readers have all but the last block."""
        if self.size is not None and self._written - self.released >= WITHHELD:
            self.released = max(self.released, min(self._written, self.size - WITHHELD))
            if self.progress:
                self.progress.advance(self.size, self.released)
            if self._told:
                self._told = False
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._told = True
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _finish(self) -> Measured:
        start = perf_counter()
        if self._written <= _SMALL:
            measured = self._inspection.finish()
        else:
            measured = await self._threads.run_transfer(self._inspection.finish)
        self._spent += perf_counter() - start
        return measured

    async def _restart(self) -> None:
        self._written = 0
        self._sources = set()
        self.size = None
        self._inspection = self._inspect()
        if self._sink:
            self._sink.restart()
        await self._threads.run(os.ftruncate, self.descriptor, 0)

    def _inspect(self) -> Inspection:
        on_plain = self._sink.feed if self._sink else None
        return Inspection(self.info, scan=self._scan, on_plain=on_plain)
