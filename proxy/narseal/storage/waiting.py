"""Side files that were uploaded before the narinfo that vouches for them; nobody is given them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

from narseal.errors import StorageFull
from narseal.runtime.files import OpenFile
from narseal.storage.local import LocalStorage, into_folder, storage_errors

_MOST = 2048


class WaitingFiles:
    """They wait in a folder for each who brought them, by what they are about. All methods block."""

    def __init__(self, local: LocalStorage) -> None:
        self._local = local

    def keep(self, owner: str, about: str, name: str, file: OpenFile) -> None:
        """Let a file on its way in wait for the narinfo of a hash part, or the one that names a NAR.

        StorageFull if too many of the same owner wait.
        """
        if len(self._names(owner)) >= _MOST:
            raise StorageFull("too many of your files wait for the narinfos of their paths")
        assert file.path is not None  # it is on its way in
        with storage_errors():
            os.fsync(file.descriptor)
            place = self._folder(owner) / f"{about}~{name.replace('/', '!')}"
            into_folder(os.rename, file.path, place)

    def take(self, owner: str, abouts: Collection[str]) -> list[tuple[str, str, Path]]:
        """What somebody brought about some things: about which, its name, and where it lies."""
        found: list[tuple[str, str, Path]] = []
        for waiting in self._names(owner):
            about, _, name = waiting.partition("~")
            if about in abouts:
                found.append((about, name.replace("!", "/"), self._folder(owner) / waiting))
        return found

    def publish(
        self, path: Path, name: str, room: Callable[[int], AbstractContextManager[None]]
    ) -> None:
        """Give a file that waited its name; it goes if there is one of that name.

        Nothing if somebody else was faster, as with the others. StorageFull if there is no room for
        so many bytes: it waits on.
        """

        def act() -> None:
            file = OpenFile.at(path)
            if self._local.lacks(name):
                with room(file.size):
                    self._local.publish_new(file.descriptor, path, name)
            path.unlink(missing_ok=True)

        self._if_there(path, act)

    def drop(self, path: Path) -> None:
        """Let a file wait no more."""
        self._if_there(path, path.unlink)

    def change(self, path: Path, old: str, new: str) -> None:
        """Replace a text in a file that waits."""

        def act() -> None:
            path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))

        self._if_there(path, act)

    def _if_there(self, path: Path, act: Callable[[], None]) -> None:
        self._local.if_there(act, str(path.relative_to(self._local.root)))

    def _names(self, owner: str) -> list[str]:
        return self._local.names(str(self._folder(owner).relative_to(self._local.root)))

    def _folder(self, owner: str) -> Path:
        return self._local.waiting / owner
