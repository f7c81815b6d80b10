"""Whether the index at its address is still the file that is open."""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic

from narseal.errors import ConfigError, IndexGone


def index_file(url: str) -> Path:
    """The file of a `sqlite:///…` URL."""
    return Path("/" + url.removeprefix("sqlite:").lstrip("/"))


def epoch_file(url: str) -> Path:
    """Where the workers on the index at `url` keep their shared number."""
    return index_file(url).with_suffix(".epoch")


#: Seconds for which it is not looked again.
_MOMENT = 0.002


class Presence:
    """Files that stay open for our life, with the names at which others look for them.

    SQLite, and a mapping, go on with a file that was deleted: what is written then is lost, and
    what somebody else writes at that name, revocations above all, is never seen.
    """

    def __init__(self, *files: Path) -> None:
        """Make it where all workers inherit it: who comes later must not take another file."""
        try:
            # O_PATH keeps the inode's number from being used again, and closing one lets go of
            # no lock of SQLite's
            self._files = {file: os.open(file, os.O_PATH | os.O_CLOEXEC) for file in files}
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from error
        self._gone: str | None = None
        self._checked = 0.0

    def look(self) -> None:
        """Look whether each file is at its name, for `check`. Blocks; for a thread."""
        gone = None
        for file, descriptor in self._files.items():
            try:
                now, opened = os.stat(file), os.fstat(descriptor)
            except OSError as error:
                gone = f"{file}: {error.strerror}"
                continue
            if (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino):
                gone = f"{file} was replaced while it was in use"
        self._gone = gone

    def check(self, *, is_anew: bool = False) -> None:
        """IndexGone if a file was deleted or emptied, or was not at its name at the last look.

        What was found a moment ago, for the same request most likely, is good unless it is to be
        looked at anew.
        """
        now = monotonic()
        if now - self._checked < _MOMENT and not is_anew:
            return
        self._checked = 0.0
        for file, descriptor in self._files.items():
            opened = os.fstat(descriptor)  # of an open file: it does not wait for a disk
            if not opened.st_nlink or not opened.st_size:
                raise IndexGone(f"{file} was deleted, replaced or emptied while in use; {_HELP}")
        if self._gone:
            raise IndexGone(f"{self._gone}; {_HELP}")
        self._checked = now


_HELP = (
    "stop narseal, put a backup of the index back or run `narseal index rebuild`, and start it"
    " (docs/recovery.md)"
)
