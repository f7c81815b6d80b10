"""Looking at a NAR file that is in storage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from narseal.errors import Malformed, Refused
from narseal.nix.inspection import Measured, inspect_file, regular_files
from narseal.nix.narinfo import NarInfo
from narseal.runtime.files import open_regular
from narseal.storage import LocalStorage, NarRecord, storage_errors


def inspect_stored(
    info: NarInfo, storage: LocalStorage, file: str, *, scan: bool = False
) -> Measured:
    """Hold a file below nar/ to a narinfo; Refused if it is not there. Blocks.

    StorageBroken or Unavailable if it cannot be opened or read to its end, StorageGone if the
    folder is not the index's: that says nothing of the file.
    """
    with _stored(storage, file) as opened:
        return inspect_file(info, opened, scan=scan)


def stored_files(
    nar: NarRecord, storage: LocalStorage, wanted: frozenset[bytes]
) -> frozenset[bytes]:
    """Which of some paths below its root are regular files of a NAR in storage. Blocks.

    Refused or Malformed if it is not there, or no such NAR; the others as by `inspect_stored`.
    """
    with _stored(storage, nar.file) as opened:
        return regular_files(wanted, opened, compression=nar.compression, nar_size=nar.nar_size)


@contextmanager
def _stored(storage: LocalStorage, file: str) -> Iterator[BinaryIO]:
    """A stored NAR, open; who finds it wrong is asked whether it was this folder's."""
    try:
        with storage_errors(), open_regular(storage.path(f"nar/{file}")) as opened:
            yield opened
    except (Refused, Malformed):
        storage.check()
        raise
