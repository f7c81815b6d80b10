"""Admitting store paths: verify, countersign, pin. Steps 2 to 8 of the read path."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from narseal.errors import (
    ContentMismatch,
    Denied,
    Malformed,
    NarsealError,
    NotFound,
    Refused,
    Trouble,
    Unavailable,
)
from narseal.nix.inspection import Measured, check_addressed
from narseal.pipeline.nars.fetcher import Fetcher
from narseal.pipeline.nars.transfer import Origin
from narseal.pipeline.paths.finder import Candidate, Finder
from narseal.pipeline.paths.lookup import Lookup
from narseal.pipeline.paths.prefetch import References
from narseal.pipeline.paths.renewal import Renewal, path_request
from narseal.pipeline.services import Services
from narseal.pipeline.trust.evidence import CONTENT_ADDRESS
from narseal.pipeline.trust.sigstore import signer_of
from narseal.pipeline.trust.upstream_bundles import UpstreamBundles
from narseal.storage import Admitted, NarRecord, PathRecord, still_says
from narseal.storage.claims import verified_by
from narseal.upstream import Upstream
from narseal.upstream.race import Answers

if TYPE_CHECKING:
    from narseal.cosign.verify import Verified

_log = logging.getLogger(__name__)
_TRIES = 4


class Admission:
    """The way of a store path into the index, and out of it to whoever asks.

    Where there are no upstreams, a path whose NAR is not stored cannot be had: it is absent.
    """

    def __init__(
        self,
        services: Services,
        finder: Finder,
        fetcher: Fetcher,
        renewal: Renewal,
        bundles: UpstreamBundles,
    ) -> None:
        self._services = services
        self._config = services.config
        self._index = services.index
        self._policy = services.policy
        self._finder = finder
        self._fetcher = fetcher
        self._renewal = renewal
        self._bundles = bundles
        kind = "narinfo" if services.upstreams else ""
        self._lookup: Lookup[Admitted] = Lookup(services, self._admit, look=self._find, kind=kind)
        #: Brings references in advance.
        self.references = References(services, self.path, self._lookup.is_under_way)

    async def path(self, hash_part: str) -> Admitted:
        """The admitted, countersigned path of a hash, which policy lets through.

        Raises NotFound, Refused or Malformed (all 404), Denied (403), Trouble (5xx).
        """
        return await self._lookup.get(hash_part)

    async def _find(self, hash_part: str) -> Admitted | None:
        found = await self._index.path(hash_part)
        can_be_had = found and (found[1].stored or self._services.upstreams)
        if found and can_be_had and not found[0].withdrawn:
            return await self._renewed(found)
        return None

    async def _renewed(self, found: Admitted) -> Admitted:
        """As `Renewal.path`; what lacks signatures that its rule asks for is asked for them first."""
        try:
            return await self._renewal.path(found)
        except Denied:
            if (again := await self._with_more_signatures(found[0])) is None:
                raise
        renewed = await self._renewal.path(again)
        if renewed[1].stored:
            await self._fetcher.publisher.narinfo(renewed[0].info.store_path.hash_part)
        return renewed

    async def _with_more_signatures(self, path: PathRecord) -> Admitted | None:
        """A path that is kept back, with the upstreams' signatures that it lacked; None: no more.

        The rule may be younger than the path. What is pinned stays what it is.
        """
        store_path, message = path.info.store_path, path.message
        revoked = (await self._index.revocations.now()).keys
        asked_for = self._policy.signers(store_path).without(revoked)
        good = await verified_by(asked_for, message)(path.signatures)
        if not self._services.upstreams or set(asked_for.names) <= {s.key_name for s in good}:
            return None
        try:
            more = await self._finder.signatures(path)
        except (NotFound, Trouble) as error:
            _log.debug("%s: no more signatures: %s", store_path, error)
            return None
        known = self._finder.known_signers(store_path).without(revoked)
        good = await verified_by(known, message)(path.signatures)
        has = {signature.key_name for signature in good}
        new = {signature for signature in more if signature.key_name not in has}
        if not new:
            return None
        # what only bears the name of a key takes no room from what is by it
        false = [s for s in path.signatures if s.key_name in known and s not in good]
        with suppress(NotFound):  # it was withdrawn, or is another one by now
            await self._index.paths.sign(
                store_path.hash_part,
                new,
                drop=false,
                verified=verified_by(known, message),
                only=still_says(path),
            )
            return await self._index.path(store_path.hash_part)
        return None

    async def _admit(self, hash_part: str) -> Admitted:
        answers, arrivals = Answers(), self._services.epoch.arrivals()
        thing = f"{hash_part}.narinfo"
        async with self._finder.candidates(hash_part, answers) as found:
            async for upstream, candidate in found:
                try:
                    return await self._take(upstream, candidate)
                except NarsealError as error:
                    if isinstance(error, Refused | Malformed):
                        await self._finder.refuse(upstream, candidate.info, error)
                    answers.note(error, upstream=upstream.config.url, thing=thing)
        verdict = answers.verdict(thing)
        self._lookup.remember(hash_part, verdict, arrivals)
        raise verdict

    async def _take(self, upstream: Upstream, candidate: Candidate) -> Admitted:
        """Hold a candidate to its bytes where they come first, countersign it, pin it."""
        self._policy.check_name(candidate.info.store_path)
        for _ in range(_TRIES):
            nar, bundle = await self._measured(upstream, candidate)
            try:
                admitted = await self._pin(upstream, candidate, nar, bundle)
                break
            except Refused as error:
                if error.reason != "revoked":
                    raise
                # what is left is weighed, measured and judged anew
                revoked = (await self._index.revocations.now()).keys
                candidate = self._finder.weigh(upstream, candidate.info, revoked)
        else:
            raise Unavailable(f"{candidate.info.store_path}: keys are being revoked; ask again")
        if bundle:  # whose signer may have been revoked since
            await self._recheck(upstream, bundle, candidate.info.store_path.hash_part)
        if admitted[1].stored:
            await self._fetcher.publisher.narinfo(candidate.info.store_path.hash_part)
        return admitted

    async def _recheck(self, upstream: Upstream, bundle: Verified, hash_part: str) -> None:
        try:
            await self._bundles.check_signer(upstream, bundle)
        except Refused:
            await self._index.paths.withdraw(hash_part)
            raise

    async def _pin(
        self, upstream: Upstream, candidate: Candidate, nar: NarRecord, bundle: Verified | None
    ) -> Admitted:
        """Countersign and pin; Refused("revoked") if a key was revoked meanwhile."""
        evidence = candidate.evidence.text
        if bundle:
            rest = "" if evidence == "bundle" else f" {evidence}"
            evidence = f"bundle {signer_of(bundle, upstream.config.who)}{rest}"
        record = PathRecord(candidate.info, nar.file, evidence)
        signed = await self._renewal.sign(record, path_request(record, nar))
        return await self._index.admit(signed, nar)

    async def _measured(
        self, upstream: Upstream, candidate: Candidate
    ) -> tuple[NarRecord, Verified | None]:
        """The NAR, fetched and hashed where its content comes first; and its bundle, if it has one."""
        info, evidence = candidate.info, candidate.evidence
        self.references.of(info)
        recompress = self._config.storage.recompress and info.compression in ("xz", "bzip2")
        if not evidence.content_first and not recompress:
            await self._policy.check(info, frozenset((info.nar_hash.digest,)))
            return NarRecord.of(info, upstream.config.url), None
        bundles: list[Verified] = []

        async def check(measured: Measured) -> None:
            if evidence.text == CONTENT_ADDRESS:
                check_addressed(info, measured)
            if measured.missing:
                lacks = ", ".join(sorted(measured.missing)[:4])
                raise ContentMismatch(
                    "wrong-references",
                    f"{info.store_path}: its NAR does not contain {lacks}, to which its narinfo"
                    " refers, and nobody signed that it does",
                )
            if upstream.config.verify == "bundle":
                bundles.append(
                    await self._bundles.check(upstream, info, evidence, measured.file_hash)
                )
            content = frozenset((info.nar_hash.digest, measured.file_hash.digest))
            await self._policy.check(info, content)

        origin = Origin(upstream, info.url)
        nar = await self._fetcher.fetch_first(info, origin, check, scan=evidence.scan)
        return nar, bundles[0] if bundles else None
