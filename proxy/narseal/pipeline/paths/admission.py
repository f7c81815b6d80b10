"""Admitting store paths: verify, countersign, pin. Steps 2 to 8 of the read path."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from narseal.errors import (
    Denied,
    Malformed,
    NarsealError,
    NotFound,
    Refused,
    UpstreamTimeout,
)
from narseal.nix.inspection import Measured
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.caches import Negatives
from narseal.pipeline.nars.fetcher import Fetcher
from narseal.pipeline.nars.transfer import Origin
from narseal.pipeline.paths.finder import Candidate, Finder
from narseal.pipeline.paths.renewal import Renewal
from narseal.pipeline.services import Services
from narseal.pipeline.trust.upstream_bundles import UpstreamBundles
from narseal.runtime.single_flight import SingleFlight
from narseal.storage import Admitted, NarRecord, PathRecord
from narseal.telemetry import metrics
from narseal.upstream import Upstream
from narseal.upstream.race import Answers

_log = logging.getLogger(__name__)


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
        self._flights: SingleFlight[str, Admitted] = SingleFlight(
            services.tasks, on_joined=metrics.flights_joined.inc
        )
        self._negatives = Negatives(
            ttl=self._config.limits.negative_ttl,
            entries=self._config.limits.negative_entries,
            clock=monotonic,
            epoch=services.epoch,
        )

    async def path(self, hash_part: str) -> Admitted:
        """The admitted, countersigned path of a hash, which policy lets through.

        Raises NotFound, Refused or Malformed (all 404), Denied (403), Trouble (5xx).
        """
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
        can_be_had = found and (found[1].stored or self._services.upstreams)
        if found and can_be_had and not found[0].withdrawn:
            return await self._renewal.renewed(found)
        return await self._admit(hash_part)

    async def _admit(self, hash_part: str) -> Admitted:
        answers = Answers()
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
        if isinstance(verdict, NotFound | Refused | Malformed | Denied):
            self._negatives.put(hash_part, verdict)
        raise verdict

    async def _take(self, upstream: Upstream, candidate: Candidate) -> Admitted:
        """Hold a candidate to its bytes where they come first, countersign it, pin it."""
        info, evidence = candidate.info, candidate.evidence
        self._policy.check_name(info.store_path)
        recompress = self._config.storage.recompress and info.compression in (
            "xz",
            "bzip2",
        )
        if evidence.content_first or recompress:
            self._services.tasks.start(self._prefetch(info), f"references of {info.store_path}")

            async def check(measured: Measured) -> None:
                if upstream.config.verify == "bundle":
                    await self._bundles.check(upstream, info, evidence, measured.file_hash)
                content = frozenset((info.nar_hash.digest, measured.file_hash.digest))
                await self._policy.check(info, content)

            nar = await self._fetcher.fetch_first(info, Origin(upstream, info.url), check)
        else:
            await self._policy.check(info, frozenset((info.nar_hash.digest,)))
            nar = NarRecord.of(info, upstream.config.url)
        signed = await self._renewal.sign(info, nar)
        path, nar = await self._index.admit(PathRecord(signed, nar.file, evidence.text), nar)
        if nar.stored:
            await self._fetcher.publisher.narinfo(path, nar)
        return path, nar

    async def _prefetch(self, info: NarInfo) -> None:
        """Where content comes first, the references will be asked for next."""
        for reference in info.references:
            if reference != info.store_path:
                try:
                    await self.path(reference.hash_part)
                except NarsealError as error:
                    _log.debug("prefetch of %s: %s", reference, error)
