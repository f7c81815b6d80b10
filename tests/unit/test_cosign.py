"""Cosign keys, statements and bundles: what is read, and what is not."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from narseal.client import release
from narseal.config import Config
from narseal.cosign import bundle, statement
from narseal.cosign.bundle import Bundle, MessageSignature, SignedBy
from narseal.cosign.keys import CosignKey, CosignPublicKey
from narseal.cosign.sign import KeySigner
from narseal.cosign.statement import AttestedPath, Statement, contradictions
from narseal.cosign.verify import ByIdentity, ByKey, Verifier
from narseal.errors import (
    ConfigError,
    ContentMismatch,
    MalformedAttestation,
    MalformedKey,
    Refused,
)
from narseal.nix.hashes import Hash
from tests.tools.cache import Entry, entry, store_path
from tests.tools.command import narseal_command

KEY = CosignKey.generate()
PEM = KEY.render(b"pw")
DIGEST = hashlib.sha256(b"file").digest()


def changed(change: Callable[[dict[str, Any]], None], pem: str = PEM) -> str:
    lines = pem.splitlines()
    tree = json.loads(base64.b64decode("".join(lines[1:-1])))
    change(tree)
    return f"{lines[0]}\n{base64.b64encode(json.dumps(tree).encode()).decode()}\n{lines[-1]}\n"


def params(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree["kdf"]["params"].update(values)


@pytest.mark.parametrize(
    ("pem", "sentence"),
    [
        (PEM, "the password is wrong"),
        (changed(lambda tree: tree["kdf"].update(name="argon2id")), "'argon2id' is not scrypt"),
        (changed(lambda tree: tree["cipher"].update(name="aes")), "'aes' is not nacl/secretbox"),
        (changed(params(N=1 << 30)), "out of bounds; cosign itself writes N=65536, r=8, p=1"),
        (changed(params(N=2)), "out of bounds"),
        (changed(params(N=65537)), "out of bounds"),
        (changed(params(r=1 << 20)), "out of bounds"),
        (changed(params(p=1000)), "out of bounds"),
        (changed(params(N="65536")), "scrypt's parameter N"),
        (changed(params(r=-1)), "scrypt's parameter r"),
        (changed(params(p=True)), "scrypt's parameter p"),
        (changed(lambda tree: tree["kdf"].pop("params")), "scrypt's parameter N"),
        (changed(lambda tree: tree["kdf"].update(salt="*")), "damaged"),
        (changed(lambda tree: tree["cipher"].update(nonce="AAAA")), "damaged"),
        (changed(lambda tree: tree.pop("kdf")), "kdf, cipher and ciphertext"),
        (changed(lambda tree: tree.update(ciphertext="AAAA")), "damaged"),
        (PEM.replace("-----END", "----"), "cut off"),
        (PEM.replace("SIGSTORE", "RSA"), "must begin with"),
        ("", "must begin with"),
        (PEM[:200], "cut off"),
    ],
)
def test_key_file_that_cannot_be_used_says_why(pem: str, sentence: str) -> None:
    with pytest.raises(MalformedKey) as caught:
        CosignKey.parse(pem, b"wrong")
    assert sentence in str(caught.value)


def test_public_key_of_another_kind_is_refused() -> None:
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())):
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(MalformedKey, match="P-256"):
            CosignPublicKey.parse(pem.decode())


def test_password_never_comes_from_the_command_line(tmp_path: Path) -> None:
    result = narseal_command("key", "generate", "--cosign", cwd=tmp_path)
    assert result.returncode == 2
    assert "--password-file" in result.stderr
    help_text = narseal_command("sign", "--help").stdout
    assert "--password " not in help_text and "--password-file" in help_text


def test_password_from_a_systemd_credential(tmp_path: Path) -> None:
    (tmp_path / "cosign-password").write_text("secret\n")
    (tmp_path / "cosign-password").chmod(0o400)
    made = narseal_command(
        "key", "generate", "--cosign", "--password-file", "$CREDENTIALS_DIRECTORY/cosign-password",
        cwd=tmp_path, CREDENTIALS_DIRECTORY=str(tmp_path),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    CosignKey.parse((tmp_path / "cosign.key").read_text(), b"secret")


def test_check_config_says_that_the_password_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "cosign.key").write_text(PEM)
    (tmp_path / "cosign.key").chmod(0o600)
    narseal_command("key", "generate", "o-1", cwd=tmp_path)
    (tmp_path / "c.toml").write_text(
        f'[[signing.key]]\nurl = "file:{tmp_path}/o-1.secret"\n'
        f'[cosign]\nmode = "key"\nkey = "file:{tmp_path}/cosign.key"\n'
    )
    result = narseal_command("check-config", "--config", tmp_path / "c.toml")
    assert result.returncode == 2
    assert f"{tmp_path}/cosign.key: the password is wrong" in result.stderr
    assert "no password_file is set" in result.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('mode = "key"', "narseal key generate --cosign"),
        ('mode = "keyless"\nidentity_token_file = "/a"\nidentity_token_env = "B"', "more than one"),
        ('mode = "keyless"\noidc_issuer = "https://a"', "oidc_client_id"),
        ("batch_max_subjects = 1025", "1024"),
        ('mode = "kms"', "line 2"),
    ],
)
def test_cosign_settings_that_contradict_are_errors(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Config.parse(f"[cosign]\n{text}\n", environ={})


@pytest.mark.parametrize("command", ["verify", "config"])
def test_regular_expression_that_is_none_is_an_error(tmp_path: Path, command: str) -> None:
    words: list[str | Path]
    if command == "verify":
        file = tmp_path / "x"
        file.write_text("")
        words = ["verify", file, "--identity-regex", "(", "--issuer", "x"]
    else:
        file = tmp_path / "c.toml"
        file.write_text(
            '[[upstream]]\nurl = "https://x"\nverify = "bundle"\nidentity_regex = "("\nissuer = "x"\n'
        )
        words = ["check-config", "--config", file]
    result = narseal_command(*words)
    assert result.returncode == 2
    assert "regular expression" in result.stderr
    assert "Traceback" not in result.stderr


def test_public_instance_out_of_reach_is_exit_code_3(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text("")
    nowhere = "http://127.0.0.1:9"
    words: list[str | Path] = ["verify", file, "--identity", "a", "--issuer", "b"]
    result = narseal_command(*words, HTTPS_PROXY=nowhere, https_proxy=nowhere, HOME=str(tmp_path))
    assert result.returncode == 3, result.stderr
    assert "with no network, give a file" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("size", [10, 200_000])
def test_fields_beside_a_payload_are_held_to_the_specification(size: int) -> None:
    """However large it is: a large one is not looked at twice."""
    items = [entry("p", contents=b"x" * size)]
    text = statement.render(map(attested, items)) + b" " * size
    made = json.loads(KeySigner(KEY, None, timeout=1).sign_statement(text))
    parsed = Bundle.parse(json.dumps(made).encode())
    assert parsed.signed
    envelope = made["dsseEnvelope"]
    assert json.loads(parsed.render())["dsseEnvelope"]["payload"] == envelope["payload"]
    for tree in (
        made | {"more": 1},
        made | {"dsseEnvelope": envelope | {"more": 1}},
        made | {"dsseEnvelope": envelope | {"payload": envelope["payload"] + "="}},
        made | {"dsseEnvelope": envelope | {"payload": [envelope["payload"]]}},
        made | {"verificationMaterial": made["verificationMaterial"] | {"more": 1}},
    ):
        with pytest.raises(MalformedAttestation):
            Bundle.parse(json.dumps(tree).encode())


def attested(item: Entry, name: str = "x.nar") -> AttestedPath:
    return AttestedPath(item.info, name, Hash("sha256", hashlib.sha256(item.file).digest()))


def test_statement_says_what_the_narinfo_says() -> None:
    items = [entry(f"p{n}", b"%d" % n) for n in range(3)]
    parsed = Statement.parse(statement.render(map(attested, items)))
    assert len(parsed.subjects) == 6
    for item in items:
        assert parsed.covers(hashlib.sha256(item.file).digest())
        assert parsed.covers(item.info.nar_hash.digest)
        assert contradictions(parsed, item.info) == []
    assert "does not name" in contradictions(parsed, entry("p9").info)[0]


@pytest.mark.parametrize("field", ["narHash", "narSize", "references"])
def test_statement_that_contradicts_the_narinfo_is_seen(field: str) -> None:
    item = entry("p")
    tree = json.loads(statement.render([attested(item)]))
    tree["predicate"]["paths"][0][field] = "another"
    found = contradictions(Statement.parse(json.dumps(tree).encode()), item.info)
    assert len(found) == 1 and found[0].startswith(f"{field} is another in the attestation")


def test_a_second_entry_of_a_path_that_contradicts_is_seen() -> None:
    item = entry("p")
    tree = json.loads(statement.render([attested(item)]))
    first = tree["predicate"]["paths"][0]
    for paths in ([first, first | {"narSize": 1}], [first | {"narSize": 1}, first]):
        tree["predicate"]["paths"] = paths
        parsed = Statement.parse(json.dumps(tree).encode())
        assert contradictions(parsed, item.info)[0].startswith("narSize is 1 in the attestation")
    tree["predicate"]["paths"] = [first | {"storePath": first["storePath"] + "2"}]
    parsed = Statement.parse(json.dumps(tree).encode())
    assert "does not name" in contradictions(parsed, item.info)[0]
    tree["predicate"]["paths"] = [first]
    tree["predicateType"] += "2"
    parsed = Statement.parse(json.dumps(tree).encode())
    assert "the predicate is" in contradictions(parsed, item.info)[0]


def test_statements_of_other_types_are_none() -> None:
    tree = json.loads(statement.render([attested(entry("p"))]))
    for kind in ("https://in-toto.io/Statement/v1", "https://in-toto.io/Statement/v0.1"):
        Statement.parse(json.dumps(tree | {"_type": kind}).encode())
    for other in ("https://in-toto.io/Statement/v", "https://in-toto.io/Statement/v11", "", None):
        with pytest.raises(MalformedAttestation, match="not an in-toto statement"):
            Statement.parse(json.dumps(tree | {"_type": other}).encode())
    digest = tree["subject"][0]["digest"]["sha256"]
    for wrong in (digest[:-1], f"{digest}0", f"{digest[:-1]}A", 7):
        tree["subject"][0]["digest"]["sha256"] = wrong
        with pytest.raises(MalformedAttestation, match="64 hex digits"):
            Statement.parse(json.dumps(tree).encode())


def test_a_digest_is_covered_whole() -> None:
    item = entry("p")
    parsed = Statement.parse(statement.render([attested(item)]))
    digest = item.info.nar_hash.digest
    assert parsed.covers(digest)
    for wrong in (digest[:-1], digest + b"x", digest[:31] + b"x", b""):
        assert not parsed.covers(wrong)


def test_own_statements_are_byte_for_byte() -> None:
    from narseal.cosign.statement import check_own

    item = entry("p", references=(store_path("a"), store_path("b")))
    assert item.info.file_hash
    name = item.info.url.removeprefix("nar/")
    data = statement.render([AttestedPath(item.info, name, item.info.file_hash)])
    assert check_own(data, store_dir="/nix/store") == (1, [])
    tree = json.loads(data)
    fact = tree["predicate"]["paths"][0]
    refs = fact["references"]

    def rendered(**changes: Any) -> bytes:
        paths = [fact | changes]
        return json.dumps(tree | {"predicate": {"paths": paths}}, separators=(",", ":")).encode()

    assert rendered() == data
    for wrong in (
        data + b"\n",
        rendered(references=refs[::-1]),
        rendered(references=[*refs, refs[-1]]),
        rendered(narSize=-1),
        rendered(narSize=True),
        rendered(storePath="/nix/stores/" + fact["storePath"].rpartition("/")[2]),
        rendered(file=fact["file"] | {"name": "x"}),
        rendered(narHash="sha1:" + "0" * 32),
        rendered(narHash=item.info.nar_hash.sri),
        rendered(narHash=f"sha256:{item.info.nar_hash.hex}"),
        rendered(file=fact["file"] | {"sha256": fact["file"]["sha256"].upper()}),
        data.replace(tree["subject"][0]["digest"]["sha256"].encode(), b"0" * 64, 1),
        data.replace(
            b'"subject":[', b'"subject":[{"name":"x","digest":{"sha256":"' + b"0" * 64 + b'"}},'
        ),
    ):
        assert wrong != data
        with pytest.raises(MalformedAttestation):
            check_own(wrong, store_dir="/nix/store")
    with pytest.raises(MalformedAttestation):
        check_own(data, store_dir="/nix")


def test_a_bundle_by_key_is_of_this_key_and_this_digest() -> None:
    other = CosignKey.generate()
    data = KeySigner(KEY, None, timeout=1).sign_digest(DIGEST)
    parsed = Bundle.parse(data)
    verified = Verifier(ByKey((other.public, KEY.public)), None).verify(parsed, DIGEST)
    assert (verified.signer, verified.log_index) == (KEY.public.hint, None)
    with pytest.raises(Refused, match="not signed by the key"):
        Verifier(ByKey((other.public,)), None).verify(parsed, DIGEST)
    with pytest.raises(Refused, match="not signed by the key"):
        Verifier(ByKey(()), None).verify(parsed, DIGEST)
    for wrong in (DIGEST[:31] + b"x", DIGEST[:31], hashlib.sha256(b"x").digest()):
        with pytest.raises(Refused, match="not of a file"):
            Verifier(ByKey((KEY.public,)), None).verify(parsed, wrong)
    whole = KeySigner(KEY, None, timeout=1).sign_statement(statement.render([attested(entry("p"))]))
    nar_digest = entry("p").info.nar_hash.digest
    Verifier(ByKey((KEY.public,)), None).verify(Bundle.parse(whole), nar_digest)
    with pytest.raises(Refused, match="not of a file"):
        Verifier(ByKey((KEY.public,)), None).verify(Bundle.parse(whole), DIGEST)
    # the hint is whatever the bundle says: the key decides
    tree = json.loads(data)
    tree["verificationMaterial"]["publicKey"]["hint"] = other.public.hint
    lied = Verifier(ByKey((KEY.public,)), None).verify(
        Bundle.parse(json.dumps(tree).encode()), DIGEST
    )
    assert lied.signer == KEY.public.hint
    with pytest.raises(ConfigError, match="trusted root"):
        Verifier(ByIdentity("a", "b"), None)


def test_an_identity_is_the_whole_name_and_its_issuer_the_only_one() -> None:
    from cryptography import x509
    from cryptography.x509.oid import ObjectIdentifier

    from narseal.cosign.verify import _Policy

    private = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)

    def certificate(name: str, *issuers: tuple[str, bytes]) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([])).issuer_name(x509.Name([]))
            .public_key(private.public_key()).serial_number(7)
            .not_valid_before(now).not_valid_after(now + timedelta(minutes=10))
            .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(name)]), critical=True)
        )  # fmt: skip
        for oid, value in issuers:
            extension = x509.UnrecognizedExtension(ObjectIdentifier(oid), value)
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(private, hashes.SHA256())

    def der(text: str) -> bytes:
        return b"\x0c" + bytes([len(text)]) + text.encode()

    old, new = "1.3.6.1.4.1.57264.1.1", "1.3.6.1.4.1.57264.1.8"
    good = certificate("ci@a.example", (new, der("https://i")))

    def take(found: x509.Certificate, identity: str, issuer: str, *, is_regex: bool = False) -> str:
        policy = _Policy(ByIdentity(identity, issuer, is_regex=is_regex))
        policy.verify(found)
        return policy.found

    assert take(good, "ci@a.example", "https://i") == "ci@a.example"
    with pytest.raises(Refused):  # exactly, unless somebody says otherwise
        _Policy(ByIdentity("ci@.*", "https://i")).verify(good)
    assert take(good, ".*@a[.]example", "https://i", is_regex=True) == "ci@a.example"
    both = certificate("ci@a.example", (old, b"https://i"), (new, der("https://i")))
    assert take(both, "ci@a.example", "https://i")
    for found, identity, issuer, is_regex in (
        (good, "ci@a.exampl", "https://i", False),
        (good, "ci@a.example2", "https://i", False),
        (good, "ci@a.example", "https://", False),
        (good, "ci@a.example", "https://i/", False),
        (good, "", "https://i", False),
        (good, ".*@a[.]example", "https://i", False),
        (good, ".*@a", "https://i", True),
        (good, "@a[.]example", "https://i", True),
        (certificate("ci@a.example"), "ci@a.example", "https://i", False),
        (
            certificate("ci@a.example", (old, b"https://i"), (new, der("https://j"))),
            "ci@a.example", "https://i", False,
        ),
        (
            certificate("ci@a.example", (old, b"https://j"), (new, der("https://i"))),
            "ci@a.example", "https://i", False,
        ),
    ):  # fmt: skip
        with pytest.raises(Refused):
            take(found, identity, issuer, is_regex=is_regex)


def test_predicate_follows_its_schema() -> None:
    schema = json.loads(Path("docs/predicate.schema.json").read_text())
    tree = json.loads(statement.render([attested(entry("p"))]))
    facts = tree["predicate"]["paths"][0]
    described = schema["properties"]["paths"]["items"]
    assert schema["$id"] == tree["predicateType"] == statement.PREDICATE_TYPE
    assert set(described["properties"]) == set(facts) == set(described["required"])


def test_statement_says_nothing_that_no_signature_covers() -> None:
    """F24: anybody on the way can set a narinfo's Deriver, and the statement said it."""
    item = entry("p").but(deriver=store_path("evil.drv"), extra=(("Note", "evil"),))
    assert b"evil" not in statement.render([attested(item)])


