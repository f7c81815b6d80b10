"""How much uploads take that arrive or wait, of all workers together.

What lies there is looked at when this worker added its share of the slack, or finds no room, or a while has
passed: a look costs the more, the more files wait, and whoever brings many small ones made all others pay.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from narseal.errors import StorageFull
from narseal.storage.local import LocalStorage, on_disk, storage_errors
from narseal.storage.weighing import Bound, weighed

_OFTEN = 20  # while there is no room, looks take at most such a part of the time
_SELDOM = 60.0  # seconds after which what is too old is looked for


class UploadRoom:
    """Counts what this worker adds to what it found. All methods block."""

    def __init__(
        self,
        storage: LocalStorage,
        *,
        most: int,
        max_age: float,
        workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most` bounds the bytes on disk; what waits for longer than `max_age` seconds goes."""
        self._storage = storage
        bound = Bound(most, workers)
        self._share, self._most = bound.share, bound.of_one
        self._max_age = max_age
        self._clock = clock
        self._found = 0
        self._added = 0
        self._looked_at = self._look_again_at = -math.inf
        self._lock = threading.Lock()

    def reserve(self, descriptor: int, size: int, *, of_it: int = 0, spare: int = 0) -> None:
        """Give an arriving file so many bytes before they are written, `of_it` of which it has.

        StorageFull if there is no room for them, and for `spare` more, which are only announced.
        """
        more = _on_disk(size) - _on_disk(of_it)
        with self._lock:  # whoever looks finds either what was added or the file as large
            self._make_room(more, spare)
            with storage_errors():
                os.ftruncate(descriptor, size)
            self._added += more

    def _make_room(self, more: int, spare: int) -> None:
        now = self._clock()
        if self._added + more > self._share or (
            now >= self._look_again_at
            and (not self._fits(more + spare) or now - self._looked_at > _SELDOM)
        ):
            self._look()
        if not self._fits(more + spare):
            raise StorageFull(
                "too many uploads arrive or wait for their narinfos; upload.quarantine_size"
                " bounds them"
            )

    def _fits(self, more: int) -> bool:
        return self._found + self._added + more <= self._most

    def _look(self) -> None:
        began = self._clock()
        old = time.time_ns() - int(self._max_age * 1e9)
        # one that is renamed meanwhile is counted twice rather than not at all
        arriving, nars, *others = self._storage.upload_folders()
        total = sum(_on_disk(file.length) for file in weighed(arriving))
        for folder in (nars, *others):
            for file in weighed(folder):
                if file.changed > old:
                    total += file.size
                else:
                    with storage_errors(), suppress(FileNotFoundError):
                        os.unlink(file.path)
        for folder in others:
            with suppress(OSError):  # unless something waits in it
                folder.rmdir()
        self._found, self._added = total, 0
        self._looked_at = self._clock()
        self._look_again_at = self._looked_at + _OFTEN * (self._looked_at - began)


def _on_disk(size: int) -> int:
    """As `on_disk`; what has just been made takes nothing yet."""
    return on_disk(size) if size else 0
