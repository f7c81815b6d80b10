"""Verifying bundles. Keyless ones by sigstore-python; those by key here, in the same steps.

What cosign's own holes teach (CVE-2022-36056, CVE-2026-22703): the log entry of a bundle must be
of this very digest, signature and key, and a key is no certificate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.x509 import Certificate, load_der_x509_certificate
from rfc3161_client import decode_timestamp_response
from sigstore._internal.timestamp import TimestampVerificationResult
from sigstore.errors import Error as SigstoreError
from sigstore.hashes import Hashed
from sigstore.models import Bundle as SigstoreBundle
from sigstore.models import InvalidBundle
from sigstore_models.common.v1 import HashAlgorithm
from sigstore_models.rekor.v1 import TransparencyLogEntry as LogEntry

from narseal.cosign import log_entry
from narseal.cosign.bundle import Bundle, Envelope
from narseal.cosign.certificate import CertificateNames
from narseal.cosign.keys import CosignPublicKey
from narseal.cosign.library import LibraryVerifier
from narseal.cosign.log_entry import refused
from narseal.cosign.statement import Statement
from narseal.cosign.trust import Trust
from narseal.errors import ConfigError, MalformedAttestation, NarsealError


@dataclass(frozen=True, slots=True)
class ByKey:
    """The signature must be by one of these keys."""

    keys: tuple[CosignPublicKey, ...]


@dataclass(frozen=True, slots=True)
class ByIdentity:
    """The certificate must name this identity, from this issuer; both compare exactly."""

    identity: str
    issuer: str
    #: `identity` is a regular expression that must match the whole name.
    is_regex: bool = False


class Verified(NamedTuple):
    """What a good bundle says."""

    #: None if the signature is over the file itself.
    statement: Statement | None
    #: The key's hint, or the certificate's identity.
    signer: str
    #: None if no log was looked at.
    log_index: int | None
    #: Of the log entry's proof alone.
    log_seconds: float
    #: Unix time at which the certificate began; 0 with a key.
    signed_at: float = 0.0


class Verifier:
    """Holds bundles to an expectation. ThreadPools: some milliseconds of arithmetic, no network.

    Without `trust`, signatures by key are verified without their log entry.
    """

    def __init__(self, expected: ByKey | ByIdentity, trust: Trust | None) -> None:
        if isinstance(expected, ByIdentity) and trust is None:
            raise ConfigError("a keyless signature is verified against a trusted root; give one")
        self._expected = expected
        self._trust = trust
        self._sigstore = LibraryVerifier(trusted_root=trust.root) if trust else None

    def verify(self, bundle: Bundle, digest: bytes) -> Verified:
        """The bundle is a good signature over, or a statement of, the file with this SHA-256.

        Refused("bad-bundle") if it is not; MalformedAttestation if it cannot be read.
        """
        signed = bundle.signed
        if isinstance(self._expected, ByKey):
            verified = self._by_key(bundle, signed, self._expected)
        else:
            verified = self._by_identity(bundle, signed, self._expected)
        covered = verified.statement.covers(digest) if verified.statement else signed == digest
        if not covered:
            raise refused(f"it is not of a file with SHA-256 {digest.hex()}")
        return verified

    def verify_unlogged(self, bundle: Bundle) -> None:
        """All that can be said of a bundle before a log has it: by whom, over what, and when.

        Errors as of `verify`.
        """
        if isinstance(self._expected, ByKey):
            self._signing_key(bundle, bundle.signed, self._expected)
            self._timestamps(bundle)
            return
        if bundle.certificate is None:
            raise refused("it is signed with a key, not with a certificate")
        assert self._sigstore is not None  # the constructor saw to it
        with _translated():
            certificate = load_der_x509_certificate(bundle.certificate)
            _Policy(self._expected).verify(certificate)
            key = certificate.public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise refused("its certificate is of no ECDSA key")
            try:
                prehashed = ec.ECDSA(Prehashed(hashes.SHA256()))
                key.verify(bundle.content.signature, bundle.signed, prehashed)
            except InvalidSignature:
                raise refused("it is not signed by the key of its certificate") from None
            if not (times := self._timestamps(bundle)):
                raise refused("it has no timestamp")
            for time in times:
                self._sigstore._verify_chain_at_time(certificate, time)  # noqa: SLF001

    def _by_key(self, bundle: Bundle, signed: bytes, expected: ByKey) -> Verified:
        key = self._signing_key(bundle, signed, expected)
        signature = bundle.content.signature
        entry = _entry(bundle)
        if entry:
            log_entry.check_body(entry[1], digest=signed, signature=signature, key=key)
        index, seconds = None, 0.0
        if self._trust:
            if not entry:
                raise refused("it has no log entry, which a trusted root asks for")
            index, seconds = self._check_log(*entry)
            self._timestamps(bundle)
        return Verified(_statement(bundle), key.hint, index, seconds)

    def _by_identity(self, bundle: Bundle, signed: bytes, expected: ByIdentity) -> Verified:
        if bundle.certificate is None:
            raise refused("it is signed with a key, not with a certificate")
        assert self._sigstore is not None  # the constructor saw to it
        entry = _entry(bundle)
        if not entry:
            raise refused("it has no log entry")
        index, seconds = self._check_log(*entry)
        policy = _Policy(expected)
        with _translated():
            whole = SigstoreBundle(bundle.model)
            if isinstance(bundle.content, Envelope):
                self._sigstore.verify_dsse(whole, policy)
            else:
                hashed = Hashed(algorithm=HashAlgorithm.SHA2_256, digest=signed)
                self._sigstore.verify_artifact(hashed, whole, policy)
        began = CertificateNames.parse(bundle.certificate).began
        return Verified(_statement(bundle), policy.found, index, seconds, began)

    def _check_log(self, entry: LogEntry, body: Any) -> tuple[int, float]:
        """The inclusion proof and the signed checkpoint; returns the index and the seconds."""
        assert self._trust is not None
        start = perf_counter()
        with _translated():
            index = log_entry.verify(entry, body, self._trust.root)
        return index, perf_counter() - start

    def _signing_key(self, bundle: Bundle, signed: bytes, expected: ByKey) -> CosignPublicKey:
        """The key that verifies the signature, whatever the bundle's hint says."""
        if bundle.certificate is not None:
            raise refused("it is signed with a certificate, not with a key")
        for key in expected.keys:
            if key.verifies(signed, bundle.content.signature):
                return key
        raise refused("it is not signed by the key")

    def _timestamps(self, bundle: Bundle) -> list[TimestampVerificationResult]:
        """When it was signed, as authorities say. A false timestamp is refused, with a key too."""
        assert self._sigstore is not None
        found = []
        for data in bundle.timestamps:
            with _translated():
                stamp = decode_timestamp_response(data)
                good = self._sigstore.verify_timestamp(stamp, bundle.content.signature)
            if good is None:
                raise refused("its timestamp is not by a trusted authority, or not over it")
            found.append(good)
        return found


