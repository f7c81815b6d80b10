"""Looking at a NAR file that is in storage."""

from __future__ import annotations

from pathlib import Path

from narseal.nix.inspection import Measured, inspect_file
from narseal.nix.narinfo import NarInfo
from narseal.runtime.files import open_regular


def inspect_stored(info: NarInfo, path: Path, *, scan: bool = False) -> Measured:
    """Hold a file in storage to a narinfo; Refused if it cannot be opened. Blocks."""
    with open_regular(path) as opened:
        return inspect_file(info, opened, scan=scan)
