"""The only way for bytes to become visible: a file in the folder, and what the index says of it."""

from __future__ import annotations

from dataclasses import replace

from narseal.errors import Refused
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.nars.inspect import inspect_stored
from narseal.pipeline.services import Services
from narseal.pipeline.trust.policy import content_digests
from narseal.storage import NarRecord, PathRecord
from narseal.storage.folder import Incoming


class Publisher:
    """Publishes NAR files, and narinfos beside them, so that the folder is a binary cache."""

    def __init__(self, services: Services) -> None:
        self._policy = services.policy
        self._folder = services.folder
        self._index = services.index
        self._threads = services.threads

    async def nar(self, incoming: Incoming, claimed: NarRecord, true: NarRecord) -> None:
        """Publish verified bytes: fsync, rename, fsync of the folder, index row, narinfos.

        `true` is a bound name; `claimed`, where it is another, goes on as a name of the same bytes.
        """
        await self._folder.publish(incoming, f"nar/{true.file}")
        await self._index.publish(claimed, true)

    async def narinfo(self, path: PathRecord, nar: NarRecord) -> None:
        """Put a path's narinfo beside its stored NAR, unless policy keeps the path back."""
        if not await self._policy.passes(path.info, content_digests(path.info, nar)):
            return
        name = f"{path.info.store_path.hash_part}.narinfo"
        await self._folder.write(name, served(path, nar).render())

    async def remove_narinfo(self, hash_part: str) -> None:
        """Take a path's narinfo out of the folder."""
        await self._folder.remove(f"{hash_part}.narinfo")

    async def verify_stored(self, info: NarInfo, nar: NarRecord) -> None:
        """Hash a path's file in storage again; Refused or Malformed if it is not what it was."""
        if not nar.stored:
            raise Refused("unsigned", f"{info.store_path}: its content is not in storage")
        path = self._folder.path(f"nar/{nar.file}")
        found = replace(info, compression=nar.compression)
        measured = await self._threads.run_transfer(inspect_stored, found, path)
        if measured.file_hash != nar.file_hash:
            raise Refused("content-mismatch", f"nar/{nar.file}: its hash is {measured.file_hash}")


def served(path: PathRecord, nar: NarRecord) -> NarInfo:
    """The narinfo as clients get it: our URL, our measured values, all signatures."""
    return replace(
        path.info,
        url=f"nar/{nar.file}",
        compression=nar.compression,
        file_hash=nar.file_hash,
        file_size=nar.file_size,
    )
