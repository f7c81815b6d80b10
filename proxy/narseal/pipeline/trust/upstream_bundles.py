"""Holding an upstream to the Sigstore bundles that it has beside its NARs (`verify = "bundle"`)."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

from narseal.cosign.bundle import MAX_BYTES
from narseal.cosign.statement import contradictions
from narseal.errors import Refused
from narseal.nix.hashes import Hash
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.trust.evidence import Evidence
from narseal.pipeline.trust.sigstore import ExpectedSigners, check_not_revoked, verified
from narseal.runtime.slots import aside
from narseal.runtime.threads import ThreadPools
from narseal.storage import Revocations
from narseal.upstream import Upstream

if TYPE_CHECKING:
    from narseal.cosign.verify import Verified

_AT_ONCE = 2


class UpstreamBundles:
    """`<URL>.sigstore.json` of upstreams that promise them."""

    def __init__(
        self, signers: ExpectedSigners, revocations: Revocations, threads: ThreadPools
    ) -> None:
        self._signers = signers
        self._revocations = revocations
        self._threads = threads
        # a bundle may have 24 MiB; of each upstream, so that one that hangs holds up no other's
        self._reading: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_AT_ONCE)
        )

    async def check(
        self, upstream: Upstream, info: NarInfo, evidence: Evidence, file_hash: Hash
    ) -> Verified:
        """The bundle is by whom the configuration names, over the file that was fetched.

        A signature over bytes does not say which store path they are. So where nothing else
        speaks for the path (no signature by a pinned key, no content address), the bundle must
        be a statement that names it and says of it what the narinfo says. Refused or Malformed
        if not; Trouble if it cannot be had.
        """
        verifier = await self._threads.run(self._signers.verifier, upstream.config.who)
        async with aside(), self._reading[upstream.config.url]:
            data = await upstream.get(f"{info.url}.sigstore.json", limit=MAX_BYTES)
            if data is None:
                raise Refused(
                    "bad-bundle", f"{info.store_path}: the upstream has no bundle of its NAR"
                )
            found = await self._threads.run(verified, verifier, data, file_hash.digest)
        await self.check_signer(upstream, found)
        statement = found.statement
        if statement is not None and statement.predicate.get("paths") is not None:
            wrong = contradictions(statement, info)
        elif evidence.text == "bundle":
            wrong = ["it is over the file alone and does not name the path"]
        else:
            wrong = []
        if wrong:
            raise Refused("bad-bundle", f"{info.store_path}: {'; '.join(wrong[:4])}")
        return found

    async def check_signer(self, upstream: Upstream, found: Verified) -> None:
        """Refused if whoever signed is revoked by now."""
        check_not_revoked(found, upstream.config.who, await self._revocations.now())
