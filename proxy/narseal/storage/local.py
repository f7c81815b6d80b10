"""Verified files in a local folder that is itself a plain binary cache.

Below the root: nix-cache-info, <hash>.narinfo, nar/, log/, debuginfo/, realisations/,
build-trace-v2/. What is not part of it is below `.narseal/`: files on their way in, and
what was found wrong. All methods block; call them off the loop.

That a file is not there is said only of the folder that bears the index's mark: where another is
mounted, or none, everything looks lost and nothing is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from narseal.errors import ConfigError, StorageBroken, StorageFull, StorageGone, Unavailable
from narseal.nix.cache_info import CacheInfo
from narseal.nix.store_path import is_hash_part
from narseal.runtime.files import OpenFile, sync_all, sync_folder

#: What a disk says of bytes that it cannot give back (EUCLEAN: of a whole file system).
_BROKEN = frozenset((errno.EIO, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG, errno.EREMOTEIO))
_BLOCK = 4096  # bytes that the smallest file takes
_QUARANTINED = 20  # files kept for a look, the newest
_IDENTITY = ".narseal/identity"
_REFUSED = ".narseal/refused"
_UPLOADS = ".narseal/uploads"
_WAITING = ".narseal/waiting"  # below it, a folder for each uploader
_LONGEST_MARK = 128
_TRIES = 3

T = TypeVar("T")


class LocalStorage:
    """The folder of a `file://` URL."""

    def __init__(self, url: str, mark: str | None = None) -> None:
        """With the index's `mark` no other folder is taken for this one; None: whichever is there."""
        self.root = Path(url.removeprefix("file://"))
        self._expected = mark
        self._incoming = self.root / ".narseal" / "incoming"
        self._quarantine = self.root / ".narseal" / "quarantine"
        #: NARs that wait for a narinfo, and side files that do, a folder for each uploader.
        self.uploads = self.path(_UPLOADS)
        self.waiting = self.path(_WAITING)
        self._arriving = self.root / ".narseal" / "arriving"
        #: Narinfos that were set aside.
        self.refused = self.path(_REFUSED)

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
            made = (self._incoming, self._arriving, self._quarantine, self.uploads, self.waiting)
            for folder in (*made, nars):
                folder.mkdir(parents=True, exist_ok=True)
            self.write("nix-cache-info", info.render().encode())
        except (OSError, Unavailable) as error:
            raise ConfigError(f"storage.url {self.root}: cannot be written: {error}") from error

    def sweep(self, pid: int) -> None:
        """Remove what a process that died was bringing in."""
        for folder in (self._incoming, self._arriving):
            for file in folder.glob(f"{pid}-*"):
                _drop(file)

    def mark(self) -> str | None:
        """What the folder is marked with; None if with nothing, or if it is not there."""
        with storage_errors():
            try:
                text = self.path(_IDENTITY).read_text("ascii", "replace")
            except (FileNotFoundError, NotADirectoryError):
                return None
            return text.strip()[:_LONGEST_MARK] or None

    def bear(self, mark: str) -> None:
        """Mark the folder, durably."""
        self.write(_IDENTITY, f"{mark}\n".encode())

    def check(self) -> None:
        """StorageGone unless the folder is there and bears the index's mark."""
        if self._expected is not None:
            with self._pinned():
                pass

    def lacks(self, name: str) -> bool:
        """Whether a file is surely not there: StorageGone if it is not the index's folder that says so."""
        with storage_errors():
            if self.path(name).exists():
                return False
            if self._expected is None:
                return True
            with self._pinned() as root:
                try:
                    os.stat(name, dir_fd=root)
                except FileNotFoundError:
                    return True
                return False

    def names(self, folder: str = ".") -> list[str]:
        """What is in a folder below the root, in order; nothing if there surely is no such folder.

        StorageGone if it is not the index's root.
        """
        with storage_errors(), self._pinned() as root:
            try:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                opened = os.open(folder, flags, dir_fd=root)
            except FileNotFoundError:
                return []
            try:
                return sorted(os.listdir(opened))
            finally:
                os.close(opened)

    def if_there(self, act: Callable[[], T], name: str) -> T | None:
        """What `act` makes of a file; None if it is surely not there. Unavailable if nobody can tell."""
        with storage_errors():
            for _ in range(_TRIES):
                try:
                    return act()
                except FileNotFoundError:
                    if self.lacks(name):
                        return None
        raise Unavailable(f"storage fails: {name} is there and cannot be found")

    @contextmanager
    def _pinned(self) -> Iterator[int]:
        """The folder with the index's mark, open: what is asked below it is asked of this very one.

        Without a mark: whichever is there.
        """
        with storage_errors():
            try:
                root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise StorageGone(f"{self.root} is not there; {_GONE}") from error
        try:
            if self._expected is not None and _read_mark(root) != self._expected:
                raise StorageGone(f"{self.root} does not bear the mark of the index; {_GONE}")
            yield root
        finally:
            os.close(root)

    def path(self, name: str) -> Path:
        """The file of a name that narseal made itself (never a client's or upstream's text)."""
        return self.root / name

    def incoming(self) -> tuple[int, Path]:
        """A new file to write and read, and its path. StorageGone if the folder is not the index's."""
        return self._create(self._incoming)

    def open_incoming(self, name: str) -> OpenFile | None:
        """A file that another worker brings, open for reading; None if it is not there any more."""
        with storage_errors():
            try:
                return OpenFile.at(self._incoming / name)
            except FileNotFoundError:  # it has its name by now, or was dropped
                return None

    def is_published(self, descriptor: int, name: str) -> bool:
        """Whether an open file is the published one of a name."""
        with storage_errors():
            try:
                return os.path.samestat(os.fstat(descriptor), os.stat(self.path(name)))
            except FileNotFoundError:  # then it is not this one either
                return False

    def arriving(self) -> tuple[int, Path]:
        """A new file for an upload; what it is given by `UploadRoom.reserve` counts as waiting."""
        return self._create(self._arriving)

    def publish(self, descriptor: int, incoming: Path, name: str) -> None:
        """Give a complete file its name: fsync, rename, fsync of the folder, in that order."""
        self._give_names({name: (descriptor, incoming)}, _rename)

    def publish_each(self, files: Sequence[tuple[OpenFile, str]]) -> list[Unavailable | None]:
        """The same of several that have nothing to do with each other; what each failed with.

        Each is on disk before it has its name.
        """
        outcomes: list[Unavailable | None] = []
        folders: dict[Path, list[int]] = {}
        with storage_errors():
            _begin_to_write(file.descriptor for file, _ in files)
        for number, (file, name) in enumerate(files):
            try:
                assert file.path is not None  # it is on its way in
                with storage_errors():
                    os.fsync(file.descriptor)
                    _rename(file.path, self.path(name))
                file.drop()  # it has its name; what is there already, and is the same file, was left where it was
                file.path = None
                folders.setdefault(self.path(name).parent, []).append(number)
                outcomes.append(None)
            except Unavailable as error:
                outcomes.append(error)
        for folder, numbers in folders.items():
            try:
                with storage_errors():
                    sync_folder(folder)
            except Unavailable as error:
                for number in numbers:
                    outcomes[number] = error
        return outcomes

    def publish_new(self, descriptor: int, incoming: Path, name: str) -> bool:
        """The same unless there is a file of that name, whoever was faster; False then."""
        try:
            self._give_names({name: (descriptor, incoming)}, _link)
        except Unavailable as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        incoming.unlink(missing_ok=True)
        return True

    def _give_names(
        self,
        files: Mapping[str, tuple[int, Path]],
        act: Callable[[Path, Path], None],
        *,
        together: bool = False,
    ) -> None:
        """To complete files on their way in: all are on disk before the first one has its name."""
        descriptors = [descriptor for descriptor, _ in files.values()]
        with storage_errors():
            (sync_all if together else _sync_each)(descriptors)
            for name, (_, incoming) in files.items():
                act(incoming, self.path(name))
            for folder in {self.path(name).parent for name in files}:
                sync_folder(folder)

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
        self.write_all({name: data})

    def write_all(self, files: Mapping[str, bytes], *, together: bool = False) -> None:
        """The same of several; all of them are on disk before the first one has its name.

        `together`: with one wait for the disk, which takes in what others wrote: see `sync_all`.
        """
        arrived: dict[str, tuple[int, Path]] = {}
        try:
            with storage_errors():
                for name, data in files.items():
                    arrived[name] = descriptor, _ = self._new(self._incoming)
                    write_whole(descriptor, data)
            self.check()
            self._give_names(arrived, _rename, together=together)
        except BaseException:
            for _, incoming in arrived.values():
                _drop(incoming)
            raise
        finally:
            for descriptor, _ in arrived.values():
                os.close(descriptor)

    def read(self, name: str) -> bytes | None:
        """A small file's bytes, None if there is none."""
        return self.if_there(self.path(name).read_bytes, name)

    def file(self, name: str) -> OpenFile | None:
        """A published file for as long as anybody has it; None if there is none."""
        descriptor = self.open(name)
        return (
            OpenFile(descriptor, os.fstat(descriptor).st_size) if descriptor is not None else None
        )

    def holds(self, *, nars: bool) -> str | None:
        """A narinfo, or with `nars` a NAR, that is in the folder."""
        patterns = ("*.narinfo", "nar/*.nar*") if nars else ("*.narinfo",)
        found = next((p for pattern in patterns for p in self.root.glob(pattern)), None)
        return str(found.relative_to(self.root)) if found else None

    def narinfos(self) -> list[str]:
        """The names of all narinfo files, in order."""
        return _narinfos(self.names())

    def refused_narinfos(self) -> list[str]:
        """The names of narinfo files that were set aside, in order."""
        return _narinfos(self.names(_REFUSED))

    def set_aside(self, name: str) -> None:
        """Take a narinfo out of the binary cache, for the operator to look at; durably."""
        with storage_errors():
            self.refused.mkdir(exist_ok=True)
            os.replace(self.path(name), self.refused / name)
            for folder in (self.refused, self.root):
                sync_folder(folder)

    def refused_name(self, name: str) -> str:
        """Where a narinfo lies that was set aside."""
        return f"{_REFUSED}/{name}"

    def is_regular(self, name: str) -> bool:
        """Whether a name is a file's, and no folder's, pipe's or symbolic link's."""
        with storage_errors():
            try:
                return stat.S_ISREG(os.lstat(self.path(name)).st_mode)
            except FileNotFoundError:
                return not self.lacks(name)

    def forget_refused(self, name: str) -> None:
        """Drop a narinfo that was set aside, if it was."""
        with storage_errors():
            (self.refused / name).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Take a file away; nothing if there is none."""
        self.if_there(self.path(name).unlink, name)

    def discard(self, incoming: tuple[int, Path]) -> None:
        """Close a file that was on its way in, and drop it unless it was published."""
        descriptor, path = incoming
        os.close(descriptor)
        _drop(path)

    def keep_upload(self, incoming: Path, file: str) -> None:
        """Let a NAR whose hash is its name wait for its narinfo."""
        with storage_errors():
            os.rename(incoming, self.uploads / file)

    def open_upload(self, file: str) -> OpenFile | None:
        """A waiting NAR, under an incoming name of its own; None if there is none.

        It stays among the uploads, for another client who brings the same path.
        """
        path = self._incoming / f"{os.getpid()}-{secrets.token_hex(16)}"

        def link() -> OpenFile:
            os.link(self.uploads / file, path)
            return OpenFile.at(path, is_incoming=True)

        return self.if_there(link, f"{_UPLOADS}/{file}")

    def discard_upload(self, file: str) -> None:
        """Let a NAR wait no more."""
        with storage_errors():
            (self.uploads / file).unlink(missing_ok=True)

    def upload_folders(self) -> list[Path]:
        """Where uploads arrive, then where they wait: NARs, and each uploader's side files."""
        with storage_errors(), suppress(FileNotFoundError):
            return [self._arriving, self.uploads, *self.waiting.iterdir()]
        return [self._arriving, self.uploads]

    def open(self, name: str) -> int | None:
        """A published file, open for reading; None if there is none.

        StorageBroken if it cannot be read.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC
        return self.if_there(lambda: os.open(self.path(name), flags), name)

    def quarantine(self, file: Path, label: str) -> None:
        """Keep a wrong file for the operator to look at, the newest few of them."""
        with suppress(OSError):
            os.rename(file, self._quarantine / f"{label}.{secrets.token_hex(4)}")
            kept = sorted(self._quarantine.iterdir(), key=lambda p: p.stat().st_mtime)
            for old in kept[:-_QUARANTINED]:
                old.unlink(missing_ok=True)

    def _create(self, folder: Path) -> tuple[int, Path]:
        """A file that cannot be published in another folder: there it is not, under this name."""
        descriptor, path = self._new(folder)
        try:
            self.check()
        except Unavailable:
            os.close(descriptor)
            _drop(path)
            raise
        return descriptor, path

    def _new(self, folder: Path) -> tuple[int, Path]:
        """An empty file, in whatever folder is there: to be checked once all are made."""
        path = folder / f"{os.getpid()}-{secrets.token_hex(16)}"
        with storage_errors():
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                return os.open(path, flags, 0o644), path
            except FileNotFoundError:
                self.check()
                raise


def _narinfos(names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name.endswith(".narinfo") and is_hash_part(name.removesuffix(".narinfo"))
    ]


def on_disk(size: int) -> int:
    """The bytes that a file of a size takes."""
    return -(-max(size, 1) // _BLOCK) * _BLOCK


def write_whole(descriptor: int, data: bytes) -> None:
    """All of some bytes, where a file stands; OSError if that fails."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _begin_to_write(descriptors: Iterable[int]) -> None:
    """Have the bytes of files on their way to the disk, before each is waited for.

    A file system with a journal then commits it once, and not once for each file.
    """
    for descriptor in descriptors:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_each(descriptors: Collection[int]) -> None:
    _begin_to_write(descriptors)
    for descriptor in descriptors:
        os.fsync(descriptor)


def _rename(file: Path, name: Path) -> None:
    into_folder(os.rename, file, name)


def _link(file: Path, name: Path) -> None:
    into_folder(os.link, file, name)


def into_folder(act: Callable[[Path, Path], None], file: Path, name: Path) -> None:
    """Give a file a name, in a folder that is made if it is not there."""
    try:
        act(file, name)
    except FileNotFoundError:
        name.parent.mkdir(parents=True, exist_ok=True)
        act(file, name)


def _drop(path: Path) -> None:
    """Take away what was on its way in; what cannot be is swept by the next start."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _read_mark(root: int) -> str | None:
    """The mark of an open folder; None if it has none."""
    with storage_errors():
        try:
            descriptor = os.open(_IDENTITY, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return os.read(descriptor, _LONGEST_MARK).decode("ascii", "replace").strip() or None
        finally:
            os.close(descriptor)


_GONE = (
    "is it mounted? What is in it is not served until it is there again; if it is lost, or you put"
    " another in its place, stop narseal and run `narseal index join` (docs/recovery.md)"
)


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
