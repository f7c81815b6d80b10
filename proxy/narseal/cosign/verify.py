"""Verifying bundles. Keyless ones by sigstore-python; those by key here, in the same steps.

What cosign's own holes teach (CVE-2022-36056, CVE-2026-22703): the log entry of a bundle must be
of this very digest, signature and key, and a key is no certificate.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from cryptography.x509 import (
    Certificate,
    ExtensionNotFound,
    OtherName,
    RFC822Name,
    SubjectAlternativeName,
    UniformResourceIdentifier,
    load_der_x509_certificate,
)
from rfc3161_client import decode_timestamp_response
from sigstore._internal.trust import KeyringPurpose
from sigstore.errors import Error as SigstoreError
from sigstore.hashes import Hashed
from sigstore.models import Bundle as SigstoreBundle
from sigstore.models import InvalidBundle, TransparencyLogEntry
from sigstore.verify import Verifier as SigstoreVerifier
from sigstore.verify.policy import OIDCIssuer, OIDCIssuerV2
from sigstore_models.common.v1 import HashAlgorithm
from sigstore_models.rekor.v1 import TransparencyLogEntry as LogEntryModel

from narseal.cosign.bundle import Bundle, Envelope
from narseal.cosign.keys import CosignPublicKey
from narseal.cosign.statement import Statement, pae
from narseal.cosign.trust import Trust
from narseal.errors import ConfigError, MalformedAttestation, Refused

_OTHER_NAME = "1.3.6.1.4.1.57264.1.7"


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


@dataclass(frozen=True, slots=True)
class Verified:
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
        self._sigstore = SigstoreVerifier(trusted_root=trust.root) if trust else None

    def verify(self, bundle: Bundle, digest: bytes) -> Verified:
        """The bundle is a good signature over, or a statement of, the file with this SHA-256.

        Refused("bad-bundle") if it is not; MalformedAttestation if it cannot be read.
        """
        signed = (
            hashlib.sha256(pae(bundle.content.payload_type, bundle.content.payload)).digest()
            if isinstance(bundle.content, Envelope)
            else bundle.content.digest
        )
        if isinstance(self._expected, ByKey):
            verified = self._by_key(bundle, signed, self._expected)
        else:
            verified = self._by_identity(bundle, signed, self._expected)
        covered = verified.statement.covers(digest) if verified.statement else signed == digest
        if not covered:
            raise _refused(f"it is not of a file with SHA-256 {digest.hex()}")
        return verified

    def _by_key(self, bundle: Bundle, signed: bytes, expected: ByKey) -> Verified:
        if bundle.certificate is not None:
            raise _refused("it is signed with a certificate, not with a key")
        signature = bundle.content.signature
        key = next((key for key in expected.keys if key.verifies(signed, signature)), None)
        if key is None:
            raise _refused("it is not signed by the key")
        for entry in bundle.log_entries:
            _check_body(entry, digest=signed, signature=signature, key=key)
        index, seconds = None, 0.0
        if self._trust:
            if not bundle.log_entries:
                raise _refused("it has no log entry, which a trusted root asks for")
            index, seconds = self._check_log(bundle)
            self._check_time(bundle)
        return Verified(_statement(bundle), key.hint, index, seconds)

    def _by_identity(self, bundle: Bundle, signed: bytes, expected: ByIdentity) -> Verified:
        if bundle.certificate is None:
            raise _refused("it is signed with a key, not with a certificate")
        assert self._sigstore is not None  # the constructor saw to it
        index, seconds = self._check_log(bundle)
        policy = _Policy(expected)
        with _translated():
            whole = SigstoreBundle.from_json(bundle.text)
            if isinstance(bundle.content, Envelope):
                kind, payload = self._sigstore.verify_dsse(whole, policy)
                if (kind, payload) != (bundle.content.payload_type, bundle.content.payload):
                    raise _refused("its payload reads in two ways")
            else:
                hashed = Hashed(algorithm=HashAlgorithm.SHA2_256, digest=signed)
                self._sigstore.verify_artifact(hashed, whole, policy)
        began = load_der_x509_certificate(bundle.certificate).not_valid_before_utc
        return Verified(_statement(bundle), policy.found, index, seconds, began.timestamp())

    def _check_log(self, bundle: Bundle) -> tuple[int, float]:
        """The inclusion proof and the signed checkpoint; returns the index and the seconds."""
        assert self._trust is not None
        start = perf_counter()
        with _translated():
            if not bundle.log_entries:
                raise _refused("it has no log entry")
            entry = TransparencyLogEntry(LogEntryModel.from_dict(bundle.log_entries[0]))
            entry._verify(self._trust.root.rekor_keyring(KeyringPurpose.VERIFY))  # noqa: SLF001
        return int(entry._inner.log_index), perf_counter() - start  # noqa: SLF001

    def _check_time(self, bundle: Bundle) -> None:
        """A key has no validity, so a timestamp proves only its time; but a false one is refused."""
        assert self._sigstore is not None
        for data in bundle.timestamps:
            with _translated():
                stamp = decode_timestamp_response(data)
                good = self._sigstore._verify_signed_timestamp(stamp, bundle.content.signature)  # noqa: SLF001
            if good is None:
                raise _refused("its timestamp is not by a trusted authority, or not over it")


class _Policy:
    """sigstore-python's protocol: exact names, or a regular expression over the whole."""

    def __init__(self, expected: ByIdentity) -> None:
        self._expected = expected
        self.found = ""

    def verify(self, cert: Certificate) -> None:
        """Refused unless the certificate has the identity and the issuer."""
        expected = self._expected
        try:
            OIDCIssuerV2(expected.issuer).verify(cert)
        except SigstoreError:
            # older certificates have only the first form; one that has both must agree in both
            if _has(cert, OIDCIssuerV2.oid):
                raise
            OIDCIssuer(expected.issuer).verify(cert)
        names = _names(cert)
        matches: Callable[[str], object] = (
            re.compile(expected.identity).fullmatch
            if expected.is_regex
            else expected.identity.__eq__
        )
        self.found = next((name for name in names if matches(name)), "")
        if not self.found:
            raise _refused(f"it is signed by {', '.join(names)[:300]}")


