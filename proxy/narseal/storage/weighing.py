"""How much the files of a kind may be together, where each worker takes account of what it adds itself.

It weighs what lies there when it added its share of the slack, so that all workers together stay
within the bound.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from narseal.storage.local import on_disk, storage_errors

_SLACK = 4  # that part of a bound is for what came since the files were weighed


@dataclass(frozen=True, slots=True)
class Bound:
    """`most` bytes on disk, of all `workers` together."""

    most: int
    workers: int

    @property
    def slack(self) -> int:
        """Bytes that all workers together may add between two looks."""
        return self.most // _SLACK

    @property
    def share(self) -> int:
        """Bytes that one of them may add."""
        return self.most // (_SLACK * self.workers)

    @property
    def of_one(self) -> int:
        """Bytes up to which one may add: what the others added since it looked is not known, so all they may.

        While a reload's old workers end, those are not reckoned with.
        """
        return self.most - self.share * (self.workers - 1)


@dataclass(frozen=True, slots=True)
class Weighed:
    """A file that lies there."""

    path: str
    #: Bytes that it has.
    length: int
    #: When it was asked for, and when it was written, in nanoseconds.
    used: int
    changed: int

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return on_disk(self.length)


def weighed(folder: Path, suffix: str = "") -> Iterator[Weighed]:
    """The files of a folder, less those that go away meanwhile; none if it is not there.

    Unavailable if they cannot be looked at. Blocks.
    """
    with storage_errors(), suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffix):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    size = status.st_size
                    yield Weighed(entry.path, size, status.st_atime_ns, status.st_mtime_ns)
