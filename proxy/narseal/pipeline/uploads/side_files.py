"""Listings, logs and debug-info pointers that uploaders bring: each within its token's scope.

`nix copy` brings a path's listing and debug info before its narinfo. Until a narinfo by the same token
vouches for them they wait, unseen.
"""

from __future__ import annotations

import asyncio
import filecmp
import logging
import re
from pathlib import Path

from narseal.custody.tokens import Token
from narseal.errors import (
    BadUpload,
    Forbidden,
    Malformed,
    Refused,
    StorageFull,
    Unavailable,
    UploadConflict,
)
from narseal.nix.base32 import CHARS
from narseal.pipeline.nars.inspect import stored_files
from narseal.pipeline.paths.side_files import check_listing, pointer
from narseal.pipeline.services import Services
from narseal.runtime.files import OpenFile
from narseal.storage import Admitted, LocalStorage, NarRecord, storage_errors
from narseal.storage.uploaded import UploadedFiles
from narseal.storage.waiting import WaitingFiles

_ARCHIVE = re.compile(rf"(\.\./)?nar/({CHARS}{{52}}\.nar(\.[a-z0-9]{{2,4}})?)", re.ASCII)
_DEBUGINFO = "debuginfo/"
_LOOKS = 2  # NARs that are looked into at a time
_log = logging.getLogger(__name__)


class SideFileUploads:
    """What may be put beside a path."""

    def __init__(self, services: Services) -> None:
        self._index = services.index
        self._folder = services.folder
        self._threads = services.threads
        self._waiting = WaitingFiles(services.folder.local)
        self._uploaded = UploadedFiles(
            services.folder.local,
            most=services.config.upload.side_files,
            workers=services.config.workers,
        )
        self._looking = asyncio.Semaphore(_LOOKS)

    async def put(self, name: str, file: OpenFile, token: Token) -> None:
        """Take a file; BadUpload if it is none, Forbidden if the token does not cover its path.

        UploadConflict if another is there: nobody's file is overwritten. StorageFull beyond
        upload.side_files.
        """
        if name.startswith("log/"):
            derivation = name.removeprefix("log/")[33:].removesuffix(".drv")
            _check_scope(token, [derivation], name)
            await self._publish(name, file)
            return
        about, found = await self._about(name, file)
        if not found:
            await self._threads.run(self._waiting.keep, token.id, about, name, file)
            return
        _check_scope(token, [path.info.store_path.name for path, _ in found], name)
        if name.startswith(_DEBUGINFO) and not await self._in_nar([name], found[0][1]):
            raise BadUpload(
                f"{name}: nar/{about} has no regular file {_member(name)}, or is not in storage"
            )
        await self._publish(name, file)

    async def claim(self, file: str, admitted: Admitted, token: Token) -> None:
        """Publish what a token brought about a path, and about the NAR that it uploaded as `file`.

        The NAR, which is stored, waits no more.
        """
        path, nar = admitted
        # if the token does not cover it, a trusted key let its narinfo in, which says nothing of these
        owner = token.id if token.may(path.info.store_path.name) else None
        waiting = await self._threads.run(
            self._take, owner, (path.info.store_path.hash_part, file), file
        )
        pointers = [name for _, name, _ in waiting if name.startswith(_DEBUGINFO)]
        found = await self._in_nar(pointers, nar)
        for about, name, lies in waiting:
            if name.startswith(_DEBUGINFO) and name not in found:
                _log.warning("dropped: %s: nar/%s has no such build id", name, nar.file)
                await self._threads.run(self._waiting.drop, lies)
                continue
            if about == file != nar.file:  # an upstream's lie has its name
                await self._threads.run(self._waiting.change, lies, file, nar.file)
            await self._threads.run(self._publish_waiting, lies, name)

    def _take(
        self, owner: str | None, abouts: tuple[str, ...], file: str
    ) -> list[tuple[str, str, Path]]:
        """In a thread: see `WaitingFiles.take`; and let the NAR wait no more."""
        found = [] if owner is None else self._waiting.take(owner, abouts)
        self._folder.local.discard_upload(file)
        return found

    async def _in_nar(self, names: list[str], nar: NarRecord) -> frozenset[str]:
        """Of some debug-info pointers, those whose build id is in the NAR, which is in storage."""
        if not names or not nar.stored:
            return frozenset()
        members = {_member(name).encode(): name for name in names}
        try:
            async with self._looking:
                found = await self._threads.run_transfer(
                    stored_files, nar, self._folder.local, frozenset(members)
                )
        except (Refused, Malformed) as error:
            _log.warning("nar/%s cannot be looked into: %s", nar.file, error)
            return frozenset()
        return frozenset(members[member] for member in found)

    async def _about(self, name: str, file: OpenFile) -> tuple[str, list[Admitted]]:
        """The hash part or NAR file that a file is about, and the paths here."""
        try:
            if name.startswith(_DEBUGINFO):
                about = _archive(await self._threads.run(pointer, file, name), name)
                return about, await self._index.paths_of(about)
            await self._threads.run(check_listing, file, name)
        except Malformed as error:
            raise BadUpload(str(error)) from error
        about = name.removesuffix(".ls")
        admitted = await self._index.path(about)
        return about, [admitted] if admitted else []

    def _publish_waiting(self, path: Path, name: str) -> None:
        """In a thread: give a file that waited its name, as far as there is room."""
        try:
            self._waiting.publish(path, name, self._uploaded.room)
        except StorageFull as error:  # its path was taken, and is served without it
            _log.warning("not published: %s: %s", name, error)

    async def _publish(self, name: str, file: OpenFile) -> None:
        assert file.path is not None  # it is on its way in
        await self._threads.run(self._publish_new, name, file, file.path)

    def _publish_new(self, name: str, file: OpenFile, path: Path) -> None:
        local = self._folder.local
        if _is_here(local, name, path):
            return  # what is there takes no more room
        with self._uploaded.room(file.size):
            if local.publish_new(file.descriptor, path, name):
                return
        if not _is_here(local, name, path):  # another was faster, and is gone again
            raise Unavailable(f"{name} is coming and going; bring it again")


def _is_here(storage: LocalStorage, name: str, path: Path) -> bool:
    """In a thread: whether there is the same file already; UploadConflict if there is another."""
    if storage.lacks(name):
        return False
    with storage_errors():
        if not filecmp.cmp(path, storage.path(name), shallow=False):
            raise UploadConflict(f"{name} is here already, with other content")
    return True


def _archive(found: tuple[str, str], name: str) -> str:
    """The NAR file that a debug-info pointer names, here and nowhere else."""
    archive, member = found
    match = _ARCHIVE.fullmatch(archive)
    if not match:
        raise BadUpload(f"{name}: {archive[:200]!r} is not ../nar/<file> of this cache")
    if member != _member(name):
        raise BadUpload(f"{name}: {member[:200]!r} is not {_member(name)}")
    return match[2]


def _member(name: str) -> str:
    """The file of a NAR that a debug-info pointer of this name is about, as Nix finds it there."""
    build_id = name.removeprefix(_DEBUGINFO).removesuffix(".debug")
    return f"lib/debug/.build-id/{build_id[:2]}/{build_id[2:]}.debug"


def _check_scope(token: Token, names: list[str], thing: str) -> None:
    if not any(token.may(name) for name in names):
        raise Forbidden(
            f"{thing} is about {', '.join(names[:4])}; the token {token.name} covers"
            f" {', '.join(token.allow) or 'nothing'}"
        )
