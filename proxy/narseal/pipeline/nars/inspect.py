"""Looking at a NAR file that is in storage."""

from __future__ import annotations

from pathlib import Path

from narseal.nix.inspection import Measured, inspect_file, regular_files
from narseal.nix.narinfo import NarInfo
from narseal.runtime.files import open_regular
from narseal.storage import NarRecord


def inspect_stored(info: NarInfo, path: Path, *, scan: bool = False) -> Measured:
    """Hold a file in storage to a narinfo; Refused if it cannot be opened. Blocks."""
    with open_regular(path) as opened:
        return inspect_file(info, opened, scan=scan)


def stored_files(nar: NarRecord, path: Path, wanted: frozenset[bytes]) -> frozenset[bytes]:
    """Which of some paths below its root are regular files of a NAR in storage. Blocks.

    Refused or Malformed if it cannot be read.
    """
    with open_regular(path) as opened:
        return regular_files(wanted, opened, compression=nar.compression, nar_size=nar.nar_size)
