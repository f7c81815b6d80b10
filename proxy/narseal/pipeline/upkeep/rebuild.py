"""Putting back into the index what the storage folder has and the index has not.

For an index that was lost, or restored from an older backup. A path is taken on the word of an
operator's key that is not revoked, and after its file was hashed; nothing is signed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

from narseal.errors import Malformed, NarsealError, Refused
from narseal.nix.addressing import check_content_address
from narseal.nix.compression import is_file_name
from narseal.nix.keyring import KeyRing
from narseal.nix.narinfo import MAX_SIGNATURES, NarInfo
from narseal.pipeline.nars.inspect import inspect_stored
from narseal.runtime.threads import ThreadPools
from narseal.storage import Index, LocalStorage, NarRecord, PathRecord


class Rebuilding:
    """The work of `narseal index rebuild`."""

    def __init__(
        self,
        *,
        index: Index,
        storage: LocalStorage,
        keys: KeyRing,
        pinned: KeyRing,
        threads: ThreadPools,
    ) -> None:
        self._index = index
        self._storage = storage
        self._keys = keys
        self._pinned = pinned
        self._threads = threads

    async def run(self) -> AsyncIterator[tuple[str, NarsealError | None]]:
        """Each path that was put back, or that could not be, with why."""
        for name in await self._threads.run(self._storage.narinfos):
            if await self._index.path(name.removesuffix(".narinfo")) is None:
                error: NarsealError | None = None
                try:
                    await self._put_back(name)
                except (Refused, Malformed) as caught:
                    error = caught
                yield name, error

    async def _put_back(self, name: str) -> None:
        data = await self._threads.run(self._storage.read, name)
        info = NarInfo.parse(data or b"", store_dir=self._index.store_dir)
        folder, _, file = info.url.partition("/")
        if f"{info.store_path.hash_part}.narinfo" != name or folder != "nar":
            raise Refused("wrong-path", f"{name} is of {info.store_path} at {info.url[:100]!r}")
        if not is_file_name(file, info.compression):
            raise Refused("wrong-compression", f"{name}: {info.url} is not {info.compression}")
        check_content_address(info)
        signer = await self._signer(info)
        known = KeyRing.of(self._keys.keys, self._pinned.keys)
        info = info.with_signatures(
            known.kept(info.fingerprint(), info.signatures, most=MAX_SIGNATURES)
        )
        path = self._storage.path(info.url)
        measured = await self._threads.run_transfer(inspect_stored, info, path)
        record = NarRecord.from_file(
            info, file, file_hash=measured.file_hash, file_size=measured.file_size
        )
        bound = await self._index.bind(record)
        if bound.file != record.file:
            raise Refused("conflict", f"{info.url} already stands for another NAR")
        stored = replace(record, stored=True)
        await self._index.publish(bound, stored)
        await self._index.admit(PathRecord(info, stored.file, f"folder signature {signer}"), stored)

    async def _signer(self, info: NarInfo) -> str:
        """On whose word the path rests: a pinned key's if one signed, else ours. Ours must have.

        So that what is revoked later takes away what it spoke for.
        """
        revoked = (await self._index.revocations.now()).keys
        message = info.fingerprint()
        own = self._keys.without(revoked).signer(message, info.signatures)
        if own is None:
            raise Refused(
                "unsigned", f"{info.store_path}: no good signature by a key of the operator's"
            )
        return self._pinned.without(revoked).signer(message, info.signatures) or own
