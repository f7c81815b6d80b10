"""Sigstore bundles of version 0.3, and older ones, as far as a key's signature needs to look inside.

Format: `sigstore_bundle.proto` of sigstore/protobuf-specs, in its JSON form.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from sigstore_models.bundle.v1 import Bundle as Model

from narseal.cosign.keys import CosignPublicKey
from narseal.cosign.statement import PAYLOAD_TYPE, pae, read_base64, read_json
from narseal.errors import MalformedAttestation

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_OLDER = "application/vnd.dev.sigstore.bundle+json;version=0"
_MEDIA_TYPES = (MEDIA_TYPE, *(f"{_OLDER}.{minor}" for minor in (1, 2, 3)))
#: Bytes of a whole bundle.
MAX_BYTES = 24 << 20
_SMALL = 64 << 10  # bytes of all but the payload
_MAX_TIMESTAMPS = 8
_DIGEST = 32  # bytes of a SHA-256
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)", re.ASCII)


class MessageSignature(NamedTuple):
    """A signature over a file's SHA-256 digest."""

    digest: bytes
    signature: bytes


class Envelope(NamedTuple):
    """A DSSE envelope with one signature."""

    payload_type: str
    payload: bytes
    signature: bytes


class Bundle(NamedTuple):
    """A parsed bundle; `model` is all of it, for those who look further."""

    content: MessageSignature | Envelope
    #: The certificate (DER) of a keyless signature; None with a key.
    certificate: bytes | None
    #: RFC 3161 responses, DER.
    timestamps: tuple[bytes, ...]
    model: Model
    #: How it names the key, which nothing vouches for; "" with a certificate.
    hint: str = ""

    def render(self) -> bytes:
        """Its one form: JSON on one line, fields in order, nothing that the specification lacks."""
        tree = json.loads(self.model.to_json())
        return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()

    @property
    def signed(self) -> bytes:
        """The SHA-256 that its signature is over: the file's, or the envelope's."""
        if isinstance(self.content, Envelope):
            encoded = pae(self.content.payload_type, self.content.payload)
            return hashlib.sha256(encoded).digest()
        return self.content.digest

    @classmethod
    def parse(cls, data: bytes) -> Bundle:
        """MalformedAttestation if the bytes are no bundle that can be verified."""
        tree = read_json(data, limit=MAX_BYTES, what="the bundle")
        kind = tree.get("mediaType") if isinstance(tree, dict) else None
        if kind not in _MEDIA_TYPES:
            raise MalformedAttestation("not a Sigstore bundle: its mediaType is missing or another")
        material = _field(tree, "verificationMaterial", dict)
        entries = material.get("tlogEntries") or []
        if entries:
            _check_entries(kind, entries)
        if _fill(material):
            data = json.dumps(tree).encode()
        model = _model(data, tree)
        certificate = _certificate(material)
        named = material.get("publicKey")
        if not isinstance(named, dict):
            if certificate is None:
                raise MalformedAttestation("the bundle has neither a certificate nor a publicKey")
            named = {}
        hint = str(named.get("hint", ""))
        content = _content(tree)
        if isinstance(content, Envelope):
            assert model.dsse_envelope is not None  # _content found one
            model.dsse_envelope.payload = content.payload
        timestamps = _timestamps(material)
        stamped = model.verification_material.timestamp_verification_data
        if len((stamped and stamped.rfc3161_timestamps) or ()) != len(timestamps):
            raise MalformedAttestation("the bundle's timestamps stand under another name")
        return cls(content, certificate, timestamps, model, hint)


@dataclass(frozen=True, slots=True)
class SignedBy:
    """A key, or the certificate (DER) of one."""

    key: CosignPublicKey | None = None
    certificate: bytes | None = None

    def material(self) -> dict[str, Any]:
        """How a bundle names it."""
        if self.certificate is not None:
            return {"certificate": {"rawBytes": _base64(self.certificate)}}
        assert self.key is not None  # one of the two
        return {"publicKey": {"hint": self.key.hint}}

    def log_verifier(self) -> dict[str, Any]:
        """How an entry of Rekor v2 names it (`Verifier` of rekor/v2/verifier.proto)."""
        if self.certificate is not None:
            named: dict[str, Any] = {"x509Certificate": {"rawBytes": _base64(self.certificate)}}
        else:
            assert self.key is not None  # one of the two
            named = {"publicKey": {"rawBytes": _base64(self.key.der)}}
        return named | {"keyDetails": "PKIX_ECDSA_P256_SHA_256"}


