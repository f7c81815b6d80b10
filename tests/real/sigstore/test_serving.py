"""narseal signs what it serves, in every mode; stock cosign verifies what was downloaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from narseal.cosign import trust
from narseal.cosign.bundle import Bundle, Envelope
from narseal.cosign.sign import KeylessSigner
from narseal.cosign.statement import PREDICATE_TYPE, Statement
from narseal.errors import ConfigError, UpstreamTrouble
from narseal.pipeline.trust.sigstore import token_source
from tests.real.sigstore.conftest import IDENTITY, Signed, sha256
from tests.tools.cache import Entry, entry
from tests.tools.command import narseal_command
from tests.tools.cosign import Cosign
from tests.tools.narseal import OPERATOR, UPSTREAM, Client, metric, narseal
from tests.tools.sigstore import Sigstore
from tests.tools.sigstore.issuer import CLIENT, SECRET
from tests.tools.upstream import FakeCache
from tests.tools.waiting import eventually

pytestmark = pytest.mark.real

ITEMS = [entry(f"p{n}", b"%d" % n, compression="zstd").signed(UPSTREAM) for n in range(6)]
NEVER = {"batch_max_age": "1h"}
SOON = {"batch_max_age": "200ms", "retry_max": "1s"}


@pytest.fixture
def modes(signed: Signed, instance: Sigstore, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The `[cosign]` section of every mode."""
    password, token = tmp_path / "password", tmp_path / "token"
    for file, text in ((password, "correct horse\n"), (token, instance.issuer.token(IDENTITY))):
        file.write_text(text)
        file.chmod(0o600)
    by_key = {"mode": "key", "key": f"file:{signed.key}", "password_file": str(password)}
    there = {"trust_config": str(instance.trust_config_file)}
    return {
        "key": by_key | SOON,
        "log": by_key | {"log": True} | there | SOON,
        "keyless": {"mode": "keyless", "identity_token_file": str(token)} | there | SOON,
    }


async def fetch(client: Client, items: list[Entry]) -> list[str]:
    """Download NARs, so that they are verified; returns their URLs."""
    urls = [(await client.narinfo(item.hash)).url for item in items]
    for url in urls:
        assert (await client.get(url))[0] == 200
    return urls


async def bundle_of(client: Client, url: str) -> bytes:
    """Ask until it is there."""
    body = b""

    async def signed() -> bool:
        nonlocal body
        status, body, headers = await client.get(f"{url}.sigstore.json")
        if status != 200:
            assert (status, headers["Retry-After"]) == (404, "1")
            assert headers["Cache-Control"] == "no-store"
        return status == 200

    await eventually(signed, "it is never signed")
    return body


def who(mode: str, signed: Signed, instance: Sigstore, *, cosign: bool) -> list[str | Path]:
    """The options that name the signer, for either program."""
    if mode == "key":
        return ["--key", signed.public, *(["--insecure-ignore-tlog"] if cosign else [])]
    root: list[str | Path] = ["--trusted-root", instance.trusted_root_file]
    if mode == "log":
        return [*root, "--key", signed.public]
    return [
        *root, "--certificate-identity", IDENTITY, "--certificate-oidc-issuer", instance.issuer.url
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["key", "log", "keyless"])
async def test_what_is_served_verifies_with_cosign(
    mode: str,
    modes: dict[str, dict[str, Any]],
    signed: Signed,
    instance: Sigstore,
    cosign: Cosign,
    tmp_path: Path,
    upstream: FakeCache,
) -> None:
    upstream.add(*ITEMS)
    async with narseal(tmp_path / "n", {"url": upstream.url}, cosign=modes[mode]) as client:
        info = await client.narinfo(ITEMS[0].hash)
        assert await client.refusal(f"{info.url}.sigstore.json") == "waiting"
        urls = await fetch(client, ITEMS)
        bundle = await bundle_of(client, urls[0])
        nar, file = cosign.folder / "x.nar.zst", cosign.folder / "x.sigstore.json"
        nar.write_bytes((await client.get(urls[0]))[1])
        file.write_bytes(bundle)
        single = mode == "key"
        command = "verify-blob" if single else "verify-blob-attestation"
        kind = [] if single else ["--type", PREDICATE_TYPE]
        words = [command, "--bundle", file, *kind, *who(mode, signed, instance, cosign=True)]
        cosign.run(*words, nar)
        # the batch, by each spelling of each digest
        batches = set()
        for url, item in zip(urls, ITEMS, strict=True):
            data = sha256((await client.get(url))[1])
            for name in (data.hex(), item.info.nar_hash.digest.hex(), item.info.nar_hash.nix32):
                status, body, _ = await client.get(f"attestations/sha256:{name}")
                assert status == 200
                batches.add(body)
        assert len(batches) == 1
        line = batches.pop()
        content = Bundle.parse(line).content
        assert isinstance(content, Envelope)
        assert Statement.parse(content.payload).predicate_type == PREDICATE_TYPE
        file.write_bytes(line)
        words = ["verify-blob-attestation", "--bundle", file, "--type", PREDICATE_TYPE]
        cosign.run(*words, *who(mode, signed, instance, cosign=True), nar)
        names = {"key": (200, 200, 404), "log": (200, 404, 404), "keyless": (404, 404, 404)}[mode]
        for name, status in zip(
            ("cosign.pub", f"{urls[0]}.sig", f"{urls[0]}.pem"), names, strict=True
        ):
            assert (await client.get(name))[0] == status, name
        status, body, _ = await client.get("trusted_root.json")
        assert (status == 200) == (mode != "key")
        keys = json.loads((await client.get("keys"))[1])
        assert keys["substituter"] == [str(OPERATOR.public)]
        assert keys["cosign"]["mode"] == mode.replace("log", "key")
        # and the narinfo says nothing of it: Nix needs nothing of this
        assert not [name for name in client.published() if name.endswith(".sigstore.json")
                    and not name.startswith("attestations/")]  # fmt: skip


