"""Realisations: verified like narinfos, because Nix 2.34 does not verify them; countersigned."""

from __future__ import annotations

from dataclasses import replace

from narseal.custody.requests import RealisationRequest
from narseal.custody.tokens import Token
from narseal.errors import (
    BadUpload,
    Denied,
    Forbidden,
    Malformed,
    NarsealError,
    NotFound,
    Refused,
    Unavailable,
    UploadConflict,
)
from narseal.nix import realisation
from narseal.nix.keyring import KeyRing
from narseal.nix.narinfo import MOST_BUT_OURS
from narseal.nix.realisation import BuildTraceEntry, Entry, parse_at
from narseal.pipeline.paths.admission import Admission
from narseal.pipeline.paths.lookup import Lookup
from narseal.pipeline.paths.renewal import Renewal
from narseal.pipeline.services import Services
from narseal.runtime.threads import by_size
from narseal.storage import RealisationRecord
from narseal.storage.claims import verified_by
from narseal.storage.records import is_void, says
from narseal.telemetry import metrics
from narseal.upstream import Upstream
from narseal.upstream.race import Answers, in_order

_TRIES = 4


class Realisations:
    """Both spellings, by the address below the store URL."""

    def __init__(self, services: Services, renewal: Renewal, admission: Admission) -> None:
        self._admission = admission
        self._policy = services.policy
        self._upstreams = services.upstreams
        self._index = services.index
        self._epoch = services.epoch
        self._memory = services.memory_of_upstreams
        self._own = services.countersigner.ring
        self._trusted = KeyRing.of(services.config.upload.trusted_keys)
        self._renewal = renewal
        self._lookup: Lookup[RealisationRecord] = Lookup(
            services,
            self._bring,
            look=self._find,
            kind="realisation" if services.upstreams else "",
        )

    async def get(self, name: str) -> bytes:
        """The rendered file of `realisations/…` or `build-trace-v2/…` (percent-decoded).

        Raises NotFound, Refused, Malformed (all 404), Denied (403) or Trouble.
        """
        return (await self._lookup.get(name)).entry.render()

    async def _find(self, name: str) -> RealisationRecord | None:
        found = await self._index.realisation(name)
        if found and not found.withdrawn:
            try:
                await self._renewal.check_out_path(found)
            except Denied as denied:  # its rule may ask for signatures that the path lacks
                try:
                    await self._admission.path(found.entry.out_path.hash_part)
                except (Denied, NotFound, Refused, Malformed) as error:
                    raise denied from error
                await self._renewal.check_out_path(found)
            return await self._renewal.realisation(found)
        return None

    async def _bring(self, name: str) -> RealisationRecord:
        answers, arrivals = Answers(), self._epoch.arrivals()
        async with in_order(
            self._upstreams, lambda u: self._ask(u, name), answers, thing=name
        ) as candidates:
            async for upstream, record in candidates:
                if self._policy.active:  # what it is about is judged first
                    try:
                        await self._admission.path(record.entry.out_path.hash_part)
                    except NarsealError as error:
                        answers.note(error, upstream=upstream.config.url, thing=name)
                        continue
                return await self._admit(record)
        verdict = answers.verdict(name)
        self._lookup.remember(name, verdict, arrivals)
        raise verdict

    async def _ask(self, upstream: Upstream, name: str) -> RealisationRecord:
        with self._memory.claim(upstream.config.url) as room:
            data = await upstream.get(name, limit=realisation.MAX_BYTES, claim=room)
            if data is None:
                raise NotFound(f"{upstream.config.url} has no {name}")
            revoked = (await self._index.revocations.now()).keys
            return await by_size(len(data), self._parse_and_weigh, upstream, name, data, revoked)

    def _parse_and_weigh(
        self, upstream: Upstream, name: str, data: bytes, revoked: frozenset[str]
    ) -> RealisationRecord:
        with metrics.verifying("nix"):
            entry = parse_at(name, data)
            message = entry.fingerprint()
            pinned = KeyRing.of(upstream.config.public_keys)
            signer = pinned.without(revoked).signer(message, entry.signatures)
            if signer is None:
                raise Refused("unsigned", f"{name}: no signature by a key of {upstream.config.url}")
            kept = self._kept(entry, pinned, revoked)
        return RealisationRecord(name, kept, f"signature {signer}")

    def _kept(self, entry: Entry, known: KeyRing, revoked: frozenset[str]) -> Entry:
        """With the signatures that are worth keeping."""
        signatures = [s for s in entry.signatures if s.key_name not in revoked]
        ring = KeyRing.of(known.keys, self._own.keys)
        return entry.with_signatures(ring.kept(entry.fingerprint(), signatures, most=MOST_BUT_OURS))

    async def _admit(self, record: RealisationRecord) -> RealisationRecord:
        """Countersign and pin; if a key was revoked meanwhile, with what is left."""
        for _ in range(_TRIES):
            request = RealisationRequest(record.key, record.entry)
            try:
                return await self._index.admit_realisation(
                    await self._renewal.sign(record, request)
                )
            except Refused as error:
                if error.reason != "revoked":
                    raise
                revoked = (await self._index.revocations.now()).keys
                if is_void(record.evidence, revoked):
                    raise
                record = replace(record, entry=self._kept(record.entry, self._own, revoked))
        raise Unavailable(f"{record.key}: keys are being revoked; ask again")

    async def put(self, name: str, data: bytes, token: Token) -> None:
        """Take an uploaded realisation of a path that is here and that the token covers.

        BadUpload, UploadConflict or Forbidden if it is not taken.
        """
        try:
            entry = await by_size(len(data), parse_at, name, data)
        except Malformed as error:
            raise BadUpload(str(error)) from error
        revoked = (await self._index.revocations.now()).keys
        trusted = self._trusted.without(revoked).signer(entry.fingerprint(), entry.signatures)
        if trusted is None:
            _check_scope(name, entry, token)
        out = entry.out_path
        found = await self._index.path(out.hash_part)
        if found is None or found[0].withdrawn or found[0].info.store_path != out:
            raise BadUpload(f"{name}: {out} is not here: upload it first")
        evidence = f"upload {token.id}" + (f" signature {trusted}" if trusted else "")
        kept = self._kept(entry, self._trusted, revoked)
        record = RealisationRecord(name, kept, evidence)
        try:
            try:
                await self._renewal.check_out_path(record)
                admitted = await self._admit(record)
            except Denied:  # signed once its path may be served
                admitted = await self._index.admit_realisation(record)
        except Refused as error:
            kind = UploadConflict if error.reason == "conflict" else BadUpload
            raise kind(str(error)) from error
        if more := set(kept.signatures) - set(admitted.signatures):
            ring = KeyRing.of(self._trusted.keys, self._own.keys)
            verified = verified_by(ring, entry.fingerprint())
            try:
                await self._index.realisations.sign(
                    name, more, verified=verified, only=says(record)
                )
            except NotFound as error:  # it was taken away meanwhile
                raise UploadConflict(f"{name}: {error}") from error
            self._epoch.advance()
        self._epoch.arrive()


def _check_scope(name: str, entry: Entry, token: Token) -> None:
    """Forbidden unless the token covers the output and the derivation that it is an output of."""
    out = entry.out_path
    if not token.may(out.name):
        raise Forbidden(f"the token {token.name} does not cover {out.name}")
    if isinstance(entry, BuildTraceEntry):
        derivation = entry.drv_path.name.removesuffix(".drv")
        if not token.may(derivation):
            raise Forbidden(f"the token {token.name} does not cover the derivation {derivation}")
    elif not token.covers_all:
        raise Forbidden(
            f"{name} names its derivation by a hash alone, so only a token that covers everything"
            f' (--allow "*") may bring it, or one of upload.trusted_keys signs it; {token.name}'
            f" covers {', '.join(token.allow) or 'nothing'}"
        )
