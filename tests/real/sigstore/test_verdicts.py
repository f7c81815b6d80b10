"""One table, two columns: stock cosign and narseal verify the same bundles and agree."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from narseal.cosign.statement import PREDICATE_TYPE
from tests.real.sigstore.conftest import IDENTITY, Signed
from tests.real.sigstore.tampering import HARMLESS, STRICTER, TABLES, Change
from tests.tools.command import narseal_command
from tests.tools.cosign import Cosign
from tests.tools.sigstore import Sigstore

pytestmark = pytest.mark.real


@dataclass(frozen=True)
class Case:
    name: str
    bundle: str
    good: bool
    file: str = "first"
    public: str = "public"
    identity: str = IDENTITY
    issuer: str = ""
    byte: bool = False
    change: Change | None = None
    #: Where cosign is laxer than narseal, and why it may be, stands at the change.
    cosign_takes_it: bool = False

    @property
    def mode(self) -> str:
        return self.bundle.partition("-")[0]


def _entry(tree: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = tree["verificationMaterial"]["tlogEntries"][0]
    return entry


def no_entry(tree: dict[str, Any]) -> None:
    tree["verificationMaterial"]["tlogEntries"] = []


def no_timestamp(tree: dict[str, Any]) -> None:
    tree["verificationMaterial"].pop("timestampVerificationData")


def other_proof(tree: dict[str, Any]) -> None:
    proof = _entry(tree)["inclusionProof"]
    proof["hashes"] = [*proof.get("hashes", []), "A" * 43 + "="]


def other_root(tree: dict[str, Any]) -> None:
    """Not under any signature: cosign takes the root from the checkpoint and ignores this one."""
    _entry(tree)["inclusionProof"]["rootHash"] = "A" * 43 + "="


def unsigned_checkpoint(tree: dict[str, Any]) -> None:
    checkpoint = _entry(tree)["inclusionProof"]["checkpoint"]
    checkpoint["envelope"] = checkpoint["envelope"][:-12] + "AAAAAAAAAA==\n"


def other_signature(tree: dict[str, Any]) -> None:
    content = tree.get("messageSignature")
    place, name = (
        (content, "signature") if content else (tree["dsseEnvelope"]["signatures"][0], "sig")
    )
    text = place[name]
    place[name] = text[:20] + ("A" if text[20] != "A" else "B") + text[21:]


def two_signatures(tree: dict[str, Any]) -> None:
    tree["dsseEnvelope"]["signatures"] *= 2


def other_payload(tree: dict[str, Any]) -> None:
    payload = tree["dsseEnvelope"]["payload"]
    tree["dsseEnvelope"]["payload"] = payload[:400] + payload[400:404][::-1] + payload[404:]


CASES = [
    Case("blob by key", "key-blob", True),
    Case("blob by key with a log", "log-blob", True),
    Case("blob keyless", "keyless-blob", True),
    *(
        Case(f"{file} of 1,000 {mode}", f"{mode}-batch", True, file=file)
        for mode in ("key", "log", "keyless")
        for file in ("first", "last")
    ),
    *(
        Case(f"changed byte {bundle}", bundle, False, byte=True)
        for bundle in ("key-blob", "log-blob", "keyless-blob", "key-batch", "keyless-batch")
    ),
    *(
        Case(f"not in the batch {mode}", f"{mode}-batch", False, file="stranger")
        for mode in ("key", "log", "keyless")
    ),
    *(
        Case(f"other key {bundle}", bundle, False, public="other_public")
        for bundle in ("key-blob", "log-blob", "key-batch", "log-batch")
    ),
    *(
        Case(f"{what} {bundle}", bundle, False, identity=identity)
        for bundle in ("keyless-blob", "keyless-batch")
        for what, identity in {
            "other identity": "eve@example.org",
            "right prefix only": "ci@example.or",
            "right suffix only": "i@example.org",
            "longer identity": "ci@example.org.evil",
        }.items()
    ),
    *(
        Case(f"other issuer {bundle}", bundle, False, issuer="http://127.0.0.1:1")
        for bundle in ("keyless-blob", "keyless-batch")
    ),
    *(
        Case(f"log entry swapped {bundle}", f"{bundle}-swapped", False)
        for bundle in ("log-blob", "log-batch", "keyless-blob", "keyless-batch")
    ),
    *(
        Case(f"{change.__name__} {bundle}", bundle, False, change=change)
        for bundle in ("log-blob", "keyless-blob", "keyless-batch")
        for change in (no_entry, other_proof, unsigned_checkpoint, other_signature)
    ),
    *(
        Case(f"other_root {bundle}", bundle, False, change=other_root, cosign_takes_it=True)
        for bundle in ("log-blob", "keyless-blob", "keyless-batch")
    ),
    Case("no_timestamp log-blob", "log-blob", True, change=no_timestamp),
    Case("no_timestamp log-batch", "log-batch", True, change=no_timestamp),
    Case("no_timestamp keyless-blob", "keyless-blob", False, change=no_timestamp),
    Case("other_signature key-blob", "key-blob", False, change=other_signature),
    Case("two_signatures keyless-batch", "keyless-batch", False, change=two_signatures),
    Case("two_signatures key-batch", "key-batch", False, change=two_signatures),
    Case("other_payload key-batch", "key-batch", False, change=other_payload),
    Case("other_payload keyless-batch", "keyless-batch", False, change=other_payload),
    *(
        Case(
            f"{name} {bundle}", bundle, mode in HARMLESS.get(name, ()), change=change,
            cosign_takes_it=mode in STRICTER.get(name, ((), ""))[0],
        )
        for bundle, tables in TABLES.items()
        for table in tables
        for name, change in table.items()
        for mode in [bundle.partition("-")[0]]
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cosign_and_narseal_agree(
    case: Case, signed: Signed, instance: Sigstore, cosign: Cosign
) -> None:
    file = getattr(signed, case.file)
    if case.byte:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file = cosign.folder / "changed.nar"
        file.write_bytes(data)
    bundle = signed.bundle(case.bundle)
    if case.change:
        tree = json.loads(bundle.read_bytes())
        text = case.change(tree)
        bundle = cosign.folder / "changed.json"
        bundle.write_text(json.dumps(tree) if text is None else text)
    theirs = cosign.try_run(*_cosign_words(case, signed, instance, file, bundle))
    ours = narseal_command(*_narseal_words(case, signed, instance, file, bundle))
    said = f"cosign: {theirs.stdout}{theirs.stderr}\nnarseal: {ours.stdout}{ours.stderr}"
    expected = (case.good or case.cosign_takes_it, case.good)
    assert (theirs.returncode == 0, ours.returncode == 0) == expected, said
    assert ours.returncode in (0, 1), said


def test_the_table_is_large_and_says_why_narseal_is_stricter() -> None:
    tampered = [case for case in CASES if case.change]
    assert len(tampered) >= 200
    known = {name for tables in TABLES.values() for table in tables for name in table}
    assert set(HARMLESS) | set(STRICTER) <= known
    assert all(why for _, why in STRICTER.values())


@pytest.mark.parametrize("bundle", ["log-blob", "keyless-blob", "keyless-batch"])
def test_the_index_that_is_printed_is_the_one_that_was_verified(
    bundle: str, signed: Signed, instance: Sigstore
) -> None:
    case = Case("", bundle, True)
    words = _narseal_words(case, signed, instance, signed.first, signed.bundle(bundle))
    said = json.loads(narseal_command(*words, "--json").stdout)
    tree = json.loads(signed.bundle(bundle).read_bytes())
    proof = tree["verificationMaterial"]["tlogEntries"][0]["inclusionProof"]
    assert said["logIndex"] == int(proof["logIndex"])


def _cosign_words(
    case: Case, signed: Signed, instance: Sigstore, file: Path, bundle: Path
) -> list[str | Path]:
    batch = "batch" in case.bundle
    words: list[str | Path] = ["verify-blob-attestation" if batch else "verify-blob"]
    words += ["--bundle", bundle]
    words += ["--type", PREDICATE_TYPE] if batch else []
    if case.mode == "key":
        words += ["--key", getattr(signed, case.public), "--insecure-ignore-tlog"]
    else:
        words += ["--trusted-root", instance.trusted_root_file]
        if case.mode == "log":
            words += ["--key", getattr(signed, case.public)]
        else:
            words += ["--certificate-identity", case.identity]
            words += ["--certificate-oidc-issuer", case.issuer or instance.issuer.url]
    return [*words, file]


def _narseal_words(
    case: Case, signed: Signed, instance: Sigstore, file: Path, bundle: Path
) -> list[str | Path]:
    words: list[str | Path] = ["verify", file, "--bundle", bundle, "--offline"]
    words += ["--type", PREDICATE_TYPE] if "batch" in case.bundle else []
    if case.mode != "key":
        words += ["--trusted-root", instance.trusted_root_file]
    if case.mode == "keyless":
        return [*words, "--identity", case.identity, "--issuer", case.issuer or instance.issuer.url]
    return [*words, "--key", getattr(signed, case.public)]
