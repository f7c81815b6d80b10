"""Logs, listings and debug-info pointers that uploaders brought: as many bytes on disk as may be.

They are part of the folder as a binary cache, and stay.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from narseal.errors import StorageFull
from narseal.storage.local import LocalStorage, on_disk
from narseal.storage.weighing import Bound, weighed

_PAUSE = 10.0  # seconds for which there is no room once they were weighed and there was none


class UploadedFiles:
    """How much they are together. All methods block."""

    def __init__(
        self,
        storage: LocalStorage,
        *,
        most: int,
        workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most` bounds the bytes on disk, of all workers together."""
        self._storage = storage
        bound = Bound(most, workers)
        self._share, self._most = bound.share, bound.of_one
        self._weight = 0
        self._added = most  # until it was weighed for the first time
        self._coming = 0  # what has room and not its name yet
        self._clock = clock
        self._weighed_at = -math.inf
        self._lock = threading.Lock()

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """For a file to get its name within; StorageFull if there is none."""
        size = on_disk(size)
        self._take(size)
        try:
            yield
        except BaseException:
            with self._lock:
                self._coming -= size
            raise
        with self._lock:  # weighed meanwhile, it is counted twice rather than not at all
            self._coming -= size
            self._added += size

    def _take(self, size: int) -> None:
        with self._lock:
            if self._is_to_be_weighed(size):
                self._weight, self._added = self._weigh(), 0
                self._weighed_at = self._clock()
            if not self._fits(size):
                raise StorageFull(
                    "uploaded logs, listings and debug-info pointers take all the room that they"
                    " may; upload.side_files bounds them"
                )
            self._coming += size

    def _fits(self, size: int) -> bool:
        return self._weight + self._added + self._coming + size <= self._most

    def _is_to_be_weighed(self, size: int) -> bool:
        """Whether it is time to look; not at each upload that finds no room, for all wait for that."""
        if self._fits(size):
            return self._added + size > self._share
        return self._clock() - self._weighed_at >= _PAUSE

    def _weigh(self) -> int:
        """StorageGone if it is not the index's folder that was weighed."""
        total = sum(
            file.size
            for folder, suffix in (("log", ""), ("debuginfo", ""), (".", ".ls"))
            for file in weighed(self._storage.path(folder), suffix)
        )
        self._storage.check()
        return total
