"""Reading along with a transfer of another worker: its file is in the folder of both, how far it is in their memory.

How much may be read is decided by the transfer alone, which verifies; here nothing is.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from time import monotonic

from narseal.errors import UpstreamTrouble
from narseal.pipeline.nars.transfer import BEGUN, Reader
from narseal.runtime.board import Shown
from narseal.runtime.files import OpenFile
from narseal.runtime.shared_flights import Flight, moment
from narseal.storage import Folder

#: Whether an open file is the one that was published.
IsPublished = Callable[[int], Awaitable[bool]]


#: Seconds for which what is verified already, and in no file, is waited for; and for a transfer to begin, which waits
#: behind others of its first client.
_FOR_A_DISK = 10.0
_FOR_A_SLOT = 1.0


class GoneError(UpstreamTrouble):
    """The other worker was killed or stopped, or gave the transfer up."""


class FarReader(Reader):
    """One who reads the file that another worker brings. To be closed."""

    def __init__(
        self, flight: Flight, shown: Shown, file: OpenFile, is_published: IsPublished
    ) -> None:
        self._file: OpenFile | None = file
        self.descriptor = file.descriptor
        self._flight = flight
        self._shown = shown
        self._is_published = is_published
        self._began = monotonic()
        self._size: int | None = None
        self._ends = ExitStack()
        self._watched = self._ends.enter_context(flight.watching())

    @property
    def size(self) -> int | None:
        """See Reader.size."""
        return self._size

    async def follow(self, beyond: int) -> int:
        """See Reader.follow."""
        released, _ = await self._until(lambda released, is_whole: released > beyond or is_whole)
        return released

    async def whole(self) -> int:
        """See Reader.whole."""
        released, _ = await self._until(lambda _, is_whole: is_whole)
        return released

    def close(self) -> None:
        """Let go of the file."""
        self._ends.close()
        self._file = None

    async def _until(self, enough: Callable[[int, bool], bool]) -> tuple[int, bool]:
        """How much may be read, and whether that is the whole, once it is enough."""
        while True:
            news = self._watched.news
            said = self._shown.look()
            if said is None or self._flight.holder != self._shown.by:
                return await self._whole_if_published()
            size, released, is_whole = said
            if released:
                self._size = size
            if enough(released, is_whole):
                return released, is_whole
            if self._flight.is_stuck:
                raise GoneError("the worker that fetched it does nothing any more; ask again")
            await moment(news)

    async def _whole_if_published(self) -> tuple[int, bool]:
        """Nothing is said of it any more: it was published, or it failed."""
        if await self._is_published(self.descriptor):
            self._size = os.fstat(self.descriptor).st_size
            return self._size, True
        self._flight.check(self._began)
        raise GoneError("the worker that fetched it ended without it; ask again, and see the log")


async def follow(flight: Flight, folder: Folder, is_published: IsPublished) -> FarReader | None:
    """Read along with whoever brings a file, from its first bytes on; None if nobody does any more.

    Raises what the transfer failed with meanwhile; TimeoutError if it waits for its disk, in no file, or for a slot.
    """
    began = since = monotonic()
    waits_for = None
    with flight.watching() as watched:
        while flight.holder and not flight.is_stuck:
            news = watched.news
            shown = flight.shown()
            if shown and not _is_coming(shown):
                place = (shown.by, shown.name)
                if place != waits_for:  # the first, or who goes on for one that was killed
                    waits_for, since = place, monotonic()
                if monotonic() > since + (_FOR_A_DISK if shown.is_body else _FOR_A_SLOT):
                    raise TimeoutError
                await moment(news)
                continue
            file = await folder.open_incoming(shown.name) if shown else None
            if shown and file:
                reader = FarReader(flight, shown, file, is_published)
                with ExitStack() as closing:
                    closing.callback(reader.close)
                    try:
                        await reader.follow(0)
                    except GoneError:
                        continue
                    closing.pop_all()
                    return reader
            await moment(news)
    flight.check(began)
    return None


def _is_coming(shown: Shown) -> bool:
    """Whether a file has begun to come, or has come."""
    said = shown.look()
    return not shown.is_body and (said is None or said[0] >= BEGUN)
