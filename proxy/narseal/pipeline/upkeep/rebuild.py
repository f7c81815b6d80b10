"""Putting back into the index what the storage folder has and the index has not.

For an index that was lost, or restored from an older backup. A path is taken on the word of the
operator's keys that are not revoked, and after its file was hashed; nothing is signed. What the folder
shows afterwards is what index and policy say; what was refused is shown no more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from narseal.errors import IndexGone, Malformed, NarsealError, Refused, StorageGone, Unavailable
from narseal.nix.addressing import check_content_address
from narseal.nix.compression import is_file_name
from narseal.nix.keyring import KeyRing
from narseal.nix.keys import Signature
from narseal.nix.narinfo import MAX_SIGNATURES, NarInfo
from narseal.pipeline.nars.inspect import inspect_stored
from narseal.pipeline.nars.publisher import Publisher
from narseal.pipeline.services import Services
from narseal.storage import Admitted, NarRecord, PathRecord

_TRIES = 4


@dataclass(frozen=True, slots=True)
class _Word:
    """Who speaks for a narinfo, of those who are not revoked."""

    #: The signatures that are worth keeping.
    signatures: tuple[Signature, ...]
    #: Names of the operator's keys that signed it.
    own: frozenset[str]
    #: Names on whom the path rests from now on.
    keys: frozenset[str]


class Rebuilding:
    """The work of `narseal index rebuild`."""

    def __init__(self, services: Services, publisher: Publisher) -> None:
        self._index = services.index
        self._storage = services.folder.local
        self._keys = services.countersigner.ring
        config = services.config
        self._pinned = KeyRing.of(
            *(upstream.public_keys for upstream in config.upstream), config.upload.trusted_keys
        )
        self._threads = services.threads
        self._publisher = publisher

    async def run(self) -> AsyncIterator[tuple[str, NarsealError | None]]:
        """Each path that was put back, or that could not be, with why.

        What is refused is set aside; what could not be looked at stays where it is.
        Narinfos that an earlier run set aside are looked at again: the configuration may be another.
        """
        await self._index.recount()
        names = await self._threads.run(self._storage.narinfos)
        for name in names:
            present = await self._index.path(name.removesuffix(".narinfo"))
            if present is None or present[0].withdrawn:
                error = await self._try(name, name, present)
                if isinstance(error, Refused | Malformed):
                    await self._threads.run(self._storage.set_aside, name)
                yield name, error
        for name in sorted(set(await self._threads.run(self._storage.refused_narinfos)) - {*names}):
            if await self._index.path(name.removesuffix(".narinfo")) is None:
                yield name, await self._try(name, self._storage.refused_name(name))

    async def orphans(self) -> list[str]:
        """Files below nar/ that stand for nothing: nobody knows any more what they are."""
        files = await self._threads.run(self._storage.names, "nar")
        return [f"nar/{file}" for file in files if await self._index.nar(file) is None]

    async def _try(
        self, name: str, lies: str, present: Admitted | None = None
    ) -> NarsealError | None:
        """Put the path of a narinfo back that `lies` there, or say why not.

        StorageGone or IndexGone if nothing can be said of any.
        """
        try:
            if present:  # what it rested on may have been taken back, whoever else signed it since
                raise Refused("revoked", f"{present[0].info.store_path} was withdrawn")
            if not await self._threads.run(self._storage.is_regular, lies):
                raise Refused("unsigned", f"{lies} is not a regular file")
            data = await self._threads.run(self._storage.read, lies)
            await self._put_back(name, NarInfo.parse(data or b"", store_dir=self._index.store_dir))
        except (StorageGone, IndexGone):
            raise
        except (Refused, Malformed, Unavailable) as error:
            return error
        return None

    async def _put_back(self, name: str, info: NarInfo) -> None:
        folder, _, file = info.url.partition("/")
        if f"{info.store_path.hash_part}.narinfo" != name or folder != "nar":
            raise Refused("wrong-path", f"{name} is of {info.store_path} at {info.url[:100]!r}")
        if not is_file_name(file, info.compression):
            raise Refused("wrong-compression", f"{name}: {info.url} is not {info.compression}")
        check_content_address(info)
        await self._word(info)  # before a large file is read for nothing
        measured = await self._threads.run_transfer(inspect_stored, info, self._storage, file)
        record = NarRecord.from_file(
            info, file, file_hash=measured.file_hash, file_size=measured.file_size
        )
        bound = await self._index.bind(record)
        if bound.file != record.file:
            raise Refused("conflict", f"{info.url} already stands for another NAR")
        stored = replace(record, stored=True)
        await self._index.publish(bound, stored)
        await self._admit(info, stored)
        await self._publisher.narinfo(info.store_path.hash_part)
        await self._threads.run(self._storage.forget_refused, name)

    async def _admit(self, info: NarInfo, stored: NarRecord) -> None:
        """Pin a measured path; if a key is revoked meanwhile, on the word of the others."""
        for _ in range(_TRIES):
            word = await self._word(info)
            path = PathRecord(
                info.with_signatures(word.signatures),
                stored.file,
                f"folder signature {' '.join(sorted(word.keys))}",
                ours=word.own,
            )
            try:
                await self._index.admit(path, stored)
            except Refused as error:
                if error.reason != "revoked":
                    raise
            else:
                return
        raise Unavailable(f"{info.store_path}: keys are being revoked; run it again")

    async def _word(self, info: NarInfo) -> _Word:
        """On whose word the path rests: of all pinned keys that signed, else of all of ours.

        Ours must have. So that what is revoked later takes away what it spoke for, and no more. What
        a pinned key signed that is revoked, and no other did, is refused: ours may rest on its word.
        """
        revoked = (await self._index.revocations.now()).keys
        message = info.fingerprint()
        signatures = [s for s in info.signatures if s.key_name not in revoked]
        own = {s.key_name for s in self._keys.verified(message, signatures)}
        if not own:
            raise Refused(
                "unsigned", f"{info.store_path}: no good signature by a key of the operator's"
            )
        speaking = {s.key_name for s in self._pinned.verified(message, info.signatures)}
        pinned = speaking - revoked
        if speaking and not pinned:
            raise Refused(
                "revoked",
                f"{info.store_path}: {', '.join(sorted(speaking))} signed it and is revoked, and"
                " nothing tells whether our signature rested on anything else",
            )
        known = KeyRing.of(self._keys.keys, self._pinned.keys)
        kept = known.kept(message, signatures, most=MAX_SIGNATURES)
        return _Word(kept, frozenset(own), frozenset(pinned or own))
