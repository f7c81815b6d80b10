"""One worker of several does what only one may do; whoever dies makes room for another."""

from __future__ import annotations

import asyncio
import fcntl
import os
from pathlib import Path

_LOOK = 1.0  # seconds between two tries


class Leadership:
    """A lock on a file, which the kernel lets go of with the process."""

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self) -> bool:
        """Whether this process leads, from now on if not before."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def lead(self) -> None:
        """Wait until this process leads."""
        while not self.take():  # noqa: ASYNC110 (a lock between processes)
            await asyncio.sleep(_LOOK)

    def close(self) -> None:
        """Lead no more."""
        os.close(self._descriptor)
