"""Keys and bundles that cosign and narseal make for each other."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from narseal.cosign import trust
from narseal.cosign.keys import CosignKey
from tests.real.sigstore.conftest import IDENTITY, PASSWORD, Signed
from tests.tools.command import narseal_command
from tests.tools.cosign import Cosign
from tests.tools.sigstore import Sigstore

pytestmark = pytest.mark.real

_NO_SERVICES = {
    "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
    "rekorTlogConfig": {},
    "tsaConfig": {},
}


def test_cosign_signs_with_a_key_that_narseal_made(cosign: Cosign) -> None:
    folder = cosign.folder
    (folder / "password").write_text("tr0ub4dor\n")
    (folder / "password").chmod(0o600)
    made = narseal_command(
        "key", "generate", "--cosign", "--password-file", folder / "password", cwd=folder
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == (folder / "cosign.pub").read_text()
    assert (folder / "cosign.key").stat().st_mode & 0o777 == 0o600
    blob, bundle = folder / "blob", folder / "b.json"
    blob.write_text("text")
    (folder / "config.json").write_text(json.dumps(_NO_SERVICES))
    cosign.run(
        "sign-blob", "--key", folder / "cosign.key", "--signing-config", folder / "config.json",
        "--bundle", bundle, blob, password="tr0ub4dor",
    )  # fmt: skip
    public = cosign.run("public-key", "--key", folder / "cosign.key", password="tr0ub4dor")
    assert public == (folder / "cosign.pub").read_text()
    result = narseal_command("verify", blob, "--bundle", bundle, "--key", folder / "cosign.pub")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("label", ["SIGSTORE", "COSIGN"])
def test_narseal_signs_with_a_key_that_cosign_made(cosign: Cosign, label: str) -> None:
    folder = cosign.folder
    cosign.run(
        "generate-key-pair", "--output-key-prefix", folder / "pair", password=PASSWORD
    )  # fmt: skip
    file = folder / "pair.key"
    text = file.read_text()
    assert "ENCRYPTED SIGSTORE PRIVATE KEY" in text
    file.write_text(text.replace("ENCRYPTED SIGSTORE", f"ENCRYPTED {label}"))
    file.chmod(0o600)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o600)
    (folder / "image.iso").write_bytes(b"release" * 100_000)
    signed = narseal_command(
        "sign", folder / "image.iso", "--key", file, "--password-file", folder / "password",
        "--legacy", "--json",
    )  # fmt: skip
    assert signed.returncode == 0, signed.stderr
    bundle = folder / "image.iso.sigstore.json"
    assert json.loads(signed.stdout)["bundle"] == str(bundle)
    cosign.run(
        "verify-blob", "--key", folder / "pair.pub", "--bundle", bundle, "--insecure-ignore-tlog",
        folder / "image.iso",
    )  # fmt: skip
    cosign.run(
        "verify-blob", "--key", folder / "pair.pub", "--signature", folder / "image.iso.sig",
        "--insecure-ignore-tlog", folder / "image.iso",
    )  # fmt: skip
    assert not (folder / "image.iso.pem").exists()
    again = narseal_command("sign", folder / "image.iso", "--key", file)
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_signature_and_certificate_of_a_keyless_signature(
    cosign: Cosign, instance: Sigstore
) -> None:
    folder = cosign.folder
    file = folder / "app.tar.gz"
    file.write_bytes(b"archive")
    signed = narseal_command(
        "sign", file, "--keyless", "--trust-config", instance.trust_config_file, "--legacy",
        "--identity-token-env", "TOKEN", TOKEN=instance.issuer.token(IDENTITY),
    )  # fmt: skip
    assert signed.returncode == 0, signed.stderr
    # .sig and .pem carry no log entry, so this is what older cosign can look at
    words: list[str | Path] = [
        "verify-blob", "--signature", folder / "app.tar.gz.sig", "--certificate",
        folder / "app.tar.gz.pem", "--insecure-ignore-tlog", "--certificate-oidc-issuer",
        instance.issuer.url, "--certificate-identity",
    ]  # fmt: skip
    roots = {
        "SIGSTORE_ROOT_FILE": instance.folder / "ca.pem",
        "SIGSTORE_CT_LOG_PUBLIC_KEY_FILE": instance.folder / "ct.pub",
    }
    result = cosign.try_run(*words, IDENTITY, file, files=roots)
    assert result.returncode == 0, result.stderr
    assert cosign.try_run(*words, "eve@example.org", file, files=roots).returncode != 0
    file.write_bytes(b"other")
    assert cosign.try_run(*words, IDENTITY, file, files=roots).returncode != 0


def test_bundles_that_cosign_made_verify(
    cosign: Cosign, instance: Sigstore, signed: Signed
) -> None:
    folder = cosign.folder
    blob = folder / "blob"
    blob.write_text("text")
    services: list[str | Path] = ["--signing-config", instance.signing_config_file]
    services += ["--trusted-root", instance.trusted_root_file]
    predicate = folder / "predicate.json"
    predicate.write_text('{"a": 1}')
    attest: list[str | Path] = ["attest-blob", "--predicate", predicate, "--type", "urn:example:x"]
    blob_words: list[str | Path] = ["sign-blob"]
    by_key: list[str | Path] = ["--key", signed.key]
    token = instance.issuer.token("dev@example.org")
    keyless: list[str | Path] = ["--identity-token", token]
    for number, (make, who) in enumerate(
        (make, who) for make in (blob_words, attest) for who in (by_key, keyless)
    ):
        bundle = folder / f"{number}.json"
        cosign.run(*make, *who, *services, "--bundle", bundle, blob, password=PASSWORD)
        expected = (
            ["--key", signed.public]
            if who is by_key
            else ["--identity", "dev@example.org", "--issuer", instance.issuer.url]
        )
        words = ["verify", blob, "--bundle", bundle, "--offline", *expected]
        words += ["--trusted-root", instance.trusted_root_file]
        result = narseal_command(*words)
        assert result.returncode == 0, (make, who, result.stderr, bundle.read_text()[:3000])
        assert "signed by" in result.stdout
        assert narseal_command(*words, "--type", "urn:example:y").returncode == 1


def test_the_key_files_of_both_are_the_same_form(cosign: Cosign) -> None:
    cosign.run("generate-key-pair", "--output-key-prefix", cosign.folder / "a", password="x")
    theirs = _form(cosign.folder / "a.key")
    ours = cosign.folder / "b.key"
    ours.write_text(CosignKey.generate().render(b"x"))
    assert _form(ours) == theirs


def _form(file: Path) -> object:
    """The key file's JSON with the lengths of its random parts."""
    lines = file.read_text().splitlines()
    tree = json.loads(base64.b64decode("".join(lines[1:-1])))
    tree["kdf"]["salt"] = len(base64.b64decode(tree["kdf"]["salt"]))
    tree["cipher"]["nonce"] = len(base64.b64decode(tree["cipher"]["nonce"]))
    tree["ciphertext"] = len(base64.b64decode(tree["ciphertext"]))
    return lines[0], tree


def test_identity_regex_matches_the_whole_name_and_only_by_its_option(
    instance: Sigstore, signed: Signed
) -> None:
    def verdict(*who: str) -> int:
        return narseal_command(
            "verify", signed.first, "--bundle", signed.bundle("keyless-blob"), "--issuer",
            instance.issuer.url, "--trusted-root", instance.trusted_root_file, *who,
        ).returncode  # fmt: skip

    assert verdict("--identity-regex", r".*@example\.org") == 0
    assert verdict("--identity-regex", r"ci@example") == 1
    assert verdict("--identity-regex", r"i@example\.org") == 1
    assert verdict("--identity", r".*@example\.org") == 1


def test_a_trusted_root_alone_verifies_but_does_not_sign(instance: Sigstore) -> None:
    known = trust.load(instance.trusted_root_file)
    assert known.services is None
    result = narseal_command(
        "sign", __file__, "--keyless", "--trust-config", instance.trusted_root_file,
        "--identity-token-env", "TOKEN", "--force", TOKEN=instance.issuer.token(),
    )  # fmt: skip
    assert result.returncode == 2
    assert "trusted root" in result.stderr
