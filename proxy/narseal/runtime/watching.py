"""Seeing that a file changed, without reading one that is just being written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_State = tuple[int, int, int] | None


class Watch:
    """Some files: `changed` once after each change, when they have stood still for one look."""

    def __init__(self) -> None:
        self._known: dict[Path, _State] = {}
        self._last: dict[Path, _State] = {}

    def follow(self, files: Iterable[Path]) -> None:
        """Look at these; what changed of them since they were last looked at is still a change."""
        self._known = {f: self._known[f] if f in self._known else _state(f) for f in files}

    def settle(self) -> None:
        """Whatever changed until now is known."""
        self._known = {file: _state(file) for file in self._known}

    def changed(self) -> bool:
        """Whether they are other than when this was last true, and the same as at the last call."""
        now = {file: _state(file) for file in self._known}
        still, self._last = now == self._last, now
        if now == self._known or not still:
            return False
        self._known = now
        return True


def _state(file: Path) -> _State:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
