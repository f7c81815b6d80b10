"""Revoking: first nothing rests on it any more, then everything is looked at again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from narseal.cosign.bundle import Bundle
from narseal.cosign.certificate import CertificateNames
from narseal.cosign.keys import CosignPublicKey
from narseal.errors import ConfigError, Malformed, NarsealError
from narseal.pipeline.paths.renewal import Renewal
from narseal.pipeline.services import Services
from narseal.pipeline.upkeep.repair import Repair
from narseal.storage import Revocation, bundle_name
from narseal.storage.claims import Claims

_PAGE = 500
_SETTLE = 1.0  # seconds after which every answer that was being made has gone out

#: Told how much was looked at, and of what.
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of everything that carried a revoked signature."""

    #: Paths that lost it; those signed anew; those withdrawn, with the reason.
    stripped: int
    signed: int
    withdrawn: tuple[tuple[str, str], ...]
    #: Bundles that are not given out any more.
    bundles: int


class Revoking:
    """The work of `narseal revoke`, beside a narseal that serves, or without one."""

    def __init__(self, services: Services, renewal: Renewal, repair: Repair) -> None:
        self._index = services.index
        self._folder = services.folder
        self._threads = services.threads
        self._countersigner = services.countersigner
        self._renewal = renewal
        self._repair = repair
        self._policy = services.policy
        config = services.config
        self._key_names = {
            *services.countersigner.ring.names,
            *(key.name for upstream in config.upstream for key in upstream.public_keys),
            *(key.name for key in config.upload.trusted_keys),
            *(key.name for key in services.policy.keys),
        }

    async def check_known(self, name: str) -> None:
        """ConfigError if nothing here is of a substituter key of this name: a slip of the pen.

        Known is what is configured, has signed something that is kept, or was revoked before.
        """
        known = self._key_names | (await self._index.revocations.now()).keys
        if name in known:
            return
        for claims in (self._index.paths, self._index.realisations):
            if await claims.signed_by(name, after="", limit=1):
                return
        raise ConfigError(
            f"no key is called {name}; there are: {', '.join(sorted(known)) or 'none'}. To revoke a"
            " name that is not here yet, add --unknown"
        )

    async def revoke(
        self,
        revocation: Revocation,
        progress: Progress,
        *,
        cosign_key: CosignPublicKey | None = None,
    ) -> Outcome:
        """Stop it in every worker at once, strip its signatures, sign anew what still verifies.

        `cosign_key` is the revoked key itself, where it is one: what bears its signature is found
        by verifying it, for a bundle may name any key.
        When this returns, no answer carries them. Unavailable if index or folder cannot be had:
        what is revoked is revoked then, and running it again goes on.
        """
        rested = await self._index.revocations.add(revocation)
        # before a row loses the signature by which the narinfo in the folder is found
        await self._folder.check()
        started = time.monotonic()
        stripped = signed = 0
        withdrawn: list[tuple[str, str]] = []
        if revocation.kind == "key":
            renewal = self._renewal
            kinds = (
                (self._index.paths, renewal.renew_path, renewal.strip_path),
                (self._index.realisations, renewal.renew_realisation, renewal.strip_realisation),
            )
            for claims, renew, strip in kinds:
                async for key in _carrying(claims, revocation.name):
                    stripped += 1
                    try:
                        await renew(key)
                        signed += 1
                    except NarsealError as error:
                        withdrawn.append((key, str(error)))
                        await strip(key)
                    progress("paths", stripped)
            bundles = 0
        else:
            bundles = await self._drop_bundles(revocation, cosign_key, progress)
            for hash_part in rested:
                withdrawn.append((hash_part, "it was admitted on a bundle by whom is revoked"))
                await self._renewal.strip_path(hash_part)
            if self._policy.active:  # what passed by an attestation alone does no more
                await self._repair.look_after_all()
        await asyncio.sleep(max(0.0, _SETTLE - (time.monotonic() - started)))
        await self._countersigner.note(revocation.kind, revocation.name, revocation.reason)
        return Outcome(stripped, signed, tuple(withdrawn), bundles)

    async def _drop_bundles(
        self, revocation: Revocation, key: CosignPublicKey | None, progress: Progress
    ) -> int:
        """Forget bundles that it signed; narseal's own are made anew by the key that is active."""
        count = 0
        for looked, digest in enumerate(await self._index.attestations.digests(), 1):
            data = await self._folder.read(bundle_name(digest))
            if data is not None and await self._threads.run(_is_by, data, revocation, key):
                await self._index.attestations.forget(digest)
                await self._folder.remove(bundle_name(digest))
                count += 1
            progress("bundles", looked)
        count += await self._drop_single(revocation, key)
        await self._index.attestations.enqueue_all()
        return count

    async def _drop_single(self, revocation: Revocation, key: CosignPublicKey | None) -> int:
        """Signatures of single files."""
        count = 0
        after = ""
        while page := await self._index.attestations.singles(after=after, limit=_PAGE):
            for file, data in page:
                if await self._threads.run(_is_by, data, revocation, key):
                    await self._index.attestations.forget_single(file)
                    count += 1
            after = page[-1][0]
        return count


async def _carrying(claims: Claims, name: str) -> AsyncIterator[str]:
    after = ""
    while page := await claims.signed_by(name, after=after, limit=_PAGE):
        for key in page:
            yield key
        after = page[-1]


def _is_by(data: bytes, revocation: Revocation, key: CosignPublicKey | None) -> bool:
    """In a thread: whether a bundle is by a revoked key, or by an identity since it was revoked."""
    try:
        bundle = Bundle.parse(data)
    except Malformed:
        return False
    if key is not None:
        return key.verifies(bundle.signed, bundle.content.signature)
    if bundle.certificate is None:
        return False
    try:
        found = CertificateNames.parse(bundle.certificate)
    except Malformed:
        return False
    named = revocation.name in found.identities and revocation.issuer in found.issuers
    return named and found.began >= revocation.since
