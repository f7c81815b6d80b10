"""What pipelines leave here about paths and files: attestations, verified before they are kept."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from narseal.config import SIGNATURE
from narseal.cosign.bundle import Bundle, Envelope
from narseal.cosign.statement import Statement
from narseal.errors import (
    BadUpload,
    Denied,
    Malformed,
    NarsealError,
    NotFound,
    Refused,
    Unavailable,
)
from narseal.nix.store_path import StorePath
from narseal.pipeline.paths.admission import Admission
from narseal.pipeline.paths.finder import Finder
from narseal.pipeline.services import Services
from narseal.pipeline.trust.policy import attesters, content_digests
from narseal.storage import (
    Attestation,
    bundle_name,
)
from narseal.storage.attestations import Signed

_log = logging.getLogger(__name__)
_TRIES = 4
_FOLDER = "attestations"


@dataclass(frozen=True, slots=True)
class Content:
    """What an attestation is brought for."""

    name: str
    #: SHA-256 of its content in each form; one of them must be among the statement's subjects.
    digests: frozenset[bytes]

    @classmethod
    def of(cls, digest: bytes) -> Content:
        """A file or NAR by its SHA-256."""
        return cls(f"sha256:{digest.hex()}", frozenset((digest,)))


class Provenance:
    """Takes in-toto statements in Sigstore bundles and shows which there are."""

    def __init__(self, services: Services, admission: Admission, finder: Finder) -> None:
        self._config = services.config.attestations
        self._attesters = dict.fromkeys(attesters(services.config))
        self._policy = services.policy
        self._attestations = services.index.attestations
        self._revocations = services.index.revocations
        self._folder = services.folder
        self._threads = services.threads
        self._tasks = services.tasks
        self._epoch = services.epoch
        self._admission = admission
        self._finder = finder

    @property
    def takes_any(self) -> bool:
        """Whether the configuration names anybody who may attest."""
        return bool(self._attesters)

    @property
    def max_bytes(self) -> int:
        """Of one bundle."""
        return self._config.size

    async def of_path(self, store_path: StorePath) -> Content:
        """A store path's NAR or stored file; an upstream may be asked. See `Finder.preview`."""
        (path, nar), _ = await self._finder.preview(store_path)
        return Content(str(path.info.store_path), content_digests(path.info, nar))

    async def put(self, content: Content, data: bytes) -> bool:
        """Keep an attestation; returns whether it is new.

        BadUpload if the bundle is none, is of another digest, or is not by one of whom the
        configuration names; UploadTooLarge if there are too many. What policy kept back for
        want of it is served from now on.
        """
        try:
            brought = await self._threads.run(_parse, data)
            digest = next((d for d in content.digests if d in brought.subjects), None)
            if digest is None:
                raise BadUpload(
                    f"the attestation is not of {content.name}: that is not among its subjects"
                )
            signed = await self._verify(brought, digest)
        except Malformed as error:
            raise BadUpload(str(error)) from error
        name = hashlib.sha256(brought.bundle).digest()
        new = False
        try:
            new = await self._recorded(name, brought, digest, signed)
        finally:
            if not new:
                await self._attestations.discard(
                    name, partial(self._folder.local.remove, bundle_name(name))
                )
        if new:
            _log.info(
                "took an attestation of %s",
                content.name,
                extra={"signer": signed.signer, "predicate_type": brought.predicate_type},
            )
            self._epoch.arrive()
            self._tasks.start(self._renew(brought.subjects), f"attested {content.name}")
        return new

    async def put_back(self) -> int:
        """Take what lies in the folder and the index lacks, as if it were left anew; how many.

        What nobody signed who may attest now, ours included, stays where it is.
        """
        known = {bundle_name(digest) for digest in await self._attestations.digests()}
        count = 0
        for file in await self._threads.run(self._folder.local.names, _FOLDER):
            name = f"{_FOLDER}/{file}"
            data = None if name in known else await self._folder.read(name)
            if data is None:
                continue
            try:
                brought = await self._threads.run(_parse, data)
                if bundle_name(hashlib.sha256(brought.bundle).digest()) != name:
                    continue
                subject = min(brought.subjects, default=b"")  # of none: `put` refuses it
                count += await self.put(Content.of(subject), data)
            except (Malformed, BadUpload) as error:
                _log.debug("%s is not put back: %s", name, error)
        return count

    async def status(self, store_path: StorePath) -> dict[str, Any]:
        """What is known of a path, and what policy says of it; as JSON. See `Finder.preview`.

        Of a path that is kept back no more than its 403 says.
        """
        return await self._epoch.unless_withdrawn(lambda: self._status(store_path))

    async def _status(self, store_path: StorePath) -> dict[str, Any]:
        (path, nar), admitted = await self._finder.preview(store_path)
        info = path.info
        digests = content_digests(info, nar)
        verdict = await self._policy.verdict(info, digests)
        attestations = await self._attestations.covering(*digests)
        if admitted:  # what we signed of it is not said of what was withdrawn
            attestations += await self._attestations.ours([store_path.hash_part])
        said = {"storePath": f"{info.store_dir}/{info.store_path}", "policy": asdict(verdict)}
        if not verdict.allowed:
            return said
        return said | {
            "narHash": f"sha256:{info.nar_hash.nix32}",
            "narSize": info.nar_size,
            "admitted": admitted,
            "evidence": path.evidence,
            "signatures": [signature.key_name for signature in info.signatures],
            "url": f"nar/{nar.file}",
            "stored": nar.stored,
            "digests": sorted(f"sha256:{digest.hex()}" for digest in digests),
            "attestations": [_shown(found) for found in attestations],
        }

    async def _recorded(
        self, name: bytes, brought: _Brought, digest: bytes, signed: Signed
    ) -> bool:
        """Write and record it, whether it is new; verified again if somebody revoked meanwhile."""
        is_there = partial(self._is_there, name)
        for _ in range(_TRIES):
            if not await self._threads.run(is_there):
                await self._folder.write(bundle_name(name), brought.bundle)
            new = await self._attestations.put(
                name, brought.predicate_type, signed, brought.subjects,
                most=self._config.per_digest, is_there=is_there,
            )  # fmt: skip
            if new is not None:
                return new
            self._epoch.advance()  # who revoked may not have come to say so
            signed = await self._verify(brought, digest)
        raise Unavailable("keys are being revoked, or others bring it too; bring it again")

    def _is_there(self, name: bytes) -> bool:
        return not self._folder.local.lacks(bundle_name(name))

    async def _verify(self, brought: _Brought, digest: bytes) -> Signed:
        """Who signed it, of those who may; BadUpload says why it is nobody."""
        revoked = await self._revocations.now()
        reasons: dict[str, None] = {}
        for who, predicate_types in self._attesters:
            if predicate_types and brought.predicate_type not in predicate_types:
                reasons[f"{who} may not attest {brought.predicate_type}"] = None
                continue
            try:
                found = await self._policy.verify(who, brought.bundle, digest)
            except (Refused, Malformed) as error:
                reasons[f"{error}"] = None
                continue
            signer = str(who) if who.cosign_key else f"{found.signer} of {who.issuer}"
            return Signed(signer, brought.signed, revoked)
        raise BadUpload(f"nobody who may attest signed it: {'; '.join(list(reasons)[:4])}")

    async def _renew(self, subjects: frozenset[bytes]) -> None:
        """Sign what may be served now, and put its narinfo into the folder."""
        for hash_part in await self._attestations.paths_of(subjects):
            try:
                await self._admission.path(hash_part)
            except (Denied, NotFound):
                continue
            except NarsealError as error:
                _log.warning("%s waits for its next reader: %s", hash_part, error)


def _shown(found: Attestation) -> dict[str, Any]:
    """An attestation as the status of a path lists it."""
    return {
        "predicateType": found.predicate_type,
        "signer": found.signer or "narseal",
        "subject": f"sha256:{found.subject.hex()}",
        "bundle": f"sha256:{found.digest.hex()}",
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.made_at)),
    }


@dataclass(frozen=True, slots=True)
class _Brought:
    """A bundle that somebody brought, before it is verified."""

    #: In its one form.
    bundle: bytes
    predicate_type: str
    subjects: frozenset[bytes]
    #: SHA-256 of what is signed.
    signed: bytes


def _parse(data: bytes) -> _Brought:
    """In a thread; Malformed if it is no bundle, or over no statement."""
    bundle = Bundle.parse(data)
    canonical = bundle.render()
    if not isinstance(bundle.content, Envelope):
        return _Brought(canonical, SIGNATURE, frozenset((bundle.content.digest,)), bundle.signed)
    statement = Statement.parse(bundle.content.payload)
    subjects = frozenset(subject.digest for subject in statement.subjects)
    return _Brought(canonical, statement.predicate_type, subjects, bundle.signed)