def render(
    content: MessageSignature | Envelope,
    by: SignedBy,
    *,
    log_entry: dict[str, Any] | None = None,
    timestamps: tuple[bytes, ...] = (),
) -> bytes:
    """A bundle of a signature."""
    material = by.material()
    material["tlogEntries"] = [log_entry] if log_entry else []
    if timestamps:
        material["timestampVerificationData"] = {
            "rfc3161Timestamps": [{"signedTimestamp": _base64(stamp)} for stamp in timestamps]
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
    # half a surrogate pair in what a log wrote is no UTF-8: it is refused when the bundle is read
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="surrogatepass")


def _check_entries(kind: str, entries: Any) -> None:
    if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
        raise MalformedAttestation("the bundle's tlogEntries are no list of entries")
    if kind == _MEDIA_TYPES[1] and not all(item.get("inclusionPromise") for item in entries):
        raise MalformedAttestation("a bundle of version 0.1 has an inclusionPromise")
    if len(entries) > 1:
        raise MalformedAttestation("the bundle has more than one log entry")
    for entry in entries:
        _check_written(entry)


def _check_written(entry: dict[str, Any]) -> None:
    """Numbers and bytes of a log entry are written as cosign reads them: who reads loosely reads other bytes."""
    named = entry.get("logId"), entry.get("inclusionProof"), entry.get("inclusionPromise")
    log, proof, promise = (place if isinstance(place, dict) else {} for place in named)
    if any("_" in name for place in (entry, log, proof, promise) for name in place):
        raise MalformedAttestation("the bundle's log entry has names that are not JSON's: with _")
    for name, value in (
        ("logIndex", entry.get("logIndex")),
        ("integratedTime", entry.get("integratedTime")),
        ("logIndex", proof.get("logIndex")),
        ("treeSize", proof.get("treeSize")),
    ):
        if isinstance(value, str) and not _NUMBER.fullmatch(value):
            raise MalformedAttestation(f"the bundle's {name} is no number: {value[:50]!a}")
    hashes = proof.get("hashes")
    for value in (
        entry.get("canonicalizedBody"),
        log.get("keyId"),
        promise.get("signedEntryTimestamp"),
        proof.get("rootHash"),
        *(hashes if isinstance(hashes, list) else ()),
    ):
        if isinstance(value, str):
            read_base64(value, "log entry")


def _fill(material: dict[str, Any]) -> bool:
    """Put zeroes and empty lists, which protobuf may leave out; whether any were missing."""
    filled = "tlogEntries" not in material
    entries = material.setdefault("tlogEntries", [])
    for entry in entries if isinstance(entries, list) else ():
        proof = entry.get("inclusionProof") if isinstance(entry, dict) else None
        if not isinstance(proof, dict):
            continue
        for place, name, empty in (
            (entry, "logIndex", "0"), (proof, "logIndex", "0"), (proof, "hashes", []),
        ):  # fmt: skip
            filled |= name not in place
            place.setdefault(name, empty)
    return filled


def _model(data: bytes, tree: dict[str, Any]) -> Model:
    """The bundle as sigstore-python has it; MalformedAttestation if a field is not the specification's.

    A large payload is left empty, to be put in by whoever decoded it.
    """
    envelope = tree.get("dsseEnvelope")
    payload = envelope.get("payload") if isinstance(envelope, dict) else None
    if isinstance(payload, str) and _SMALL < len(data) < len(payload) + _SMALL:
        assert isinstance(envelope, dict)
        data = json.dumps(tree | {"dsseEnvelope": envelope | {"payload": ""}}).encode()
    try:
        return Model.model_validate_json(data)
    except ValueError as error:
        raise MalformedAttestation(
            f"the bundle's fields are not those of the specification: {str(error)[:500]}"
        ) from error


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
        value = _bytes(digest, "digest")
        if len(value) != _DIGEST:
            raise MalformedAttestation("the bundle's digest is no SHA-256")
        return MessageSignature(value, _bytes(message, "signature"))
    envelope = _field(tree, "dsseEnvelope", dict)
    signatures = _field(envelope, "signatures", list)
    if len(signatures) != 1 or not isinstance(signatures[0], dict):
        raise MalformedAttestation("the envelope must have one signature")
    if signatures[0].get("keyid"):
        raise MalformedAttestation("the envelope's keyid names a key, which nothing vouches for")
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        raise MalformedAttestation(f"the envelope's payload is not {PAYLOAD_TYPE}")
    return Envelope(PAYLOAD_TYPE, _bytes(envelope, "payload"), _bytes(signatures[0], "sig"))


def _timestamps(material: dict[str, Any]) -> tuple[bytes, ...]:
    data = material.get("timestampVerificationData")
    if not data:
        return ()
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
    text = tree.get(name)
    if not isinstance(text, str):
        raise MalformedAttestation(f"the bundle has no {name}")
    return read_base64(text, name)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
