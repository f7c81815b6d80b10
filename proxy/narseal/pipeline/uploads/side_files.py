"""Listings, logs and debug-info pointers that uploaders bring: each within its token's scope.

`nix copy` brings a path's listing and debug info before its narinfo. Until a narinfo by the same token
vouches for them they wait, unseen.
"""

from __future__ import annotations

import re

from narseal.custody.tokens import Token
from narseal.errors import BadUpload, Forbidden, Malformed, UploadConflict
from narseal.nix.base32 import CHARS
from narseal.pipeline.paths.side_files import check_listing, json_object, pointer
from narseal.pipeline.services import Services
from narseal.storage import Admitted
from narseal.storage.waiting import WaitingFiles

_ARCHIVE = re.compile(rf"(\.\./)?nar/({CHARS}{{52}}\.nar(\.[a-z0-9]{{2,4}})?)", re.ASCII)
_MEMBER = re.compile(r"[!-~]{1,1024}", re.ASCII)


class SideFileUploads:
    """What may be put beside a path."""

    def __init__(self, services: Services) -> None:
        self._index = services.index
        self._folder = services.folder
        self._threads = services.threads
        self._waiting = WaitingFiles(services.folder.local)

    async def put(self, name: str, data: bytes, token: Token) -> None:
        """Take a file; BadUpload if it is none, Forbidden if the token does not cover its path.

        UploadConflict if another is there: nobody's file is overwritten.
        """
        if name.startswith("log/"):
            derivation = name.removeprefix("log/")[33:].removesuffix(".drv")
            _check_scope(token, [derivation], name)
            await self._publish(name, data)
            return
        try:
            tree = await self._threads.run(json_object, data, name)
            if name.startswith("debuginfo/"):
                about = _archive(pointer(tree, name), name)
                paths = [path for path, _ in await self._index.paths_of(about)]
            else:
                check_listing(tree, name)
                about = name.removesuffix(".ls")
                found = await self._index.path(about)
                paths = [found[0]] if found else []
        except Malformed as error:
            raise BadUpload(str(error)) from error
        if not paths:
            await self._threads.run(self._waiting.keep, token.id, about, name, data)
            return
        _check_scope(token, [path.info.store_path.name for path in paths], name)
        await self._publish(name, data)

    async def claim(self, file: str, admitted: Admitted, token: Token) -> None:
        """Publish what a token brought about a path, and about the NAR file that it uploaded as `file`."""
        path, nar = admitted
        for about in (path.info.store_path.hash_part, file):
            for name, data in await self._threads.run(self._waiting.take, token.id, about):
                if await self._folder.read(name) is None:
                    await self._folder.write(name, _renamed(data, file, nar.file))
            await self._threads.run(self._waiting.drop, token.id, about)

    async def _publish(self, name: str, data: bytes) -> None:
        present = await self._folder.read(name)
        if present is None:
            await self._folder.write(name, data)
        elif present != data:
            raise UploadConflict(f"{name} is here already, with other content")


def _archive(found: tuple[str, str], name: str) -> str:
    """The NAR file that a debug-info pointer names, here and nowhere else."""
    archive, member = found
    match = _ARCHIVE.fullmatch(archive)
    if not match or not _MEMBER.fullmatch(member) or ".." in member.split("/"):
        raise BadUpload(f"{name}: {archive[:200]!r} is not ../nar/<file> of this cache")
    return match[2]


def _renamed(data: bytes, claimed: str, file: str) -> bytes:
    """A pointer with the name that a NAR file got here."""
    return data if claimed == file else data.replace(claimed.encode(), file.encode())


def _check_scope(token: Token, names: list[str], thing: str) -> None:
    if not any(token.may(name) for name in names):
        raise Forbidden(
            f"{thing} is about {', '.join(names[:4])}; the token {token.name} covers"
            f" {', '.join(token.allow) or 'nothing'}"
        )
