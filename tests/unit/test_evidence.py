"""The sign rule as a truth table: evidence by upstream by key (docs/security.md, U3, I1)."""

from __future__ import annotations

import base64
from itertools import product

import pytest

from narseal.config import UpstreamConfig
from narseal.errors import Refused
from narseal.nix import nar
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.keyring import MAX_FAILURES, KeyRing
from narseal.nix.keys import SecretKey, Signature
from narseal.nix.narinfo import NarInfo
from narseal.nix.store_path import References
from narseal.pipeline.trust.evidence import weigh
from tests.tools.cache import entry, key, store_path

A, B, OWN, STRANGER = (key(name) for name in ("a-1", "b-1", "own-1", "stranger-1"))
NODE = nar.Regular(b"contents")
NAR = b"".join(nar.render(NODE))
PLAIN = entry("plain", node=NODE).info


def addressed(method: Method, hashed: bytes) -> NarInfo:
    ca = ContentAddress(method, Hash.sha256(hashed))
    path = ca.store_path("ca", (), self_hash="", store_dir="/nix/store")
    assert path
    return entry("ca", node=NODE, ca=ca, path=path).info


PATHS = {
    "no CA": (PLAIN, None, False),
    "CA that names NarHash": (addressed(Method.NAR, NAR), "content-address", True),
    "CA that does not": (addressed(Method.FLAT, b"contents"), "content-address", True),
    "git CA": (addressed(Method.GIT, b"x"), None, False),
}
UPSTREAMS = {
    "pinned to A": UpstreamConfig(url="https://a", public_keys=(A.public,)),
    "pinned to B": UpstreamConfig(url="https://b", public_keys=(B.public,)),
    "content": UpstreamConfig(url="https://c", verify="content"),
    "A, content first": UpstreamConfig(
        url="https://d", public_keys=(A.public,), sign_when="content"
    ),
}
SIGNERS: dict[str, tuple[SecretKey, ...]] = {
    "nobody": (), "A": (A,), "B": (B,), "stranger": (STRANGER,), "we": (OWN,),
    "A and B": (A, B), "stranger and we": (STRANGER, OWN),
}  # fmt: skip


def ask(info: NarInfo, upstream: UpstreamConfig) -> tuple[NarInfo, str, bool]:
    kept, evidence = weigh(
        info, upstream=upstream,
        own_keys=KeyRing.of([OWN.public]), max_nar_size=1 << 30,
    )  # fmt: skip
    return kept, evidence.text, evidence.content_first


@pytest.mark.parametrize(
    ("path", "upstream", "signers"), list(product(PATHS, UPSTREAMS, SIGNERS))
)  # fmt: skip
def test_truth_table(path: str, upstream: str, signers: str) -> None:
    info, by_address, needs_content = PATHS[path]
    rules = UPSTREAMS[upstream]
    message = info.fingerprint()
    signed = info.with_signatures(tuple(sorted(k.sign(message) for k in SIGNERS[signers])))
    pinned = {k.name for k in rules.public_keys}
    by_signature = next((k.name for k in SIGNERS[signers] if k.name in pinned), None)
    if not (by_signature or by_address or rules.verify == "content"):
        with pytest.raises(Refused) as refused:
            ask(signed, rules)
        assert refused.value.reason == "unsigned"
        return
    kept, text, content_first = ask(signed, rules)
    assert text == (
        f"signature {by_signature}" if by_signature else by_address or "content"
    )  # fmt: skip
    content = rules.verify == "content" or rules.sign_when == "content"
    assert content_first == (content or (not by_signature and needs_content))
    assert kept == signed  # every one of these signatures is right, or by nobody known


def test_a_known_name_with_wrong_bytes_is_dropped_whoevers_it_is() -> None:
    message = PLAIN.fingerprint()
    wrong = tuple(Signature(name, bytes(64)) for name in ("a-1", "own-1", "foreign-1"))
    kept, _, _ = ask(PLAIN.with_signatures((*wrong, A.sign(message))), UPSTREAMS["pinned to A"])
    assert set(kept.signatures) == {A.sign(message), wrong[2]}


