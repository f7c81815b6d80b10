"""Whom a Fulcio certificate names; nothing of it is verified here.

Format: `docs/certificate-specification.md` and `docs/oid-info.md` of sigstore/fulcio.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.x509 import (
    Certificate,
    ObjectIdentifier,
    OtherName,
    RFC822Name,
    SubjectAlternativeName,
    UniformResourceIdentifier,
)

from narseal.errors import MalformedAttestation

_OTHER_NAME = ObjectIdentifier("1.3.6.1.4.1.57264.1.7")
#: The issuer as bare text, in older certificates, and as a DER UTF8String.
_ISSUER, _ISSUER_V2 = (ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{n}") for n in (1, 8))
#: The token's `sub`, since Fulcio 1.8.
_TOKEN_SUBJECT = ObjectIdentifier("1.3.6.1.4.1.57264.1.24")


@dataclass(frozen=True, slots=True)
class CertificateNames:
    """What a certificate says of whom it is for."""

    #: E-mail addresses, URIs and user names; Fulcio writes one.
    identities: tuple[str, ...]
    #: The OIDC issuer, in both forms where both are there.
    issuers: tuple[str, ...]
    #: The token's `sub`; None in older certificates.
    subject: str | None
    #: Unix time.
    began: float

    @classmethod
    def parse(cls, der: bytes) -> CertificateNames:
        """MalformedAttestation if the bytes are no certificate of that profile."""
        try:
            return cls.of(x509.load_der_x509_certificate(der))
        except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
            raise MalformedAttestation(f"the certificate cannot be read: {error}") from error

    @classmethod
    def of(cls, certificate: Certificate) -> CertificateNames:
        """See `parse`; ValueError if an extension is not of its form."""
        raw = {
            extension.oid: extension.value.value
            for extension in certificate.extensions
            if isinstance(extension.value, x509.UnrecognizedExtension)
        }
        issuers = [_text(raw[_ISSUER_V2])] if _ISSUER_V2 in raw else []
        issuers += [raw[_ISSUER].decode()] if _ISSUER in raw else []
        subject = _text(raw[_TOKEN_SUBJECT]) if _TOKEN_SUBJECT in raw else None
        began = certificate.not_valid_before_utc.timestamp()
        return cls(tuple(_identities(certificate)), tuple(dict.fromkeys(issuers)), subject, began)


def _identities(certificate: Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *found.get_values_for_type(RFC822Name),
        *found.get_values_for_type(UniformResourceIdentifier),
        *(
            _text(other.value)
            for other in found.get_values_for_type(OtherName)
            if other.type_id == _OTHER_NAME
        ),
    ]


def _text(der: bytes) -> str:
    """The text of a DER UTF8String, of any length; ValueError if it is none."""
    return asn1.decode_der(str, der)
