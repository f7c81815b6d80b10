"""What upstreams say and nobody signed: kept for when they are away, within a bound on the disk.

It is no part of the folder as a binary cache, but below `.narseal/unverified/`. What was asked for
longest ago goes first.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

from narseal.runtime.files import OpenFile
from narseal.storage.local import LocalStorage, on_disk, storage_errors
from narseal.storage.weighing import Bound, weighed


class UnverifiedFiles:
    """Files by their names in a binary cache. All methods block."""

    def __init__(self, storage: LocalStorage, *, most: int, workers: int) -> None:
        """`most` bounds the bytes on disk, of all workers together; 0: nothing is kept."""
        self._storage = storage
        self._root = storage.path(".narseal/unverified")
        bound = Bound(most, workers)
        self._share = bound.share
        self._weight = most - bound.slack
        self._added = most  # until it was weighed for the first time
        self._lock = threading.Lock()

    def open(self, name: str) -> OpenFile | None:
        """The file, None if it is not kept."""
        path = self._root / _flat(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(descriptor)
            found = OpenFile(descriptor, status.st_size)
            # when it was asked for; when it came stays as it was
            os.utime(descriptor, ns=(time.time_ns(), status.st_mtime_ns))
        except OSError:
            return None
        return found

    def keep(self, file: OpenFile, name: str) -> None:
        """Give a file on its way in a name, if there is room. Unavailable if storage fails."""
        assert file.path is not None
        size = on_disk(file.size)
        if size > self._share:
            return
        self._storage.publish(file.descriptor, file.path, f".narseal/unverified/{_flat(name)}")
        # Only what has its name is weighed, so the last of several threads sees what all of them added.
        with self._lock:
            self._added += size
            due = self._added > self._share
            if due:
                self._added = 0
        if due:
            self._weigh()

    def _weigh(self) -> None:
        """Drop what was not asked for for longest."""
        found = sorted(weighed(self._root), key=lambda file: file.used)
        total = sum(file.size for file in found)
        for file in found:
            if total <= self._weight:
                return
            with storage_errors(), suppress(FileNotFoundError):
                os.unlink(file.path)
            total -= file.size


def _flat(name: str) -> str:
    """A file name for `log/…` or `debuginfo/…`; no name in a binary cache has a comma."""
    return name.replace("/", ",")