async def test_signature_and_certificate_of_each_file_where_the_operator_asks_for_them(
    modes: dict[str, dict[str, Any]],
    instance: Sigstore,
    signed: Signed,
    cosign: Cosign,
    tmp_path: Path,
    upstream: FakeCache,
) -> None:
    upstream.add(ITEMS[0])
    settings = modes["keyless"] | {"per_file": "yes"}
    async with narseal(tmp_path / "n", {"url": upstream.url}, cosign=settings) as client:
        (url,) = await fetch(client, ITEMS[:1])
        bundle = await bundle_of(client, url)
        nar = cosign.folder / "x.nar"
        nar.write_bytes((await client.get(url))[1])
        for suffix, data in (
            (".json", bundle),
            (".sig", (await client.get(f"{url}.sig"))[1]),
            (".pem", (await client.get(f"{url}.pem"))[1]),
        ):
            (cosign.folder / f"x{suffix}").write_bytes(data)
        cosign.run(
            "verify-blob", "--bundle", cosign.folder / "x.json",
            *who("keyless", signed, instance, cosign=True), nar,
        )  # fmt: skip
        cosign.run(
            "verify-blob", "--signature", cosign.folder / "x.sig", "--certificate",
            cosign.folder / "x.pem", "--insecure-ignore-tlog", "--certificate-identity", IDENTITY,
            "--certificate-oidc-issuer", instance.issuer.url, nar,
            files={"SIGSTORE_ROOT_FILE": instance.folder / "ca.pem",
                   "SIGSTORE_CT_LOG_PUBLIC_KEY_FILE": instance.folder / "ct.pub"},
        )  # fmt: skip


async def test_nothing_is_signed_before_its_content_was_verified(
    modes: dict[str, dict[str, Any]], tmp_path: Path, upstream: FakeCache
) -> None:
    good, wrong = ITEMS[0], entry("wrong", b"wrong").signed(UPSTREAM)
    upstream.add(good, wrong)
    upstream.files[wrong.info.url] = good.file
    async with narseal(tmp_path / "n", {"url": upstream.url}, cosign=modes["key"]) as client:
        info = await client.narinfo(wrong.hash)
        await client.narinfo(ITEMS[0].hash)
        status, _, _ = await client.get(info.url)
        assert status != 200
        (url,) = await fetch(client, [good])
        await bundle_of(client, url)
        attested = [n for n in client.published() if n.startswith("attestations/")]
        assert len(attested) == 1
        data = (client.storage / attested[0]).read_bytes()
        payload = json.loads(Bundle.parse(data).content.payload)  # type: ignore[union-attr]
        assert [p["storePath"] for p in payload["predicate"]["paths"]] == [
            f"/nix/store/{good.info.store_path}"
        ]
        assert (await client.get(f"{info.url}.sigstore.json"))[0] == 404


