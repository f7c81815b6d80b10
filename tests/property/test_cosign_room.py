"""The Sigstore room's parsers take any bytes: a value, or an error of ours."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from narseal.cosign.bundle import Bundle
from narseal.cosign.keys import CosignKey
from narseal.cosign.statement import Statement
from narseal.cosign.verify import ByKey, Verifier
from narseal.errors import MalformedAttestation, MalformedKey, NarsealError

KEY = CosignKey.generate()
names = st.sampled_from(
    ["mediaType", "verificationMaterial", "publicKey", "hint", "tlogEntries", "messageSignature",
     "messageDigest", "algorithm", "digest", "signature", "dsseEnvelope", "payload", "payloadType",
     "signatures", "sig", "canonicalizedBody", "certificate", "rawBytes", "_type", "subject",
     "predicate", "predicateType", "name", "sha256", "timestampVerificationData",
     "rfc3161Timestamps", "signedTimestamp"]
)  # fmt: skip
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.just("SHA2_256"),
    st.just("QUJD"), st.just("application/vnd.dev.sigstore.bundle.v0.3+json"),
    st.just("application/vnd.in-toto+json"), st.just("https://in-toto.io/Statement/v1"),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=6),
    max_leaves=25,
)


@given(trees)
def test_any_json_is_a_bundle_or_malformed(tree: object) -> None:
    try:
        parsed = Bundle.parse(json.dumps(tree).encode())
        Verifier(ByKey((KEY.public,)), None).verify(parsed, bytes(32))
    except NarsealError:
        return


@given(trees)
def test_any_json_is_a_statement_or_malformed(tree: object) -> None:
    try:
        Statement.parse(json.dumps(tree).encode())
    except MalformedAttestation:
        return


@given(st.binary(max_size=200))
def test_any_bytes_are_neither(data: bytes) -> None:
    for parse in (Bundle.parse, Statement.parse):
        try:
            parse(data)
        except MalformedAttestation:
            continue


@given(st.text(max_size=200))
def test_any_text_is_no_key(text: str) -> None:
    for pem in (
        text,
        f"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n{text}\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----",
    ):
        try:
            CosignKey.parse(pem, b"")
        except MalformedKey:
            continue
