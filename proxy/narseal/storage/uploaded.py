"""Logs, listings and debug-info pointers that uploaders brought: as many bytes on disk as may be.

They are part of the folder as a binary cache, and stay. Each worker takes account of what it adds
itself, and weighs the folder when that is its share of the slack, so that all of them together
stay within the bound.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from narseal.errors import StorageFull
from narseal.storage.local import LocalStorage, on_disk

_SLACK = 4  # that part of the bound is for what came since the folder was weighed


class UploadedFiles:
    """How much they are together. All methods block."""

    def __init__(self, storage: LocalStorage, *, most: int, workers: int) -> None:
        """`most` bounds the bytes on disk, of all workers together."""
        self._storage = storage
        self._share = most // (_SLACK * workers)
        #: What other workers may have added since this one weighed is not known: all they may.
        self._most = most - self._share * (workers - 1)
        self._weight = 0
        self._added = most  # until it was weighed for the first time
        self._lock = threading.Lock()

    def count(self, size: int) -> None:
        """Take account of a file that is about to get its name; StorageFull if there is no room."""
        size = on_disk(size)
        with self._lock:
            if self._added + size > self._share or self._weight + self._added + size > self._most:
                self._weight, self._added = self._weigh(), 0
            if self._weight + size > self._most:
                raise StorageFull(
                    "uploaded logs, listings and debug-info pointers take all the room that they"
                    " may; upload.side_files bounds them"
                )
            self._added += size

    def _weigh(self) -> int:
        total = 0
        for folder, suffix in (("log", ""), ("debuginfo", ""), (".", ".ls")):
            with suppress(FileNotFoundError), os.scandir(self._storage.path(folder)) as entries:
                for entry in entries:
                    if entry.name.endswith(suffix):
                        with suppress(FileNotFoundError):
                            total += on_disk(entry.stat(follow_symlinks=False).st_size)
        return total
