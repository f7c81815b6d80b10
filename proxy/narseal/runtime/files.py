"""Opening what lies in a folder that somebody else may write into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from narseal.errors import Refused


def open_regular(path: Path) -> BinaryIO:
    """A file, never what a symbolic link points to; Refused if it cannot be read. Blocks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise Refused("unsigned", f"{path}: cannot be read: {error.strerror}") from error
    return open(descriptor, "rb", buffering=0)
