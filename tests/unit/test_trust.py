"""Trusted roots that are damaged, and what is verified against a good one before any log has it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ObjectIdentifier

from narseal.cosign import bundle, trust
from narseal.cosign.bundle import Bundle, MessageSignature, SignedBy
from narseal.cosign.keys import CosignKey
from narseal.cosign.sign import KeySigner
from narseal.cosign.verify import ByIdentity, ByKey, Verifier
from narseal.errors import ConfigError, MalformedAttestation, Refused
from tests.tools.command import narseal_command
from tests.tools.trust import ROOT, changed, client_config

KEY = CosignKey.generate()
DIGEST = hashlib.sha256(b"file").digest()
Tree = dict[str, Any]


def first(tree: Tree, *names: str) -> Tree:
    """Down the first of each list."""
    for name in names:
        found = tree[name]
        tree = found[0] if isinstance(found, list) else found
    return tree


CHAIN = ("certChain", "certificates")
DAMAGE: dict[str, Callable[[Tree], object]] = {
    "an authority's certificate is none": lambda t: first(
        t, "certificateAuthorities", *CHAIN).update(rawBytes="AAAA"),
    "a timestamp authority's certificate is none": lambda t: first(
        t, "timestampAuthorities", *CHAIN).update(rawBytes="AAAA"),
    "no certificate in a chain": lambda t: first(
        t, "certificateAuthorities", "certChain").update(certificates=[]),
    "no authority": lambda t: t.update(certificateAuthorities=[]),
    "no log": lambda t: t.update(tlogs=[]),
    "a key of an unknown kind": lambda t: first(t, "tlogs", "publicKey").update(keyDetails="X"),
    "a log without an id": lambda t: first(t, "tlogs").pop("logId"),
    "a field besides": lambda t: t.update(more=[]),
    "another version": lambda t: t.update(
        mediaType="application/vnd.dev.sigstore.trustedroot+json;version=9"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_trusted_root_is_named_and_not_a_traceback(what: str, tmp_path: Path) -> None:
    """Its certificates and keys were read in use only, by a library with errors of its own."""
    root = tmp_path / "root.json"
    root.write_bytes(changed(DAMAGE[what]))
    file = tmp_path / "file"
    file.write_bytes(b"file")
    (tmp_path / "file.sigstore.json").write_bytes(
        KeySigner(KEY, None, timeout=1).sign_digest(DIGEST)
    )
    result = narseal_command(
        "verify", file, "--identity", "a", "--issuer", "b", "--trusted-root", root
    )
    assert result.returncode == 2, result.stderr
    assert f"{root}: neither a client trust config nor a trusted root" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_trusted_root_alone_and_with_services(tmp_path: Path) -> None:
    assert trust.load(ROOT).services is None
    file = tmp_path / "trust_config.json"
    file.write_bytes(client_config())
    assert trust.load(file).services is not None
    file.write_bytes(b" " * (4 << 20) + b"{}")
    with pytest.raises(ConfigError, match="too large"):
        trust.load(file)


def with_timestamps(data: bytes, *timestamps: bytes) -> Bundle:
    tree = json.loads(data)
    stamps = [{"signedTimestamp": base64.b64encode(t).decode()} for t in timestamps]
    tree["verificationMaterial"]["timestampVerificationData"] = {"rfc3161Timestamps": stamps}
    return Bundle.parse(json.dumps(tree).encode())


def test_a_timestamp_is_looked_at_though_a_key_needs_none() -> None:
    data = KeySigner(KEY, None, timeout=1).sign_digest(DIGEST)
    verifier = Verifier(ByKey((KEY.public,)), trust.load(ROOT))
    verifier.verify_unlogged(Bundle.parse(data))
    with pytest.raises(MalformedAttestation, match="cannot be read"):
        verifier.verify_unlogged(with_timestamps(data, b"no timestamp"))
    with pytest.raises(Refused, match="no log entry"):
        verifier.verify(Bundle.parse(data), DIGEST)


def keyless(private: ec.EllipticCurvePrivateKey, signature: bytes) -> bytes:
    """A bundle with a certificate that nobody vouches for."""
    now = datetime.now(UTC)
    issuer = x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.57264.1.8"), b"\x0c\x01i")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([])).issuer_name(x509.Name([]))
        .public_key(private.public_key()).serial_number(7)
        .not_valid_before(now).not_valid_after(now + timedelta(minutes=10))
        .add_extension(x509.SubjectAlternativeName([x509.RFC822Name("ci@a")]), critical=True)
        .add_extension(issuer, critical=False)
        .sign(private, hashes.SHA256())
    )  # fmt: skip
    by = SignedBy(certificate=certificate.public_bytes(Encoding.DER))
    return bundle.render(MessageSignature(DIGEST, signature), by)


def test_a_certificate_is_held_to_name_key_and_time_before_a_log_has_it() -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    prehashed = ec.ECDSA(Prehashed(hashes.SHA256()))
    good = keyless(private, private.sign(DIGEST, prehashed))
    stranger = ec.generate_private_key(ec.SECP256R1()).sign(DIGEST, prehashed)
    root = trust.load(ROOT)
    by_ci = Verifier(ByIdentity("ci@a", "i"), root)
    with pytest.raises(Refused, match="no timestamp"):
        by_ci.verify_unlogged(Bundle.parse(good))
    with pytest.raises(MalformedAttestation, match="cannot be read"):
        by_ci.verify_unlogged(with_timestamps(good, b"no timestamp"))
    with pytest.raises(Refused, match="not signed by the key of its certificate"):
        by_ci.verify_unlogged(Bundle.parse(keyless(private, stranger)))
    with pytest.raises(Refused, match="signed by ci@a"):
        Verifier(ByIdentity("ci@b", "i"), root).verify_unlogged(Bundle.parse(good))
    with pytest.raises(Refused, match="with a key"):
        by_ci.verify_unlogged(Bundle.parse(KeySigner(KEY, None, timeout=1).sign_digest(DIGEST)))
