"""Side files that were uploaded before the narinfo that vouches for them; nobody is given them."""

from __future__ import annotations

import os
from pathlib import Path

from narseal.errors import StorageFull
from narseal.runtime.files import OpenFile
from narseal.storage.local import LocalStorage, storage_errors

_MOST = 2048


class WaitingFiles:
    """They wait among the uploads, by who brought them and by what they are about. All methods block."""

    def __init__(self, local: LocalStorage) -> None:
        self._local = local

    def keep(self, owner: str, about: str, name: str, file: OpenFile) -> None:
        """Let a file on its way in wait for the narinfo of a hash part, or the one that names a NAR.

        StorageFull if too many of the same owner wait.
        """
        folder = self._local.uploads
        if sum(1 for _ in folder.glob(f"*~{owner}~*")) >= _MOST:
            raise StorageFull("too many of your files wait for the narinfos of their paths")
        assert file.path is not None  # it is on its way in
        with storage_errors():
            os.fsync(file.descriptor)
            os.rename(file.path, folder / f"{about}~{owner}~{name.replace('/', '!')}")

    def take(self, owner: str, about: str) -> list[tuple[str, Path]]:
        """Names of what somebody brought about a thing, and where it lies."""
        prefix = f"{about}~{owner}~"
        paths = sorted(self._local.uploads.glob(f"{prefix}*"))
        return [(path.name.removeprefix(prefix).replace("!", "/"), path) for path in paths]

    def publish(self, path: Path, name: str) -> None:
        """Give a file that waited its name, unless there is one."""
        with storage_errors():
            if not self._local.lacks(name):
                path.unlink(missing_ok=True)
                return
            file = OpenFile.at(path)
            self._local.publish(file.descriptor, path, name)
