"""Open files: who closes them, and how one is opened that somebody else may write."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

from narseal.errors import ConfigError, Refused

_libc = ctypes.CDLL(None, use_errno=True)
#: Whether syncfs says what went wrong.
_TELLS = tuple(int(n) for n in platform.release().split("-")[0].split(".")[:2]) >= (5, 8)


class OpenFile:
    """A file open for reading, for as long as anybody has it.

    With a path it is on its way in, and goes with its last owner unless it was renamed.
    """

    __slots__ = ("descriptor", "path", "size")

    def __init__(self, descriptor: int, size: int, path: Path | None = None) -> None:
        self.descriptor = descriptor
        self.size = size
        self.path = path

    @classmethod
    def at(cls, path: Path, *, is_incoming: bool = False) -> Self:
        """A file that is there; FileNotFoundError if it is not. Blocks."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return cls(descriptor, os.fstat(descriptor).st_size, path if is_incoming else None)

    @classmethod
    def incoming(cls, created: tuple[int, Path]) -> Self:
        """An empty file that was just created, to be written."""
        return cls(created[0], 0, created[1])

    def write(self, data: bytes) -> None:
        """Append; OSError if it cannot be written. Blocks."""
        view = memoryview(data)
        while view:
            done = os.write(self.descriptor, view)
            self.size += done
            view = view[done:]

    def read(self) -> bytes:
        """All of it. Blocks."""
        return os.pread(self.descriptor, self.size, 0)

    def drop(self) -> None:
        """Take it away now: an error may own it for longer. What fails here is not told instead of it. Blocks."""
        if self.path:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def __del__(self) -> None:
        os.close(self.descriptor)
        if self.path:
            self.path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk; OSError if that fails. Blocks."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def open_regular(path: Path) -> BinaryIO:
    """A file, never what a symbolic link points to; Refused if there is no such file. Blocks.

    OSError if that is not known: what cannot be opened now says nothing of what is in it.
    """
    try:  # a pipe must not be waited for
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        raise Refused("unsigned", f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused("unsigned", f"{path}: is not a regular file")
    return open(descriptor, "rb", buffering=0)


def sync_all(descriptors: Collection[int]) -> None:
    """Have the contents of files of one file system on disk, with one wait for all of them. Blocks.

    It waits for what others wrote there, too: for what nobody waits for. OSError if it failed;
    before Linux 5.8 that is not said of all at a time, and each is waited for.
    """
    if _TELLS and descriptors:
        if _libc.syncfs(next(iter(descriptors))):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return
    for descriptor in descriptors:
        os.fsync(descriptor)


def check_not_public(path: Path) -> None:
    """ConfigError if everybody on this machine may read a secret; its group may.

    OSError if the file is not there. Blocks.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IRWXO:
        raise ConfigError(f"{path}: mode {mode:04o} lets everybody read it; chmod o= {path}")