def test_another_key_under_a_pinned_name_is_no_evidence() -> None:
    namesake = SecretKey.from_seed("a-1", bytes(32))
    with pytest.raises(Refused):
        ask(
            PLAIN.with_signatures((namesake.sign(PLAIN.fingerprint()),)),
            UPSTREAMS["pinned to A"],
        )


def test_so_many_bad_signatures_are_tried_and_no_more() -> None:
    wrong = tuple(Signature("a-1", bytes([n]) * 64) for n in range(MAX_FAILURES + 4))
    good = Signature("a-1", A.sign(PLAIN.fingerprint()).data)
    signatures = tuple(sorted((*wrong, good)))
    place = signatures.index(good)
    rules = UPSTREAMS["pinned to A"]
    if place <= MAX_FAILURES:
        ask(PLAIN.with_signatures(signatures), rules)
    else:
        with pytest.raises(Refused):
            ask(PLAIN.with_signatures(signatures), rules)


def test_a_signature_over_anything_else_is_no_evidence() -> None:
    rules = UPSTREAMS["pinned to A"]
    good = PLAIN.with_signatures((A.sign(PLAIN.fingerprint()),))
    ask(good, rules)
    for change in (
        {"nar_hash": Hash.sha256(b"x")}, {"nar_size": PLAIN.nar_size + 1},
        {"references": References((store_path("x"),))},
    ):  # fmt: skip
        from dataclasses import replace

        with pytest.raises(Refused):
            ask(replace(good, **change), rules)


def test_base64_that_only_python_reads_is_no_signature() -> None:
    text = str(A.sign(b"x"))
    name, _, data = text.partition(":")
    assert Signature.parse(text).data == base64.b64decode(data)
    from narseal.errors import MalformedKey

    stray = chr(ord(data[85]) + 1)
    for wrong in (f"{name}: {data}", f"{name}:{data}\n", f"{name}:{data[:-3]}{stray}=="):
        if wrong != text:
            with pytest.raises(MalformedKey):
                Signature.parse(wrong)


def test_a_revoked_key_is_no_evidence_and_its_signature_goes() -> None:
    from narseal.pipeline.trust.evidence import Evidence

    rules = UpstreamConfig(url="https://u", public_keys=(A.public, B.public))
    message = PLAIN.fingerprint()

    def ask_without(revoked: str, *keys: SecretKey) -> tuple[NarInfo, Evidence]:
        signed = PLAIN.with_signatures(tuple(k.sign(message) for k in keys))
        return weigh(
            signed, upstream=rules, own_keys=KeyRing.of([OWN.public]), max_nar_size=1 << 30,
            revoked=frozenset({revoked}),
        )  # fmt: skip

    kept, evidence = ask_without("a-1", A, B)
    assert (kept.signatures, evidence.text) == ((B.sign(message),), "signature b-1")
    for revoked, keys in (("a-1", (A,)), ("a-1", (A, OWN)), ("b-1", (B, STRANGER))):
        with pytest.raises(Refused):
            ask_without(revoked, *keys)


def test_our_own_signature_is_no_upstreams_evidence() -> None:
    with pytest.raises(Refused):
        ask(PLAIN.with_signatures((OWN.sign(PLAIN.fingerprint()),)), UPSTREAMS["pinned to A"])


def test_what_is_weighed_at_its_edges() -> None:
    from dataclasses import replace

    rules = UPSTREAMS["pinned to A"]

    def signed(info: NarInfo) -> NarInfo:
        return info.with_signatures((A.sign(info.fingerprint()),))

    ask(signed(replace(PLAIN, nar_size=1 << 30)), rules)
    for wrong in (
        replace(PLAIN, nar_size=(1 << 30) + 1),
        replace(PLAIN, url="../nar/x"),
        replace(PLAIN, compression="lz4"),
        replace(PLAIN, ca=ContentAddress(Method.NAR, PLAIN.nar_hash)),
    ):
        with pytest.raises(Refused):
            ask(signed(wrong), rules)


def test_content_of_an_upstream_whose_key_is_pinned_needs_that_key() -> None:
    rules = UpstreamConfig(url="https://u", verify="content", public_keys=(A.public,))
    with pytest.raises(Refused):
        ask(PLAIN, rules)
    _, text, content_first = ask(PLAIN.with_signatures((A.sign(PLAIN.fingerprint()),)), rules)
    assert (text, content_first) == ("signature a-1", True)