def names_of(certificate: bytes) -> tuple[list[str], list[str], float]:
    """A certificate's identities and issuers, unverified, and the Unix time at which it began."""
    parsed = load_der_x509_certificate(certificate)
    issuers = []
    for oid in (OIDCIssuerV2.oid, OIDCIssuer.oid):
        if _has(parsed, oid):
            raw = parsed.extensions.get_extension_for_oid(oid).value.public_bytes()
            # V2 is a DER UTF8String, the older form the bare text
            issuers.append((raw[2:] if oid == OIDCIssuerV2.oid else raw).decode("utf-8", "replace"))
    return _names(parsed), issuers, parsed.not_valid_before_utc.timestamp()


def _has(cert: Certificate, oid: Any) -> bool:
    try:
        return cert.extensions.get_extension_for_oid(oid) is not None
    except ExtensionNotFound:
        return False


def _names(cert: Certificate) -> list[str]:
    alternative = cert.extensions.get_extension_for_class(SubjectAlternativeName).value
    return [
        *alternative.get_values_for_type(RFC822Name),
        *alternative.get_values_for_type(UniformResourceIdentifier),
        *(
            other.value.decode()
            for other in alternative.get_values_for_type(OtherName)
            if other.type_id.dotted_string == _OTHER_NAME
        ),
    ]


def _statement(bundle: Bundle) -> Statement | None:
    content = bundle.content
    return Statement.parse(content.payload) if isinstance(content, Envelope) else None


def _check_body(
    entry: dict[str, Any], *, digest: bytes, signature: bytes, key: CosignPublicKey
) -> None:
    """The log entry is of this digest, signature and key, and of nothing else."""
    try:
        body = json.loads(base64.b64decode(entry["canonicalizedBody"], validate=True))
        version = (body["kind"], body["apiVersion"])
        if version == ("hashedrekord", "0.0.2"):
            spec = body["spec"]["hashedRekordV002"]
            found = (
                base64.b64decode(spec["data"]["digest"]),
                base64.b64decode(spec["signature"]["content"]),
                base64.b64decode(spec["signature"]["verifier"]["publicKey"]["rawBytes"]),
            )
        elif version == ("hashedrekord", "0.0.1"):
            spec = body["spec"]
            pem = base64.b64decode(spec["signature"]["publicKey"]["content"]).decode()
            found = (
                bytes.fromhex(spec["data"]["hash"]["value"]),
                base64.b64decode(spec["signature"]["content"]),
                CosignPublicKey.parse(pem).der,
            )
        else:
            raise _refused(f"its log entry is of a kind that is not verified: {version}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise MalformedAttestation(f"the bundle's log entry cannot be read: {error!r}") from error
    if found != (digest, signature, key.der):
        raise _refused("its log entry is of another signature")


@contextmanager
def _translated() -> Iterator[None]:
    """sigstore-python's errors as ours."""
    try:
        yield
    except Refused:
        raise
    except (InvalidBundle, ValueError, ExtensionNotFound) as error:
        raise MalformedAttestation(f"the bundle cannot be read: {error}") from error
    except SigstoreError as error:
        raise _refused(str(error) or type(error).__name__) from error


def _refused(message: str) -> Refused:
    return Refused("bad-bundle", f"the bundle does not verify: {message}")
