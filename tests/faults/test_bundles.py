"""Bundles that lie about themselves: the key's name, the form of what is inside."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from narseal.cosign.keys import CosignKey
from narseal.cosign.sign import KeySigner
from narseal.nix.hashes import Hash
from tests.faults.test_policy import APP, CI, OTHER, STRANGER, Pipeline, attested, digest_of
from tests.faults.test_uploads import add
from tests.tools.cache import entry
from tests.tools.command import narseal_command
from tests.tools.narseal import UPSTREAM, Client, narseal, narseal_process
from tests.tools.upstream import FakeCache

ITEM = entry("bundled", b"bundled", compression="zstd")


def hinted(bundle: bytes, hint: str) -> bytes:
    """The bundle with another name for its key, which nothing signs."""
    tree = json.loads(bundle)
    tree["verificationMaterial"]["publicKey"]["hint"] = hint
    return json.dumps(tree).encode()


async def test_bundles_of_a_revoked_key_are_found_whatever_they_say_of_it(tmp_path: Path) -> None:
    public, other = tmp_path / "cosign.pub", tmp_path / "other.pub"
    public.write_text(CI.public.render())
    other.write_text(STRANGER.public.render())
    accepted = [
        {"cosign_key": str(file), "predicate_types": ["slsaprovenance1"]}
        for file in (public, other)
    ]
    token = add(tmp_path)
    more: dict[str, Any] = {
        "upload": {"enabled": True, "tokens_file": str(tmp_path / "tokens")},
        "attestations": {"accept": accepted},
    }
    with narseal_process(tmp_path, **more) as process:
        async with aiohttp.ClientSession() as session:
            pipeline = Pipeline(Client(process.url, session, tmp_path / "storage"), token)
            for item in (APP, OTHER):
                assert (await pipeline.path(item))[0] == 201
            by_revoked = [
                attested(APP, note="its own name"),
                hinted(attested(APP, note="another's name"), STRANGER.public.hint),
                hinted(attested(APP, note="no name"), ""),
            ]
            for bundle in by_revoked:
                assert (await pipeline.attest(digest_of(APP), bundle))[0] == 201
            honest = hinted(attested(OTHER, by=STRANGER), CI.public.hint)
            assert (await pipeline.attest(digest_of(OTHER), honest))[0] == 201
            done = await asyncio.to_thread(
                narseal_command, "revoke", "--cosign-key", public, "--reason", "stolen",
                "--config", tmp_path / "narseal.toml",
            )  # fmt: skip
            assert "3 bundles dropped" in done.stdout, done.stderr
            client = pipeline.client
            assert (await client.get(f"attestations/{digest_of(APP)}"))[0] == 404
            assert (await client.get(f"attestations/{digest_of(OTHER)}"))[0] == 200


def _bundle() -> dict[str, Any]:
    digest = Hash.sha256(ITEM.file).digest
    tree: dict[str, Any] = json.loads(KeySigner(CI, None, timeout=1).sign_digest(digest))
    return tree


def _logged(body: dict[str, Any]) -> dict[str, Any]:
    tree = _bundle()
    text = base64.b64encode(json.dumps(body).encode()).decode()
    tree["verificationMaterial"]["tlogEntries"] = [{"canonicalizedBody": text}]
    return tree


def _strange_curve() -> str:
    """A public key of a curve that has no name: PEM that parses and is not supported."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    der = key.public_bytes(serialization.Encoding.DER, form)
    # 1.2.840.10045.3.1.7 becomes 1.2.840.10045.3.1.127
    der = der.replace(bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d03017f"))
    text = base64.b64encode(der).decode()
    return f"-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n"


def _with(place: str, name: str, value: Any) -> dict[str, Any]:
    tree = _bundle()
    tree[place][name] = value
    return tree


def _short_digest() -> dict[str, Any]:
    tree = _bundle()
    tree["messageSignature"]["messageDigest"]["digest"] = "QUJD"
    return tree


RUBBISH: dict[str, bytes] = {
    "signature that is not ASCII": json.dumps(_with("messageSignature", "signature", "é")).encode(),
    "signature that is no DER": json.dumps(_with("messageSignature", "signature", "AAAA")).encode(),
    "digest of three bytes": json.dumps(_short_digest()).encode(),
    "surrogate as hint": json.dumps(
        _with("verificationMaterial", "publicKey", {"hint": "\ud800"}) | {"messageSignature": {}}
    ).encode(),
    "entries of version 0.1 that are no list": json.dumps(
        _with("verificationMaterial", "tlogEntries", True)
        | {"mediaType": "application/vnd.dev.sigstore.bundle+json;version=0.1"}
    ).encode(),
    "not UTF-8": b'{"mediaType": "\xff"}',
    "deep": b"[" * 100_000,
    "huge number": b'{"mediaType": ' + b"9" * 5000 + b"}",
    "key of no known curve": json.dumps(
        _logged(
            {
                "kind": "hashedrekord", "apiVersion": "0.0.1",
                "spec": {
                    "data": {"hash": {"value": "00" * 32}},
                    "signature": {
                        "content": "",
                        "publicKey": {
                            "content": base64.b64encode(_strange_curve().encode()).decode()
                        },
                    },
                },
            }
        )
    ).encode(),
    "certificate that is none": json.dumps(
        _with("verificationMaterial", "certificate", {"rawBytes": "QUJD"})
    ).encode(),
}  # fmt: skip


@pytest.mark.parametrize("case", RUBBISH)
async def test_after_a_rubbish_bundle_the_next_upstream_is_asked(
    case: str, tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    upstream.add(ITEM)
    second.add(ITEM.signed(UPSTREAM))
    upstream.files[f"{ITEM.info.url}.sigstore.json"] = RUBBISH[case]
    first = {
        "url": upstream.url, "verify": "bundle", "cosign_key": CI.public.render(),
        "public_keys": [], "priority": 1,
    }  # fmt: skip
    async with narseal(tmp_path, first, {"url": second.url, "priority": 2}) as client:
        info = await client.narinfo(ITEM.hash)
        assert upstream.asked[f"{ITEM.info.url}.sigstore.json"] == 1
        assert (await client.get(info.url))[0] == 200


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(_strange_curve(), id="a curve without a name"),
        pytest.param("-----BEGIN PUBLIC KEY-----\né\n-----END PUBLIC KEY-----\n", id="not ASCII"),
        pytest.param("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", id="no DER"),
    ],
)
def test_unusable_public_key_is_named_and_not_a_traceback(key: str, tmp_path: Path) -> None:
    file, public = tmp_path / "file", tmp_path / "cosign.pub"
    file.write_bytes(b"x")
    (tmp_path / "file.sigstore.json").write_text(json.dumps(_bundle()))
    public.write_text(key)
    done = narseal_command("verify", file, "--key", public)
    assert done.returncode == 2, done.stderr
    assert "cosign.pub" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("what", ["ciphertext", "salt", "nonce", "key of another curve", "locked"])
