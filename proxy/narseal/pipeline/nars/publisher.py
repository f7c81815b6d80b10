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
        self._epoch = services.epoch
        self._ring = services.countersigner.ring
        self._threads = services.threads
        #: Whether other rules than ours are in force by now.
        self.retired = False

    async def nar(self, incoming: Incoming, claimed: NarRecord, true: NarRecord) -> None:
        """Publish verified bytes: fsync, rename, fsync of the folder, index row, narinfos.

        `true` is a bound name; `claimed`, where it is another, goes on as a name of the same bytes.
        """
        await self._folder.publish(incoming, f"nar/{true.file}")
        await self._index.publish(claimed, true)

    async def narinfo(self, hash_part: str) -> None:
        """Make the folder say of a path what the index and policy say now.

        Its narinfo is there if it is served and its NAR is stored. What was withdrawn while the
        file was being written is taken away again.
        """
        if self.retired:  # the workers with the present rules look after it
            self._epoch.ask_for_repair()
            return
        name = f"{hash_part}.narinfo"
        seen = None
        while seen != (mark := self._epoch.read()):
            seen = mark
            found = await self._index.path(hash_part)
            revoked = (await self._index.revocations.now()).keys
            if found and await self._is_visible(*found, revoked):
                info = served(*found)
                kept = tuple(s for s in info.signatures if s.key_name not in revoked)
                await self._folder.write(name, info.with_signatures(kept).render())
            else:
                await self._folder.remove(name)

    async def _is_visible(self, path: PathRecord, nar: NarRecord, revoked: frozenset[str]) -> bool:
        if path.withdrawn or not nar.stored:
            return False
        ring = self._ring.without(revoked)
        if not path.ours - revoked and not ring.signer(path.message, path.signatures):
            return False  # it waits for a signature of ours
        return await self._policy.passes(path.info, content_digests(path.info, nar))

    async def verify_stored(self, info: NarInfo, nar: NarRecord) -> None:
        """Hash a path's file in storage again; Refused or Malformed if it is not what it was."""
        if not nar.stored:
            raise Refused("unsigned", f"{info.store_path}: its content is not in storage")
        found = replace(info, compression=nar.compression)
        measured = await self._threads.run_transfer(
            inspect_stored, found, self._folder.local, nar.file
        )
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
