"""sigstore-python's verifier, where it is narrower than Sigstore's specifications.

Two differences, both of which the bundles of sigstore-conformance ask for: an authority's validity
includes its last instant, and Rekor v1 wrote entries of the kind `intoto` for attestations.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from typing import TypeVar, cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate
from rfc3161_client import TimeStampResponse
from sigstore import dsse
from sigstore._internal.timestamp import TimestampSource, TimestampVerificationResult
from sigstore._internal.trust import (
    CertificateAuthority,
    CTKeyring,
    KeyringPurpose,
    RekorKeyring,
)
from sigstore.errors import VerificationError
from sigstore.models import Bundle, TrustedRoot
from sigstore.verify import Verifier
from sigstore.verify.policy import VerificationPolicy
from sigstore_models.trustroot.v1 import TransparencyLogInstance
from sigstore_models.trustroot.v1 import TrustedRoot as Model

K = TypeVar("K", RekorKeyring, CTKeyring)

_INTOTO = ("intoto", "0.0.2")


class LibraryVerifier(Verifier):
    """As the original, and these; errors are sigstore-python's."""

    def verify_timestamp(
        self, response: TimeStampResponse, signature: bytes
    ) -> TimestampVerificationResult | None:
        """When it says that a signature was there; None if no trusted authority says so."""
        return self._verify_signed_timestamp(response, signature)

    def verify_dsse(self, bundle: Bundle, policy: VerificationPolicy) -> tuple[str, bytes]:
        """The type and the payload of a bundle's envelope."""
        if _kind(bundle) != _INTOTO:
            return super().verify_dsse(bundle, policy)
        self._verify_common_signing_cert(bundle, policy)
        envelope = bundle._dsse_envelope  # noqa: SLF001
        if envelope is None:
            raise VerificationError("it has no DSSE envelope")
        key = bundle.signing_certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise VerificationError("its certificate is of no ECDSA key")
        dsse._verify(key, envelope)  # noqa: SLF001
        _check_intoto(bundle, envelope)
        return envelope._inner.payload_type, envelope._inner.payload  # noqa: SLF001

    def _establish_time(self, bundle: Bundle) -> list[TimestampVerificationResult]:
        if _kind(bundle) != _INTOTO:
            return super()._establish_time(bundle)
        found = self._verify_timestamp_authority(bundle)
        inner = bundle.log_entry._inner  # noqa: SLF001
        if inner.integrated_time and inner.inclusion_promise:  # which is verified later
            time = datetime.fromtimestamp(inner.integrated_time, tz=UTC)
            found.append(TimestampVerificationResult(TimestampSource.TRANSPARENCY_SERVICE, time))
        return found


class _Authority(CertificateAuthority):
    @property
    def validity_period_end(self) -> datetime | None:
        """The first instant that is not of it any more."""
        end = super().validity_period_end
        return None if end is None else end + datetime.resolution


class Root(TrustedRoot):
    """A trusted root whose certificates and keys are read once, and not for each bundle."""

    def __init__(self, inner: Model) -> None:
        super().__init__(inner)
        self._keyrings: dict[tuple[int, ...], RekorKeyring | CTKeyring] = {}

    @cached_property
    def _authorities(self) -> list[CertificateAuthority]:
        return [_Authority(ca._inner) for ca in super().get_timestamp_authorities()]  # noqa: SLF001

    def get_timestamp_authorities(self) -> list[CertificateAuthority]:
        """See the original."""
        return self._authorities

    def rekor_keyring(self, purpose: KeyringPurpose) -> RekorKeyring:
        """See the original."""
        return self._keyring(self._inner.tlogs, purpose, super().rekor_keyring)

    def ct_keyring(self, purpose: KeyringPurpose) -> CTKeyring:
        """See the original."""
        return self._keyring(self._inner.ctlogs, purpose, super().ct_keyring)

    def _keyring(
        self,
        logs: list[TransparencyLogInstance],
        purpose: KeyringPurpose,
        read: Callable[[KeyringPurpose], K],
    ) -> K:
        """Of the keys that are valid by now: which they are changes with the time."""
        valid = tuple(map(id, self._get_tlog_keys(logs, purpose)))
        if valid not in self._keyrings:
            self._keyrings[valid] = read(purpose)
        return cast("K", self._keyrings[valid])


def _kind(bundle: Bundle) -> tuple[str, str]:
    named = bundle.log_entry._inner.kind_version  # noqa: SLF001
    return named.kind, named.version


def _check_intoto(bundle: Bundle, envelope: dsse.Envelope) -> None:
    """The log entry is of this envelope (`intoto_v0_0_2_schema.json` of sigstore/rekor)."""
    body = json.loads(bundle.log_entry._inner.canonicalized_body)  # noqa: SLF001
    content = body["spec"]["content"]
    (logged,) = content["envelope"]["signatures"]
    inner = envelope._inner  # noqa: SLF001
    (signature,) = inner.signatures
    certificate = load_pem_x509_certificate(base64.b64decode(logged["publicKey"]))
    wanted = (
        _INTOTO,
        inner.payload_type,
        ("sha256", hashlib.sha256(inner.payload).hexdigest()),
        signature.sig,
        bundle.signing_certificate.public_bytes(Encoding.DER),
    )
    found = (
        (body["kind"], body["apiVersion"]),
        content["envelope"]["payloadType"],
        (content["payloadHash"]["algorithm"], content["payloadHash"]["value"]),
        base64.b64decode(base64.b64decode(logged["sig"])),  # Rekor encoded what was encoded
        certificate.public_bytes(Encoding.DER),
    )
    if found != wanted:
        raise VerificationError("its log entry is of another envelope")
