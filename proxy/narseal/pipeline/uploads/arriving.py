"""What is uploaded while it comes in: counted as it will lie on disk, before it is written."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress

from narseal.config import UploadConfig
from narseal.errors import BadUpload, UploadTooLarge
from narseal.nix.hashes import Hash
from narseal.runtime.files import OpenFile
from narseal.storage import LocalStorage, storage_errors
from narseal.storage.local import write_whole
from narseal.storage.upload_room import UploadRoom

_STEP = 16 << 20  # bytes that are reserved at a time
_SMALL_STEP = 256 << 10  # of what is mostly small
_STEPS = 64  # of which the whole quarantine has at least so many


class _Arriving:
    """A file that counts among those that wait, by what was reserved for it. Its methods block."""

    def __init__(
        self,
        storage: LocalStorage,
        room: UploadRoom,
        upload: UploadConfig,
        size: int | None,
        step: int = _STEP,
    ) -> None:
        self._storage = storage
        self._room = room
        self._upload = upload
        self._size = size
        self._step = max(1, min(step, upload.quarantine_size // _STEPS))
        self._incoming = storage.arriving()
        self._reserved = 0

    def _reserve_up_to(self, size: int) -> None:
        if size > self._reserved:
            wanted = -(-size // self._step) * self._step
            if self._size is not None:
                wanted = min(wanted, self._size)
            self._room.reserve(self._incoming[0], wanted, of_it=self._reserved)
            self._reserved = wanted


class ArrivingFile(_Arriving):
    """A log, a listing, a pointer or a large bundle: in a file until it is whole.

    StorageFull as soon as all uploads together are too large.
    """

    def __init__(self, storage: LocalStorage, room: UploadRoom, upload: UploadConfig) -> None:
        super().__init__(storage, room, upload, None, _SMALL_STEP)
        self._file = OpenFile.incoming(self._incoming)

    def write(self, data: bytes) -> None:
        """The next bytes, decoded."""
        self._reserve_up_to(self._file.size + len(data))
        with storage_errors():
            self._file.write(data)

    def whole(self) -> OpenFile:
        """The file, which goes with its last owner unless it gets a name."""
        with storage_errors():
            os.ftruncate(self._file.descriptor, self._file.size)
        return self._file

    def discard(self) -> None:
        """See `OpenFile.drop`."""
        with suppress(OSError):
            os.ftruncate(self._file.descriptor, 0)
        self._file.drop()


class ArrivingNar(_Arriving):
    """One file below nar/, of `size` bytes if that was said. Its methods block.

    UploadTooLarge or StorageFull as soon as it is, or all uploads together are, too large. To be
    discarded, whatever became of it.
    """

    def __init__(
        self, storage: LocalStorage, room: UploadRoom, upload: UploadConfig, size: int | None
    ) -> None:
        check_size(size, upload)
        super().__init__(storage, room, upload, size)
        self._hasher = hashlib.sha256()
        self._written = 0
        try:  # who brings too much is told at once; but what he only announces holds no room
            room.reserve(self._incoming[0], 0, spare=size or 0)
        except BaseException:
            self.discard()
            raise

    def write(self, portion: bytes) -> None:
        """The next bytes of the file."""
        size = self._written + len(portion)
        check_size(size, self._upload)
        if self._size is not None and size > self._size:
            raise BadUpload(f"the body has more than its {self._size} bytes")
        self._reserve_up_to(size)
        with storage_errors():
            write_whole(self._incoming[0], portion)
        self._hasher.update(portion)
        self._written = size

    def keep(self, file: str) -> None:
        """Let it wait for its narinfo; BadUpload if it is not whole, or not what its name says."""
        if self._size is not None:
            _check_length(self._written, self._size)
        _check_name(file, self._hasher.digest())
        with storage_errors():
            os.ftruncate(self._incoming[0], self._written)
        self._storage.keep_upload(self._incoming[1], file)

    def discard(self) -> None:
        """Let go of it, and drop it unless it was kept."""
        self._storage.discard(self._incoming)


def keep_whole(
    storage: LocalStorage, room: UploadRoom, upload: UploadConfig, file: str, size: int, body: bytes
) -> None:
    """The same, in one go, of a NAR file that is in memory, of which `size` bytes were announced. Blocks."""
    check_size(size, upload)
    _check_name(file, hashlib.sha256(body).digest())
    incoming = storage.arriving()
    try:
        room.reserve(incoming[0], size)
        with storage_errors():
            write_whole(incoming[0], body)
        storage.keep_upload(incoming[1], file)
    finally:
        storage.discard(incoming)


def check_size(size: int | None, upload: UploadConfig) -> None:
    """UploadTooLarge if a NAR may not be so large."""
    if size is not None and size > upload.nar_size:
        raise UploadTooLarge(f"{size} bytes; upload.nar_size is {upload.nar_size}")


def _check_length(length: int, size: int) -> None:
    if length != size:
        raise BadUpload(f"the body ended after {length} of {size} bytes")


def _check_name(file: str, digest: bytes) -> None:
    found = Hash("sha256", digest)
    if found.nix32 != file.partition(".")[0]:
        raise BadUpload(f"nar/{file}: the file's hash is {found}")