def test_key_smuggled_as_certificate_is_refused() -> None:
    signer = KeySigner(KEY, None, timeout=1)
    tree = json.loads(signer.sign_digest(DIGEST))
    verifier = Verifier(ByKey((KEY.public,)), None)
    verifier.verify(Bundle.parse(json.dumps(tree).encode()), DIGEST)
    material = tree["verificationMaterial"]
    material["certificate"] = {"rawBytes": base64.b64encode(KEY.public.der).decode()}
    with pytest.raises(MalformedAttestation, match="not those of the specification"):
        Bundle.parse(json.dumps(tree).encode())  # one of the two may be there
    del material["publicKey"]
    with pytest.raises(Refused, match="certificate"):
        verifier.verify(Bundle.parse(json.dumps(tree).encode()), DIGEST)


def test_log_entry_of_another_signature_is_refused_even_without_a_trusted_root() -> None:
    other = base64.b64encode(KEY.sign_digest(DIGEST)).decode()
    body = {
        "kind": "hashedrekord",
        "apiVersion": "0.0.2",
        "spec": {
            "hashedRekordV002": {
                "data": {"digest": base64.b64encode(DIGEST).decode()},
                "signature": {
                    "content": other,
                    "verifier": {
                        "publicKey": {"rawBytes": base64.b64encode(KEY.public.der).decode()}
                    },
                },
            }
        },
    }
    canonical = base64.b64encode(json.dumps(body).encode()).decode()
    content = MessageSignature(DIGEST, KEY.sign_digest(DIGEST))
    entry = {
        "logIndex": "0",
        "logId": {"keyId": base64.b64encode(bytes(32)).decode()},
        "kindVersion": {"kind": "hashedrekord", "version": "0.0.2"},
        "inclusionProof": {
            "logIndex": "0",
            "rootHash": base64.b64encode(bytes(32)).decode(),
            "treeSize": "1",
            "checkpoint": {"envelope": "x"},
        },
        "canonicalizedBody": canonical,
    }
    data = bundle.render(content, SignedBy(key=KEY.public), log_entry=entry)
    with pytest.raises(Refused, match="another signature"):
        Verifier(ByKey((KEY.public,)), None).verify(Bundle.parse(data), DIGEST)