def test_unusable_private_key_is_named_and_not_a_traceback(what: str, tmp_path: Path) -> None:
    file = tmp_path / "cosign.key"
    lines = CosignKey.generate().render(b"").splitlines()
    document = json.loads(base64.b64decode("".join(lines[1:-1])))
    if what == "ciphertext":
        document["ciphertext"] = "é"
    elif what == "salt":
        document["kdf"]["salt"] = "é"
    elif what == "nonce":
        document["cipher"]["nonce"] = "QUJD"
    else:
        document["ciphertext"] = base64.b64encode(_locked_up(document, what)).decode()
    text = base64.b64encode(json.dumps(document).encode()).decode()
    file.write_text("\n".join([lines[0], text, lines[-1]]))
    file.chmod(0o600)
    (tmp_path / "file").write_bytes(b"x")
    password = tmp_path / "password"
    password.write_text("")
    password.chmod(0o600)
    done = narseal_command("sign", tmp_path / "file", "--key", file, "--password-file", password)
    assert done.returncode == 2, done.stderr
    assert "cosign.key" in done.stderr
    assert "Traceback" not in done.stderr


def _locked_up(document: dict[str, Any], what: str) -> bytes:
    """What is no ECDSA P-256 key, encrypted as the document says."""
    import hashlib

    from nacl.secret import SecretBox

    kdf = document["kdf"]
    params = kdf["params"]
    secret = hashlib.scrypt(
        b"", salt=base64.b64decode(kdf["salt"]), n=params["N"], r=params["r"], p=params["p"],
        dklen=32, maxmem=1 << 28,
    )  # fmt: skip
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if what == "locked":
        encryption = serialization.BestAvailableEncryption(b"again")
    der = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, encryption
    )
    if what != "locked":
        known, other = "06082a8648ce3d030107", "06082a8648ce3d03017f"
        der = der.replace(bytes.fromhex(known), bytes.fromhex(other))
    nonce = base64.b64decode(document["cipher"]["nonce"])
    return SecretBox(secret).encrypt(der, nonce).ciphertext
