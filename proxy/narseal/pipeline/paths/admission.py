"""Admitting store paths: find, parse, verify, countersign, pin. Steps 2 to 8 of the read path."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic, time

from narseal.config import Config
from narseal.custody.requests import PathRequest
from narseal.errors import (
    Denied,
    Malformed,
    NarsealError,
    NotFound,
    Refused,
    Trouble,
    UpstreamTimeout,
)
from narseal.nix import narinfo
from narseal.nix.addressing import check_content_address
from narseal.nix.hashes import Hash
from narseal.nix.inspection import Measured
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.caches import Negatives
from narseal.pipeline.nars.fetcher import REFUSED_SECONDS, Fetcher
from narseal.pipeline.nars.transfer import Origin
from narseal.pipeline.trust.countersign import Countersigner
from narseal.pipeline.trust.evidence import Evidence, weigh
from narseal.pipeline.trust.policy import Policy, content_digests
from narseal.pipeline.trust.upstream_bundles import Sidecars
from narseal.runtime.single_flight import SingleFlight
from narseal.runtime.tasks import BackgroundTasks
from narseal.storage import Admitted, Epoch, Index, NarRecord, PathRecord
from narseal.telemetry import metrics
from narseal.upstream import Upstream
from narseal.upstream.race import Answers, in_order

_log = logging.getLogger(__name__)

#: What is refused for reasons that another narinfo of the same file need not share.
_NOT_BYTES = ("conflict", "bad-bundle", "signer-refused")


@dataclass(frozen=True, slots=True)
class _Candidate:
    info: NarInfo
    evidence: Evidence


class Admission:
    """The way of a store path into the index."""

    def __init__(
        self,
        config: Config,
        *,
        upstreams: Sequence[Upstream],
        index: Index,
        fetcher: Fetcher,
        countersigner: Countersigner,
        tasks: BackgroundTasks,
        epoch: Epoch,
        sidecars: Sidecars,
        policy: Policy,
    ) -> None:
        self._config = config
        self._sidecars = sidecars
        self._policy = policy
        self._upstreams = sorted(upstreams, key=lambda upstream: upstream.config.priority)
        self._index = index
        self._fetcher = fetcher
        self._countersigner = countersigner
        self._tasks = tasks
        self._epoch = epoch
        self._refusals: tuple[int, dict[tuple[str, str, bytes], tuple[str, float]]] | None = None
        self._lookups = asyncio.Semaphore(config.limits.lookups)
        self._flights: SingleFlight[str, Admitted] = SingleFlight(
            tasks, on_joined=metrics.flights_joined.inc
        )
        self._negatives = Negatives(
            ttl=config.limits.negative_ttl,
            entries=config.limits.negative_entries,
            clock=monotonic,
            epoch=epoch,
        )

    async def path(self, hash_part: str, *, stored_only: bool = False) -> Admitted:
        """The admitted, countersigned path of a hash, which policy lets through.

        With `stored_only`, no upstream is asked: NotFound unless its NAR is in storage. Raises
        NotFound, Refused or Malformed (all 404), Denied (403), Trouble (5xx).
        """
        if stored_only:
            found = await self._index.path(hash_part)
            if not found or found[0].withdrawn or not found[1].stored:
                raise NotFound(f"{hash_part} is not in storage")
            return await self._serve(found)
        if (known := self._negatives.get(hash_part)) is not None:
            raise known
        try:
            async with asyncio.timeout(self._config.limits.content_hold):
                return await self._flights.join(hash_part, lambda: self._find(hash_part))
        except TimeoutError as error:
            raise UpstreamTimeout(
                f"{hash_part}: its NAR is still being fetched and verified; ask again"
            ) from error

    async def _find(self, hash_part: str) -> Admitted:
        found = await self._index.path(hash_part)
        if found and not found[0].withdrawn:
            return await self._serve(found)
        return await self._admit(hash_part)

    async def _serve(self, found: Admitted) -> Admitted:
        await self._policy.check(found[0].info, content_digests(found[0].info, found[1]))
        return await self._renewed(*found)

    async def _renewed(self, path: PathRecord, nar: NarRecord) -> Admitted:
        """An admitted path, with the signatures of keys that came after its admission.

        One that carries a revoked key's signature is signed anew only on evidence that holds.
        """
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
            await self._fetcher.write_narinfo(path, nar)
        return path, nar

    async def renew(self, hash_part: str) -> None:
        """Sign an admitted path anew, as if it had been asked for; see `path`.

        NotFound if it is not admitted, or was withdrawn.
        """
        found = await self._index.path(hash_part)
        if not found or found[0].withdrawn:
            raise NotFound(f"{hash_part} was withdrawn: it had no other evidence")
        await self._serve(found)

    async def strip(self, hash_part: str) -> None:
        """Take revoked keys' signatures off a path that is not served."""
        revoked = (await self._index.revocations.now()).keys
        if found := await self._index.path(hash_part):
            await self._index.sign(hash_part, (), without=revoked)
            await self._fetcher.remove_narinfo(found[0].info)

    async def _verify_anew(self, path: PathRecord, nar: NarRecord, revoked: frozenset[str]) -> None:
        """Hold a path to an upstream's signature, its content address, or its bytes in storage.

        Refused if nothing speaks for it any more: it is withdrawn, and may be admitted anew.
        """
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
                await self._fetcher.verify_stored(info, nar)
        except (Refused, Malformed) as error:
            await self._index.withdraw_path(info.store_path.hash_part)
            await self._fetcher.remove_narinfo(info)
            self._epoch.advance()
            raise Refused(
                "unsigned", f"{info.store_path}: a key was revoked and nothing else speaks for it"
            ) from error

    async def preview(self, hash_part: str) -> tuple[Admitted, bool]:
        """A path as it is admitted, or as it would be, whatever policy says; and which of both.

        Nothing is signed or kept. NotFound, Refused, Malformed or Trouble if nobody has it.
        """
        if found := await self._index.path(hash_part):
            return found, not found[0].withdrawn
        answers = Answers()
        async with in_order(
            self._upstreams, lambda u: self._ask(u, hash_part), answers, thing=hash_part
        ) as candidates:
            async for upstream, candidate in candidates:
                nar = NarRecord.of(candidate.info, upstream.config.url)
                return (PathRecord(candidate.info, nar.file, candidate.evidence.text), nar), False
        raise answers.verdict(hash_part)

    async def origins(self, record: NarRecord, info: NarInfo) -> AsyncIterator[Origin]:
        """Where the very file of an admitted path can be had: its own upstream, then others."""
        own = next((u for u in self._upstreams if u.config.url == record.upstream), None)
        if (
            own
            and record.url
            and not await self._refusal(record.upstream, record.url, record.nar_hash)
        ):
            yield Origin(own, record.url)
        answers = Answers()
        hash_part = info.store_path.hash_part
        others = [upstream for upstream in self._upstreams if upstream is not own]
        async with in_order(
            others, lambda u: self._ask(u, hash_part), answers, thing=hash_part
        ) as found:
            async for upstream, candidate in found:
                if _same_file(record, info, candidate.info):
                    yield Origin(upstream, candidate.info.url)
        if isinstance(verdict := answers.verdict(hash_part), Trouble):
            raise verdict

    async def _admit(self, hash_part: str) -> Admitted:
        answers = Answers()
        thing = f"{hash_part}.narinfo"
        async with in_order(
            self._upstreams, lambda u: self._ask(u, hash_part), answers, thing=thing
        ) as found:
            async for upstream, candidate in found:
                try:
                    return await self._take(upstream, candidate)
                except NarsealError as error:
                    if isinstance(error, Refused | Malformed) and error.reason not in _NOT_BYTES:
                        await self._index.refuse(
                            upstream.config.url,
                            candidate.info.url,
                            candidate.info.nar_hash,
                            error.reason,
                            for_seconds=REFUSED_SECONDS,
                        )
                        self._epoch.advance()
                    answers.note(error, upstream=upstream.config.url, thing=thing)
        verdict = answers.verdict(thing)
        if isinstance(verdict, NotFound | Refused | Malformed | Denied):
            self._negatives.put(hash_part, verdict)
        raise verdict

    async def _ask(self, upstream: Upstream, hash_part: str) -> _Candidate:
        """One upstream's narinfo, parsed and weighed."""
        async with self._lookups:
            data = await upstream.get(f"{hash_part}.narinfo", limit=narinfo.MAX_BYTES)
        if data is None:
            raise NotFound(f"{upstream.config.url} has no {hash_part}.narinfo")
        revoked = (await self._index.revocations.now()).keys
        with metrics.verifying("nix"):
            info = NarInfo.parse(data, store_dir=self._config.store_dir)
            info, evidence = weigh(
                info,
                asked=hash_part,
                upstream=upstream.config,
                own_keys=self._countersigner.public_keys,
                max_nar_size=self._config.limits.nar_size,
                revoked=revoked,
            )
        reason = await self._refusal(upstream.config.url, info.url, info.nar_hash)
        if reason is not None:
            raise Refused("refused-source", f"{info.url} had wrong content lately ({reason})")
        return _Candidate(info, evidence)

    async def _refusal(self, upstream: str, url: str, nar_hash: Hash) -> str | None:
        """Why an upstream's file is not taken for a NAR now; read anew when the epoch changed."""
        now = self._epoch.read()
        if self._refusals is None or self._refusals[0] != now:
            self._refusals = (now, await self._index.refusals())
        reason, until = self._refusals[1].get((upstream, url, nar_hash.digest), (None, 0.0))
        return reason if until > time() else None

    async def _take(self, upstream: Upstream, candidate: _Candidate) -> Admitted:
        """Hold a candidate to its bytes where they come first, countersign it, pin it."""
        info, evidence = candidate.info, candidate.evidence
        self._policy.check_name(info.store_path)
        recompress = self._config.storage.recompress and info.compression in (
            "xz",
            "bzip2",
        )
        if evidence.content_first or recompress:
            self._tasks.start(self._prefetch(info), f"references of {info.store_path}")

            async def check(measured: Measured) -> None:
                if upstream.config.verify == "bundle":
                    await self._sidecars.check(upstream, info, evidence, measured.file_hash)
                content = frozenset((info.nar_hash.digest, measured.file_hash.digest))
                await self._policy.check(info, content)

            nar = await self._fetcher.fetch_first(info, Origin(upstream, info.url), check)
        else:
            await self._policy.check(info, frozenset((info.nar_hash.digest,)))
            nar = NarRecord.of(info, upstream.config.url)
        signed = await self.sign(info, nar)
        path, nar = await self._index.admit(PathRecord(signed, nar.file, evidence.text), nar)
        if nar.stored:
            await self._fetcher.write_narinfo(path, nar)
        return path, nar

    async def sign(self, info: NarInfo, nar: NarRecord) -> NarInfo:
        """Add the signatures of our active keys that are missing; the same value if none is."""
        as_stored = replace(info, compression=nar.compression) if nar.stored else info
        request = PathRequest(as_stored, nar.file if nar.stored else None)
        signatures = await self._countersigner.countersign(request, info.signatures)
        return info if signatures is info.signatures else info.with_signatures(signatures)

    async def _prefetch(self, info: NarInfo) -> None:
        """Where content comes first, the references will be asked for next."""
        for reference in info.references:
            if reference != info.store_path:
                try:
                    await self.path(reference.hash_part)
                except NarsealError as error:
                    _log.debug("prefetch of %s: %s", reference, error)


def _same_file(record: NarRecord, info: NarInfo, other: NarInfo) -> bool:
    """Whether another upstream's narinfo names the very bytes of a record."""
    if other.fingerprint() != info.fingerprint() or other.compression != record.compression:
        return False
    if record.compression == "none":
        return True
    return record.file_hash is not None and other.file_hash == record.file_hash