def test_too_many_subjects_are_refused() -> None:
    tree = json.loads(statement.render([attested(entry("p"))]))
    tree["subject"] = tree["subject"][:1] * 1025
    with pytest.raises(MalformedAttestation, match="1025 subjects"):
        Statement.parse(json.dumps(tree).encode())


def layout(folder: Path) -> Path:
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{name}", "size": len(data)}

    image = "application/vnd.oci.image"
    manifest = {
        "config": put(b"{}", f"{image}.config.v1+json"),
        "layers": [put(b"layer", f"{image}.layer.v1.tar")],
    }
    index = {"manifests": [put(json.dumps(manifest).encode(), f"{image}.manifest.v1+json")]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def test_container_layout_is_signed_as_its_index_after_its_blobs_were_checked(
    tmp_path: Path,
) -> None:
    folder = layout(tmp_path / "image")
    (tmp_path / "cosign.key").write_text(PEM)
    (tmp_path / "cosign.key").chmod(0o600)
    (tmp_path / "pw").write_text("pw")
    (tmp_path / "pw").chmod(0o600)
    (tmp_path / "cosign.pub").write_text(KEY.public.render())
    words: list[str | Path] = [
        "sign",
        folder,
        "--key",
        tmp_path / "cosign.key",
        "--password-file",
        tmp_path / "pw",
    ]
    assert release.check_layout(folder) == 3
    assert narseal_command(*words).returncode == 0
    check: list[str | Path] = ["verify", folder, "--key", tmp_path / "cosign.pub"]
    assert narseal_command(*check).returncode == 0
    blob = next(b for b in (folder / "blobs/sha256").iterdir() if b.read_bytes() == b"layer")
    blob.write_bytes(b"other")
    assert narseal_command(*check).returncode == 1
    result = narseal_command(*words, "--force")
    assert result.returncode == 1
    assert "not what it is named" in result.stderr
    with pytest.raises(ContentMismatch):
        release.check_layout(folder)


def test_a_large_file_is_read_once_in_constant_memory(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as opened:
        opened.truncate(3 << 30)
    reads: list[int] = []
    assert release.digest(file, reads.append) == _zeros(3 << 30)
    assert sum(reads) == 3 << 30
    assert max(reads) <= 1 << 20


def _zeros(size: int) -> bytes:
    hasher = hashlib.sha256()
    block = bytes(1 << 24)
    for _ in range(size // len(block)):
        hasher.update(block)
    return hasher.digest()


def test_timestamps_under_the_name_of_the_protobuf_field_are_not_passed_over() -> None:
    """Readers of protobuf's JSON take either name."""
    made = json.loads(KeySigner(KEY, None, timeout=1).sign_digest(bytes(32)))
    stamps = {"rfc3161Timestamps": [{"signedTimestamp": "AAAA"}]}

    def bundle(name: str) -> bytes:
        material = made["verificationMaterial"] | {name: stamps}
        return json.dumps(made | {"verificationMaterial": material}).encode()

    assert Bundle.parse(bundle("timestampVerificationData")).timestamps
    with pytest.raises(MalformedAttestation, match="another name"):
        Bundle.parse(bundle("timestamp_verification_data"))
