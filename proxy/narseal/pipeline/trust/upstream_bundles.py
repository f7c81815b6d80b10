"""Holding an upstream to the Sigstore bundles that it has beside its NARs (`verify = "bundle"`)."""

from __future__ import annotations

from narseal.cosign.bundle import MAX_BYTES
from narseal.cosign.statement import contradictions
from narseal.errors import Refused
from narseal.nix.hashes import Hash
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.trust.evidence import Evidence
from narseal.pipeline.trust.sigstore import ExpectedSigners, verified
from narseal.runtime.threads import ThreadPools
from narseal.upstream import Upstream


class UpstreamBundles:
    """`<URL>.sigstore.json` of upstreams that promise them."""

    def __init__(self, signers: ExpectedSigners, threads: ThreadPools) -> None:
        self._signers = signers
        self._threads = threads

    async def check(
        self, upstream: Upstream, info: NarInfo, evidence: Evidence, file_hash: Hash
    ) -> None:
        """The bundle is by whom the configuration names, over the file that was fetched.

        A signature over bytes does not say which store path they are. So where nothing else
        speaks for the path (no signature by a pinned key, no content address), the bundle must
        be a statement that names it and says of it what the narinfo says. Refused or Malformed
        if not; Trouble if it cannot be had.
        """
        data = await upstream.get(f"{info.url}.sigstore.json", limit=MAX_BYTES)
        if data is None:
            raise Refused("bad-bundle", f"{info.store_path}: the upstream has no bundle of its NAR")
        verifier = await self._threads.run(self._signers.verifier, upstream.config.who)
        found = await self._threads.run(verified, verifier, data, file_hash.digest)
        statement = found.statement
        if statement is not None and statement.predicate.get("paths") is not None:
            wrong = contradictions(statement, info)
        elif evidence.text == "bundle":
            wrong = ["it is over the file alone and does not name the path"]
        else:
            wrong = []
        if wrong:
            raise Refused("bad-bundle", f"{info.store_path}: {'; '.join(wrong[:4])}")
