"""Verified files in a local folder that is itself a plain binary cache.

Below the root: nix-cache-info, <hash>.narinfo, nar/, log/, debuginfo/, realisations/,
build-trace-v2/. What is not part of it is below `.narseal/`: files on their way in, and
what was found wrong. All methods block; call them off the loop.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from narseal.errors import ConfigError, StorageBroken, StorageFull, Unavailable
from narseal.nix.cache_info import CacheInfo

#: What a disk says of bytes that it cannot give back (EUCLEAN: of a whole file system).
_BROKEN = frozenset((errno.EIO, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG, errno.EREMOTEIO))
_BLOCK = 4096  # bytes that the smallest file takes
_QUARANTINED = 20  # files kept for a look, the newest


class LocalStorage:
    """The folder of a `file://` URL."""

    def __init__(self, url: str) -> None:
        self.root = Path(url.removeprefix("file://"))
        self._incoming = self.root / ".narseal" / "incoming"
        self._quarantine = self.root / ".narseal" / "quarantine"
        #: What waits for a narinfo.
        self.uploads = self.root / ".narseal" / "uploads"
        self._arriving = self.root / ".narseal" / "arriving"

    def prepare(self, info: CacheInfo) -> None:
        """Make the folders, sweep what a crash left, write nix-cache-info.

        ConfigError if that cannot be done, or if another narseal has the folder.
        """
        try:
            (self.root / ".narseal").mkdir(parents=True, exist_ok=True)
            self._lock = open(self.root / ".narseal" / "lock", "w")  # noqa: SIM115 - for our life
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"storage.url {self.root}: another narseal serves from it") from error
        except OSError as error:
            raise ConfigError(f"storage.url {self.root}: {error.strerror}") from error
        try:
            for folder in (self._incoming, self._arriving):
                shutil.rmtree(folder, ignore_errors=True)
            nars = self.root / "nar"
            for folder in (self._incoming, self._arriving, self._quarantine, self.uploads, nars):
                folder.mkdir(parents=True, exist_ok=True)
            self.write("nix-cache-info", info.render().encode())
        except (OSError, Unavailable) as error:
            raise ConfigError(f"storage.url {self.root}: cannot be written: {error}") from error

    def sweep(self, pid: int) -> None:
        """Remove what a process that died was bringing in."""
        for folder in (self._incoming, self._arriving):
            for file in folder.glob(f"{pid}-*"):
                file.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """The file of a name that narseal made itself (never a client's or upstream's text)."""
        return self.root / name

    def incoming(self) -> tuple[int, Path]:
        """A new file to write and read, and its path."""
        return _create(self._incoming)

    def arriving(self) -> tuple[int, Path]:
        """A new file for an uploaded NAR; what it is given by `reserve` counts as waiting."""
        return _create(self._arriving)

    def publish(self, descriptor: int, incoming: Path, name: str) -> None:
        """Give a complete file its name: fsync, rename, fsync of the folder, in that order."""
        target = self.path(name)
        with storage_errors():
            os.fsync(descriptor)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(incoming, target)
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def link(self, name: str, other: str) -> None:
        """Give a published file another name, too."""
        incoming = self._incoming / f"{os.getpid()}-{secrets.token_hex(16)}"
        with storage_errors():
            os.link(self.path(name), incoming)
            descriptor = os.open(incoming, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.publish(descriptor, incoming, other)
        finally:
            os.close(descriptor)

    def write(self, name: str, data: bytes) -> None:
        """Publish a small file, over an older one of its name if need be."""
        descriptor, incoming = self.incoming()
        try:
            with storage_errors():
                with open(descriptor, "wb", closefd=False) as file:
                    file.write(data)
                self.publish(descriptor, incoming, name)
        except Unavailable:
            incoming.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes | None:
        """A small file's bytes, None if there is none."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            return None

    def holds(self, *, nars: bool) -> str | None:
        """A narinfo, or with `nars` a NAR, that is in the folder."""
        patterns = ("*.narinfo", "nar/*.nar*") if nars else ("*.narinfo",)
        found = next((p for pattern in patterns for p in self.root.glob(pattern)), None)
        return str(found.relative_to(self.root)) if found else None

    def narinfos(self) -> list[str]:
        """The names of all narinfo files, in order."""
        return sorted(path.name for path in self.root.glob("*.narinfo"))

    def remove(self, name: str) -> None:
        """Take a file away; nothing if there is none."""
        self.path(name).unlink(missing_ok=True)

    def discard(self, incoming: tuple[int, Path]) -> None:
        """Close a file that was on its way in, and drop it unless it was published."""
        descriptor, path = incoming
        os.close(descriptor)
        path.unlink(missing_ok=True)

    def keep_upload(self, incoming: Path, file: str) -> None:
        """Let a NAR whose hash is its name wait for its narinfo."""
        with storage_errors():
            os.rename(incoming, self.uploads / file)

    def open_upload(self, file: str) -> tuple[int, Path] | None:
        """A waiting NAR, open, under an incoming name of its own; None if there is none.

        It stays among the uploads, for another client who brings the same path.
        """
        path = self._incoming / f"{os.getpid()}-{secrets.token_hex(16)}"
        try:
            os.link(self.uploads / file, path)
        except FileNotFoundError:
            return None
        return os.open(path, os.O_RDWR | os.O_CLOEXEC), path

    def discard_upload(self, file: str) -> None:
        """Let a NAR wait no more."""
        (self.uploads / file).unlink(missing_ok=True)

    def reserve(self, descriptor: int, size: int, *, max_age: float, max_bytes: int) -> None:
        """Let an arriving upload count as `size` bytes, before they are written; see check_room."""
        with storage_errors():
            os.ftruncate(descriptor, size)
        self.check_room(max_age=max_age, max_bytes=max_bytes)

    def check_room(self, *, max_age: float, max_bytes: int) -> None:
        """Drop uploads that wait for longer than `max_age` seconds.

        StorageFull if all of them, those of other processes that arrive at the same time included,
        are more than `max_bytes` then.
        """
        old = time.time() - max_age
        total = 0
        # in this order: one that is renamed meanwhile is counted twice rather than not at all
        for folder in (self._arriving, self.uploads):
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    if folder == self.uploads and status.st_mtime < old:
                        os.unlink(entry.path)
                    else:
                        total += status.st_size
        if total > max_bytes:
            raise StorageFull(
                "too many uploads arrive or wait for their narinfos; upload.quarantine_size"
                " bounds them"
            )

    def open(self, name: str) -> int | None:
        """A published file, open for reading; None if there is none.

        StorageBroken if it cannot be read.
        """
        with storage_errors():
            try:
                return os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None

    def quarantine(self, file: Path, label: str) -> None:
        """Keep a wrong file for the operator to look at, the newest few of them."""
        with suppress(OSError):
            os.rename(file, self._quarantine / f"{label}.{secrets.token_hex(4)}")
            kept = sorted(self._quarantine.iterdir(), key=lambda p: p.stat().st_mtime)
            for old in kept[:-_QUARANTINED]:
                old.unlink(missing_ok=True)


def on_disk(size: int) -> int:
    """The bytes that a file of a size takes."""
    return -(-max(size, 1) // _BLOCK) * _BLOCK


def _create(folder: Path) -> tuple[int, Path]:
    path = folder / f"{os.getpid()}-{secrets.token_hex(16)}"
    with storage_errors():
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.open(path, flags, 0o644), path


@contextmanager
def storage_errors() -> Iterator[None]:
    """Say what an OSError of the folder means: StorageFull, StorageBroken or Unavailable."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull(
                "storage is full: what is stored is served on, new files are not kept"
            ) from error
        if error.errno in _BROKEN:
            raise StorageBroken("unreadable", f"storage fails: {error}") from error
        raise Unavailable(f"storage fails: {error}") from error
