"""Keeping the signatures of what is admitted as keys come and go."""

from __future__ import annotations

from dataclasses import replace

from narseal.custody.requests import PathRequest
from narseal.errors import Malformed, NotFound, Refused
from narseal.nix.addressing import check_content_address
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.nars.publisher import Publisher
from narseal.pipeline.services import Services
from narseal.pipeline.trust.policy import content_digests
from narseal.storage import Admitted, NarRecord, PathRecord


class Renewal:
    """Signs admitted paths with the keys that are active now, as long as something speaks for them."""

    def __init__(self, services: Services, publisher: Publisher) -> None:
        self._config = services.config
        self._upstreams = services.upstreams
        self._index = services.index
        self._policy = services.policy
        self._countersigner = services.countersigner
        self._publisher = publisher

    async def renewed(self, found: Admitted) -> Admitted:
        """An admitted path that policy lets through, signed by every key that is active now.

        Denied by policy; Refused if it carries a revoked key's signature and no evidence holds
        any more: it is withdrawn then, and may be admitted anew.
        """
        path, nar = found
        await self._policy.check(path.info, content_digests(path.info, nar))
        revoked = (await self._index.revocations.now()).keys
        if revoked and any(s.key_name in revoked for s in path.info.signatures):
            await self._verify_anew(path, nar, revoked)
        signed = await self.sign(path.info, nar)
        if signed is path.info:
            return path, nar
        hash_part = signed.store_path.hash_part
        united = await self._index.sign(hash_part, signed.signatures, without=revoked)
        path = replace(path, info=signed.with_signatures(united))
        if nar.stored:
            await self._publisher.narinfo(path, nar)
        return path, nar

    async def renew(self, hash_part: str) -> None:
        """Sign an admitted path anew, as if it had been asked for; see `renewed`.

        NotFound if it is not admitted, or was withdrawn.
        """
        found = await self._index.path(hash_part)
        if not found or found[0].withdrawn:
            raise NotFound(f"{hash_part} was withdrawn: it had no other evidence")
        await self.renewed(found)

    async def strip(self, hash_part: str) -> None:
        """Take revoked keys' signatures off a path that is not served."""
        revoked = (await self._index.revocations.now()).keys
        if await self._index.path(hash_part):
            await self._index.sign(hash_part, (), without=revoked)
            await self._publisher.remove_narinfo(hash_part)

    async def sign(self, info: NarInfo, nar: NarRecord) -> NarInfo:
        """Add the signatures of our active keys that are missing; the same value if none is."""
        as_stored = replace(info, compression=nar.compression) if nar.stored else info
        request = PathRequest(as_stored, nar.file if nar.stored else None)
        signatures = await self._countersigner.countersign(request, info.signatures)
        return info if signatures is info.signatures else info.with_signatures(signatures)

    async def _verify_anew(self, path: PathRecord, nar: NarRecord, revoked: frozenset[str]) -> None:
        """Hold a path to an upstream's signature, its content address, or its bytes in storage."""
        info = path.info
        message = info.fingerprint()
        pinned = [key for u in self._upstreams for key in u.config.public_keys]
        pinned += self._config.upload.trusted_keys
        signed = any(
            key.verifies(message, signature)
            for signature in info.signatures
            for key in pinned
            if key.name == signature.key_name and key.name not in revoked
        )
        try:
            if not signed and not check_content_address(info):
                await self._publisher.verify_stored(info, nar)
        except (Refused, Malformed) as error:
            await self._index.withdraw_path(info.store_path.hash_part)
            await self._publisher.remove_narinfo(info.store_path.hash_part)
            raise Refused(
                "unsigned", f"{info.store_path}: a key was revoked and nothing else speaks for it"
            ) from error
