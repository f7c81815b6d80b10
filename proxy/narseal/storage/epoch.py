"""A number shared by all workers of a machine, that changes when something was withdrawn.

It is eight bytes of a mapped file: reading it costs no system call, so that the hot path can
look at it before every answer.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self, TypeVar

from narseal.errors import Unavailable
from narseal.storage.marks import read_mark
from narseal.storage.presence import Presence, epoch_file, index_file

T = TypeVar("T")
_TRIES = 8


class Epoch:
    """The shared number in `file`, beside the index that it is of."""

    def __init__(self, file: Path, index: Path) -> None:
        """ConfigError if there is no index: `migrate` makes one."""
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            self._map = mmap.mmap(descriptor, mmap.PAGESIZE)
        finally:
            os.close(descriptor)
        #: Whether both files are still those that all workers share.
        self.presence = Presence(index, file)
        #: What the storage folder of this index bears; empty, which none bears, if it was not joined.
        self.mark = read_mark(index).joined or ""
        #: The number, in a view that costs no call to look at.
        self.cell = memoryview(self._map).cast("Q")

    @classmethod
    def of(cls, url: str) -> Self:
        """That of the index at `url`, which must be there."""
        return cls(epoch_file(url), index_file(url))

    def read(self) -> int:
        """The present value; another one than before means: forget what is in memory."""
        return self.cell[0]

    async def unless_withdrawn(self, find: Callable[[], Awaitable[T]]) -> T:
        """What `find` finds while nothing is withdrawn; else it is found again.

        Unavailable if something is withdrawn all the time.
        """
        for _ in range(_TRIES):
            mark = self.read()
            found = await find()
            if mark == self.read():
                return found
        raise Unavailable("what may be given out is changing; ask again")

    def arrivals(self) -> int:
        """Another value than before means: what was absent may be there now."""
        return self.cell[1]

    def arrive(self) -> None:
        """Make every worker forget what it took for absent."""
        self.cell[1] = int.from_bytes(os.urandom(8), "little")

    def repairs(self) -> int:
        """Another value than before means: the folder is to be looked after."""
        return self.cell[2]

    def ask_for_repair(self) -> None:
        """Have somebody see to it that the folder says what the index says."""
        self.cell[2] = int.from_bytes(os.urandom(8), "little")

    def refusals(self) -> int:
        """Another value than before means: other files of upstreams are refused now."""
        return self.cell[3]

    def refuse(self) -> None:
        """Make every worker look again which files of upstreams are refused."""
        self.cell[3] = int.from_bytes(os.urandom(8), "little")

    def advance(self) -> None:
        """Make every worker forget. A random value, so that two writers need no lock."""
        self.cell[0] = int.from_bytes(os.urandom(8), "little")