async def test_store_paths_verify_one_by_one_and_all_together(
    modes: dict[str, dict[str, Any]],
    signed: Signed,
    instance: Sigstore,
    tmp_path: Path,
    upstream: FakeCache,
) -> None:
    upstream.add(*ITEMS)
    async with narseal(tmp_path / "n", {"url": upstream.url}, cosign=modes["keyless"]) as client:

        async def verify(*more: str | Path, key: str = str(OPERATOR.public)) -> tuple[int, Any]:
            words = ["verify", "--from", client.url, "--public-key", key, "--json", *more]
            result = await asyncio.to_thread(narseal_command, *words)
            assert result.stdout, result.stderr
            return result.returncode, json.loads(result.stdout)

        await bundle_of(client, (await fetch(client, ITEMS))[0])
        signer = who("keyless", signed, instance, cosign=False)
        path = f"/nix/store/{ITEMS[0].info.store_path}"
        assert (await verify(path, *signer))[0] == 0
        code, all_of_them = await verify("--all", *signer)
        assert (code, all_of_them["verified"], all_of_them["failures"]) == (0, 6, [])
        assert all_of_them["checked"] == ["content", "signature", "attestation"]
        # each thing that can be wrong
        code, tree = await verify(path, *signer, key=str(UPSTREAM.public).replace("up", "x"))
        assert (code, tree["failures"][0]["reason"]) == (1, "unsigned")
        code, tree = await verify(path, *who("log", signed, instance, cosign=False))
        assert (code, tree["failures"][0]["reason"]) == (1, "bad-bundle")
        code, tree = await verify("/nix/store/" + "0" * 32 + "-x", *signer)
        assert (code, tree["failures"][0]["reason"]) == (1, "absent")
    # the folder alone, with no network and no narseal
    folder = tmp_path / "n" / "storage"
    offline = ["verify", "--all", "--from", f"file://{folder}", "--offline", "--json"]
    assert narseal_command(*offline, "--public-key", str(OPERATOR.public)).returncode == 0


async def test_an_attestation_that_contradicts_the_narinfo_is_found(
    modes: dict[str, dict[str, Any]],
    signed: Signed,
    instance: Sigstore,
    tmp_path: Path,
    upstream: FakeCache,
) -> None:
    """A substituter that signs other references than it attested."""
    item = ITEMS[0]
    upstream.add(item)
    async with narseal(tmp_path / "n", {"url": upstream.url}, cosign=modes["key"]) as client:
        (url,) = await fetch(client, [item])
        bundle = await bundle_of(client, url)
        digest = sha256((await client.get(url))[1])
        attestation = (await client.get(f"attestations/sha256:{digest.hex()}"))[1]
        assert bundle != attestation
    lying = item.but(references=(ITEMS[1].info.store_path,)).signed(UPSTREAM)
    upstream.add(lying)
    upstream.files[f"attestations/sha256:{sha256(item.file).hex()}"] = attestation
    result = await asyncio.to_thread(
        narseal_command, "verify", "--from", upstream.url, "--public-key", str(UPSTREAM.public),
        "--key", signed.public, f"/nix/store/{item.info.store_path}",
    )  # fmt: skip
    assert result.returncode == 1
    assert "references is [] in the attestation" in result.stderr


@asynccontextmanager
async def chain(tmp_path: Path, inner_url: str, **settings: Any) -> AsyncIterator[Client]:
    async with narseal(
        tmp_path / "outer", {"url": inner_url, "verify": "bundle", "public_keys": [], **settings}
    ) as client:
        yield client


async def test_upstream_is_held_to_its_bundles(
    modes: dict[str, dict[str, Any]],
    signed: Signed,
    instance: Sigstore,
    tmp_path: Path,
    upstream: FakeCache,
    second: FakeCache,
) -> None:
    """A stranger's key signs the narinfo, so only the bundle speaks for the path."""
    upstream.add(*ITEMS[:2])
    by_identity = {
        "identity": IDENTITY,
        "issuer": instance.issuer.url,
        "trust_config": str(instance.trusted_root_file),
    }
    async with narseal(tmp_path / "inner", {"url": upstream.url}, cosign=modes["keyless"]) as inner:
        url, _ = await fetch(inner, ITEMS[:2])
        bundle = await bundle_of(inner, url)
        async with chain(tmp_path / "a", inner.url, **by_identity) as client:
            await client.narinfo(ITEMS[0].hash)
            assert metric("sigstore_verify_ms_count", kind="bundle") >= 1
            assert metric("sigstore_verify_ms_count", kind="rekor") >= 1
        wrong_people = by_identity | {"identity": "eve@example.org"}
        async with chain(tmp_path / "b", inner.url, **wrong_people) as client:
            assert await client.refusal(f"{ITEMS[0].hash}.narinfo") == "bad-bundle"
            assert client.published() == set()
    second.add(*ITEMS[:2])
    async with chain(tmp_path / "c", second.url, **by_identity) as client:
        assert await client.refusal(f"{ITEMS[0].hash}.narinfo") == "bad-bundle"  # it has none
    # a good bundle of the right bytes, beside a narinfo that names them otherwise
    renamed = entry("evil", b"0", compression="zstd")
    assert renamed.info.nar_hash == ITEMS[0].info.nar_hash
    second.add(renamed)
    second.files[f"{renamed.info.url}.sigstore.json"] = bundle
    async with chain(tmp_path / "d", second.url, **by_identity) as client:
        assert await client.refusal(f"{renamed.hash}.narinfo") == "bad-bundle"
        await client.narinfo(ITEMS[0].hash)


