"""Side files that were uploaded before the narinfo that vouches for them; nobody is given them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from narseal.errors import StorageFull
from narseal.storage.local import LocalStorage, storage_errors

_MOST = 4096


class WaitingFiles:
    """They wait among the uploads, by who brought them and by what they are about. All methods block."""

    def __init__(self, local: LocalStorage) -> None:
        self._local = local

    def keep(self, owner: str, about: str, name: str, data: bytes) -> None:
        """Let a file wait for the narinfo of a hash part, or the one that names a NAR file.

        StorageFull if too many wait.
        """
        folder = self._local.uploads
        if sum(1 for _ in folder.glob("*~*")) >= _MOST:
            raise StorageFull("too many uploaded files wait for the narinfos of their paths")
        descriptor, incoming = self._local.incoming()
        try:
            with storage_errors():
                with open(descriptor, "wb", closefd=False) as file:
                    file.write(data)
                os.fsync(descriptor)
                os.rename(incoming, self._path(owner, about, name))
        finally:
            self._local.discard((descriptor, incoming))

    def take(self, owner: str, about: str) -> list[tuple[str, bytes]]:
        """Names and contents of what somebody brought about a thing."""
        found = []
        prefix = f"{about}~{owner}~"
        for path in sorted(self._local.uploads.glob(f"{prefix}*")):
            with suppress(FileNotFoundError):
                found.append((path.name.removeprefix(prefix).replace("!", "/"), path.read_bytes()))
        return found

    def drop(self, owner: str, about: str) -> None:
        """Let what somebody brought about a thing wait no more."""
        for path in self._local.uploads.glob(f"{about}~{owner}~*"):
            path.unlink(missing_ok=True)

    def _path(self, owner: str, about: str, name: str) -> Path:
        return self._local.uploads / f"{about}~{owner}~{name.replace('/', '!')}"
