"""One worker of several does what only one may do; whoever dies makes room for another."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


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

    def close(self) -> None:
        """Lead no more."""
        os.close(self._descriptor)
