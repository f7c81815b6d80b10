"""Realisations: verified like narinfos, because Nix 2.34 does not verify them; countersigned."""

from __future__ import annotations

from time import monotonic

from narseal.custody.requests import RealisationRequest
from narseal.custody.tokens import Token
from narseal.errors import (
    BadUpload,
    Denied,
    Forbidden,
    Malformed,
    MalformedRealisation,
    NotFound,
    Refused,
    UploadConflict,
)
from narseal.nix import realisation
from narseal.nix.keys import plausible
from narseal.nix.realisation import Entry, parse_at
from narseal.pipeline.caches import Negatives
from narseal.pipeline.paths.admission import Admission
from narseal.pipeline.services import Services
from narseal.runtime.single_flight import SingleFlight
from narseal.telemetry import metrics
from narseal.upstream import Upstream
from narseal.upstream.race import Answers, in_order


class Realisations:
    """Both spellings, by the address below the store URL."""

    def __init__(self, services: Services, admission: Admission) -> None:
        limits = services.config.limits
        self._admission = admission
        self._policy = services.policy
        self._upstreams = services.upstreams
        self._index = services.index
        self._countersigner = services.countersigner
        self._epoch = services.epoch
        self._flights: SingleFlight[str, bytes] = SingleFlight(
            services.tasks, on_joined=metrics.flights_joined.inc
        )
        self._negatives = Negatives(
            ttl=limits.negative_ttl,
            entries=limits.negative_entries,
            clock=monotonic,
            epoch=services.epoch,
        )

    async def get(self, name: str) -> bytes:
        """The rendered file of `realisations/…` or `build-trace-v2/…` (percent-decoded).

        Raises NotFound, Refused, Malformed (all 404), Denied (403) or Trouble.
        """
        stored = await self._index.realisation(name)
        if stored is not None:
            entry = parse_at(name, stored)
            await self._check(entry)
            return await self._countersigned(name, entry, stored)
        if (known := self._negatives.get(name)) is not None:
            raise known
        return await self._flights.join(name, lambda: self._admit(name))

    async def _admit(self, name: str) -> bytes:
        answers = Answers()
        async with in_order(
            self._upstreams, lambda u: self._ask(u, name), answers, thing=name
        ) as found:
            async for _, (entry, evidence) in found:
                await self._check(entry)
                return await self._countersigned(name, entry, None, evidence)
        verdict = answers.verdict(name)
        if isinstance(verdict, NotFound | Refused | MalformedRealisation):
            self._negatives.put(name, verdict)
        raise verdict

    async def _ask(self, upstream: Upstream, name: str) -> tuple[Entry, str]:
        data = await upstream.get(name, limit=realisation.MAX_BYTES)
        if data is None:
            raise NotFound(f"{upstream.config.url} has no {name}")
        revoked = (await self._index.revocations.now()).keys
        with metrics.verifying("nix"):
            entry = parse_at(name, data)
            message = entry.fingerprint()
            pinned = {
                key.name: key for key in upstream.config.public_keys if key.name not in revoked
            }
            known = pinned | self._countersigner.public_keys
            good = [
                s
                for s in entry.signatures
                if s.key_name in known and known[s.key_name].verifies(message, s)
            ]
            evidence = next((s.key_name for s in good if s.key_name in pinned), None)
            if evidence is None:
                raise Refused("unsigned", f"{name}: no signature by a key of {upstream.config.url}")
        foreign = [s for s in entry.signatures if s.key_name not in known]
        return entry.with_signatures(tuple(sorted([*good, *foreign]))), f"signature {evidence}"

    async def put(self, name: str, data: bytes, token: Token) -> None:
        """Take an uploaded realisation of a path that is here and that the token covers.

        BadUpload, UploadConflict or Forbidden if it is not taken.
        """
        try:
            entry = parse_at(name, data)
        except Malformed as error:
            raise BadUpload(str(error)) from error
        out = entry.out_path
        if not token.may(out.name):
            raise Forbidden(f"the token {token.name} does not cover {out.name}")
        if await self._index.path(out.hash_part) is None:
            raise BadUpload(f"{name}: {out} is not here: upload it first")
        message = entry.fingerprint()
        kept = set(plausible(entry.signatures, self._countersigner.public_keys, message))
        stored = await self._index.realisation(name)
        if stored is not None:
            present = parse_at(name, stored)
            if present.fingerprint() != message:
                raise UploadConflict(f"{name} is here with {present.out_path}")
            kept |= set(present.signatures)
        merged = entry.with_signatures(tuple(sorted(kept)))
        evidence = f"upload {token.id}"
        try:
            await self._check(entry)
            await self._countersigned(name, merged, stored, evidence)
        except Denied:  # signed once its path may be served
            await self._index.put_realisation(name, merged.render(), evidence)
        self._epoch.arrive()

    async def _check(self, entry: Entry) -> None:
        """Denied if policy keeps the path back that it is about; else as `Admission.path`."""
        if self._policy.active:
            await self._admission.path(entry.out_path.hash_part)

    async def _countersigned(
        self, name: str, entry: Entry, stored: bytes | None, evidence: str = "stored"
    ) -> bytes:
        request = RealisationRequest(name, entry)
        signatures = await self._countersigner.countersign(request, entry.signatures)
        body = entry.with_signatures(signatures).render()
        if body != stored:
            await self._index.put_realisation(name, body, evidence)
        return body