async def test_bundle_over_the_file_alone_does_not_name_the_path(
    modes: dict[str, dict[str, Any]], signed: Signed, tmp_path: Path, upstream: FakeCache
) -> None:
    item = ITEMS[0]
    upstream.add(item)
    file = tmp_path / "x"
    file.write_bytes(item.file)
    made = narseal_command(
        "sign", file, "--key", signed.key, "--password-file", modes["key"]["password_file"]
    )
    assert made.returncode == 0, made.stderr
    upstream.files[f"{item.info.url}.sigstore.json"] = (tmp_path / "x.sigstore.json").read_bytes()
    by_key = {"url": upstream.url, "verify": "bundle", "cosign_key": str(signed.public)}
    async with narseal(tmp_path / "a", by_key | {"public_keys": []}) as client:
        assert await client.refusal(f"{item.hash}.narinfo") == "bad-bundle"
    async with narseal(tmp_path / "b", by_key) as client:  # with the upstream's own signature
        await client.narinfo(item.hash)
    by_key["cosign_key"] = str(signed.other_public)
    async with narseal(tmp_path / "c", by_key) as client:
        assert await client.refusal(f"{item.hash}.narinfo") == "bad-bundle"


def test_a_certificate_is_used_again_while_it_lives(instance: Sigstore) -> None:
    known = trust.load(instance.trust_config_file)
    tokens: list[str] = []

    def token() -> str:
        tokens.append(instance.issuer.token())
        return tokens[-1]

    signer = KeylessSigner(token, known, timeout=20)
    for n in range(3):
        signer.sign_digest(sha256(b"%d" % n))
    assert (signer.certificates, len(tokens)) == (1, 1)
    # as if the certificate were about to end
    assert signer._current is not None
    signer._current = replace(signer._current, until=datetime(2020, 1, 1, tzinfo=UTC))
    signer.sign_digest(sha256(b"x"))
    assert (signer.certificates, len(tokens)) == (2, 2)


def test_identity_tokens_from_every_source(
    instance: Sigstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from narseal.config import CosignConfig

    known = trust.load(instance.trust_config_file)

    def signs(**settings: Any) -> None:
        source, name = token_source(CosignConfig(mode="keyless", **settings))
        signer = KeylessSigner(source, known, timeout=20, source=name)
        bundle = Bundle.parse(signer.sign_digest(sha256(b"x")))
        assert bundle.certificate is not None

    file = tmp_path / "token"
    file.write_text(instance.issuer.token() + "\n")
    signs(identity_token_file=str(file))
    monkeypatch.setenv("MY_TOKEN", instance.issuer.token())
    signs(identity_token_env="MY_TOKEN")
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    before = instance.issuer.granted
    signs(
        oidc_issuer=instance.issuer.url,
        oidc_client_id=CLIENT,
        oidc_client_secret_file=str(secret),
    )
    assert instance.issuer.granted == before + 1
    with pytest.raises(ConfigError, match="no CI system"):
        signs()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "runner")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{instance.issuer.url}/ambient?x=1")
    signs()
    assert instance.issuer.ambient == 1
    monkeypatch.delenv("GITHUB_ACTIONS")
    monkeypatch.setenv("GITLAB_CI", "true")
    monkeypatch.setenv("SIGSTORE_ID_TOKEN", instance.issuer.token())
    signs()
    # and what is no token, was made for others, or has ended
    for text in ("rubbish", instance.issuer.token(aud="others"), instance.issuer.token(exp=1)):
        file.write_text(text)
        with pytest.raises(UpstreamTrouble, match="identity token"):
            signs(identity_token_file=str(file))