class _Policy:
    """sigstore-python's protocol: exact names, or a regular expression over the whole."""

    def __init__(self, expected: ByIdentity) -> None:
        self._expected = expected
        self.found = ""

    def verify(self, cert: Certificate) -> None:
        """Refused unless the certificate has the identity and the issuer."""
        expected = self._expected
        found = CertificateNames.of(cert)
        # a certificate that has the issuer in both forms must have the same in both
        if found.issuers != (expected.issuer,):
            raise refused(f"its identity is vouched for by {', '.join(found.issuers)[:300]}")
        names = found.identities
        matches: Callable[[str], object] = (
            re.compile(expected.identity).fullmatch
            if expected.is_regex
            else expected.identity.__eq__
        )
        self.found = next((name for name in names if matches(name)), "")
        if not self.found:
            raise refused(f"it is signed by {', '.join(names)[:300]}")


def _entry(bundle: Bundle) -> tuple[LogEntry, Any] | None:
    """The log entry, of which a bundle has at most one, and its body."""
    entries = bundle.model.verification_material.tlog_entries
    return (entries[0], log_entry.body_of(entries[0])) if entries else None


def _statement(bundle: Bundle) -> Statement | None:
    content = bundle.content
    return Statement.parse(content.payload) if isinstance(content, Envelope) else None


@contextmanager
def _translated() -> Iterator[None]:
    """sigstore-python's errors as ours."""
    try:
        yield
    except NarsealError:
        raise
    except InvalidBundle as error:
        raise MalformedAttestation(f"the bundle cannot be read: {error}") from error
    except SigstoreError as error:
        raise refused(str(error) or type(error).__name__) from error
    except Exception as error:
        # hostile bytes in libraries that promise no error of their own: UnsupportedAlgorithm,
        # OverflowError, DuplicateExtension, …; whichever it is, the bundle is not verified
        text = str(error) or type(error).__name__
        raise MalformedAttestation(f"the bundle cannot be read: {text[:500]}") from error
