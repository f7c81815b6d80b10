"""Sigstore bundles of version 0.3, and older ones, as far as a key's signature needs to look inside.

Format: `sigstore_bundle.proto` of sigstore/protobuf-specs, in its JSON form.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from narseal.cosign.statement import PAYLOAD_TYPE, read_json
from narseal.errors import MalformedAttestation

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
#: Bytes of a whole bundle.
MAX_BYTES = 24 << 20
_MAX_TIMESTAMPS = 8


@dataclass(frozen=True, slots=True)
class MessageSignature:
    """A signature over a file's SHA-256 digest."""

    digest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A DSSE envelope with one signature."""

    payload_type: str
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """A parsed bundle; `text` is all of it, for those who look further."""

    content: MessageSignature | Envelope
    #: The certificate (DER) of a keyless signature; None with a key.
    certificate: bytes | None
    #: Log entries as the JSON has them.
    log_entries: tuple[dict[str, Any], ...]
    #: RFC 3161 responses, DER.
    timestamps: tuple[bytes, ...]
    text: bytes
    #: How it names the key; "" with a certificate.
    hint: str = ""

    @classmethod
    def parse(cls, data: bytes) -> Bundle:
        """MalformedAttestation if the bytes are no bundle that can be verified."""
        tree = read_json(data, limit=MAX_BYTES, what="the bundle")
        kind = tree.get("mediaType") if isinstance(tree, dict) else None
        if not isinstance(kind, str) or not kind.startswith("application/vnd.dev.sigstore.bundle"):
            raise MalformedAttestation("not a Sigstore bundle: its mediaType is missing or another")
        material = _field(tree, "verificationMaterial", dict)
        certificate = _certificate(material)
        if certificate is None and not isinstance(material.get("publicKey"), dict):
            raise MalformedAttestation("the bundle has neither a certificate nor a publicKey")
        entries = material.get("tlogEntries") or []
        if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
            raise MalformedAttestation("the bundle's tlogEntries are no list of entries")
        if len(entries) > 1:
            raise MalformedAttestation("the bundle has more than one log entry")
        named = material.get("publicKey")
        hint = str(named.get("hint", "")) if isinstance(named, dict) else ""
        return cls(_content(tree), certificate, tuple(entries), _timestamps(material), data, hint)


def render(
    content: MessageSignature | Envelope,
    *,
    hint: str,
    log_entry: dict[str, Any] | None = None,
    timestamp: bytes | None = None,
) -> bytes:
    """A bundle of a signature by key; `hint` names the key."""
    material: dict[str, Any] = {"publicKey": {"hint": hint}}
    if log_entry:
        material["tlogEntries"] = [log_entry]
    if timestamp:
        material["timestampVerificationData"] = {
            "rfc3161Timestamps": [{"signedTimestamp": _base64(timestamp)}]
        }
    tree: dict[str, Any] = {"mediaType": MEDIA_TYPE, "verificationMaterial": material}
    if isinstance(content, MessageSignature):
        tree["messageSignature"] = {
            "messageDigest": {"algorithm": "SHA2_256", "digest": _base64(content.digest)},
            "signature": _base64(content.signature),
        }
    else:
        tree["dsseEnvelope"] = {
            "payload": _base64(content.payload),
            "payloadType": content.payload_type,
            "signatures": [{"sig": _base64(content.signature)}],
        }
    return json.dumps(tree, separators=(",", ":")).encode()


def _certificate(material: dict[str, Any]) -> bytes | None:
    """The leaf, from either place."""
    if isinstance(single := material.get("certificate"), dict):
        return _bytes(single, "rawBytes")
    chain = material.get("x509CertificateChain")
    certificates = chain.get("certificates") if isinstance(chain, dict) else None
    if isinstance(certificates, list) and certificates and isinstance(certificates[0], dict):
        return _bytes(certificates[0], "rawBytes")
    return None


def _content(tree: dict[str, Any]) -> MessageSignature | Envelope:
    if ("messageSignature" in tree) == ("dsseEnvelope" in tree):
        raise MalformedAttestation("the bundle must have one of messageSignature and dsseEnvelope")
    if "messageSignature" in tree:
        message = _field(tree, "messageSignature", dict)
        digest = _field(message, "messageDigest", dict)
        if digest.get("algorithm") != "SHA2_256":
            raise MalformedAttestation("the bundle's digest is not SHA2_256")
        return MessageSignature(_bytes(digest, "digest"), _bytes(message, "signature"))
    envelope = _field(tree, "dsseEnvelope", dict)
    signatures = _field(envelope, "signatures", list)
    if len(signatures) != 1 or not isinstance(signatures[0], dict):
        raise MalformedAttestation("the envelope must have one signature")
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        raise MalformedAttestation(f"the envelope's payload is not {PAYLOAD_TYPE}")
    return Envelope(PAYLOAD_TYPE, _bytes(envelope, "payload"), _bytes(signatures[0], "sig"))


def _timestamps(material: dict[str, Any]) -> tuple[bytes, ...]:
    data = material.get("timestampVerificationData") or {}
    stamps = data.get("rfc3161Timestamps") or [] if isinstance(data, dict) else None
    if not isinstance(stamps, list) or len(stamps) > _MAX_TIMESTAMPS:
        raise MalformedAttestation("the bundle's timestamps are no list, or too many")
    if not all(isinstance(item, dict) for item in stamps):
        raise MalformedAttestation("a timestamp of the bundle is no object")
    return tuple(_bytes(item, "signedTimestamp") for item in stamps)


def _field(tree: dict[str, Any], name: str, kind: type[Any]) -> Any:
    value = tree.get(name)
    if not isinstance(value, kind):
        raise MalformedAttestation(f"the bundle has no {name}")
    return value


def _bytes(tree: dict[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(_field(tree, name, str), validate=True)
    except ValueError as error:  # binascii.Error, and text that is not ASCII
        raise MalformedAttestation(f"the bundle's {name} is not base64") from error


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
