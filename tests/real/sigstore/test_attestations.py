"""Provenance by keyless identities: made by narseal and by cosign, left at narseal, asked for by policy."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from narseal.client.dump import nar_hash
from narseal.cosign.bundle import Bundle
from narseal.nix.hashes import Hash
from tests.faults.test_policy import Pipeline, digest_of, kept_back
from tests.faults.test_uploads import add
from tests.real.sigstore.conftest import IDENTITY, PASSWORD, Signed
from tests.tools.cache import entry
from tests.tools.changing import everywhere
from tests.tools.command import narseal_command
from tests.tools.cosign import Cosign
from tests.tools.narseal import Client, Process, narseal_process, render_toml, settings
from tests.tools.nix import nix
from tests.tools.sigstore import Sigstore

pytestmark = pytest.mark.real

SLSA = "https://slsa.dev/provenance/v1"
OTHER_IDENTITY = "mallory@example.org"
PROVENANCE = {"buildDefinition": {"buildType": "x"}, "runDetails": {"builder": {"id": "y"}}}
ITEMS = [entry(f"my-app-{n}", b"%d" % n, compression="zstd") for n in range(8)]


@pytest.fixture
def predicate(tmp_path: Path) -> Path:
    file = tmp_path / "provenance.json"
    file.write_text(json.dumps(PROVENANCE))
    return file


def rule(instance: Sigstore, identity: str = IDENTITY) -> dict[str, Any]:
    return {
        "match": "*-app-*", "require": "attestation", "identity": identity,
        "issuer": instance.issuer.url, "predicate_types": ["slsaprovenance1"],
        "trust_config": str(instance.trust_config_file),
    }  # fmt: skip


def configuration(folder: Path, policy: list[dict[str, Any]]) -> dict[str, Any]:
    upload = {"enabled": True, "tokens_file": str(folder / "tokens")}
    return {"workers": 2, "upload": upload, "policy": policy}


@asynccontextmanager
async def guarded(
    folder: Path, policy: list[dict[str, Any]]
) -> AsyncIterator[tuple[Process, Pipeline]]:
    folder.mkdir(exist_ok=True)
    token = add(folder)
    token_file = folder / "token"
    token_file.write_text(token)
    token_file.chmod(0o600)
    with narseal_process(folder, **configuration(folder, policy)) as process:
        async with aiohttp.ClientSession() as session:
            yield process, Pipeline(Client(process.url, session, folder / "storage"), token)


def attest(
    instance: Sigstore, *words: str | Path, who: str = IDENTITY
) -> subprocess.CompletedProcess[str]:
    return narseal_command(
        "attest", "--keyless", "--trust-config", instance.trust_config_file,
        "--identity-token-env", "TOKEN", *words, TOKEN=instance.issuer.token(who),
    )  # fmt: skip


async def test_path_is_served_within_a_second_of_its_provenance_and_not_after_the_rule_changed(
    instance: Sigstore, predicate: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "n"
    async with guarded(folder, [rule(instance)]) as (process, pipeline):
        item = ITEMS[0]
        await pipeline.path(item)
        await kept_back(pipeline.client, item)
        words: list[str | Path] = [
            f"/nix/store/{item.info.store_path}", "--digest", f"sha256:{item.info.nar_hash.nix32}",
            "--predicate", predicate, "--type", "slsaprovenance1",
            "--to", process.url, "--token-file", folder / "token",
        ]  # fmt: skip
        done = await asyncio.to_thread(attest, instance, *words, who=OTHER_IDENTITY)
        assert done.returncode == 1
        assert (
            f"422: nobody who may attest signed it: the bundle does not verify: it is signed by {OTHER_IDENTITY}"
            in done.stderr
        )
        await kept_back(pipeline.client, item)
        done = await asyncio.to_thread(attest, instance, *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"left {SLSA} of /nix/store/{item.info.store_path}")
        await everywhere(process, item, 200)
        shown = await asyncio.to_thread(
            narseal_command, "status", str(item.info.store_path), "--from", process.url
        )
        assert f"attested ({SLSA}) by {IDENTITY} of {instance.issuer.url}" in shown.stdout
        assert f"{IDENTITY} of {instance.issuer.url}" in shown.stdout.splitlines()[-1]
        # the rule changes: another identity has to attest now
        for who, status in ((OTHER_IDENTITY, 403), (IDENTITY, 200)):
            new = folder / "new.toml"
            changed = configuration(folder, [rule(instance, who)])
            new.write_text(render_toml(settings(folder, **changed)))
            new.replace(folder / "narseal.toml")
            await everywhere(process, item, status)


async def test_cosign_makes_and_verifies_what_is_left(
    instance: Sigstore, cosign: Cosign, predicate: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "n"
    async with guarded(folder, [rule(instance)]) as (_, pipeline):
        item = ITEMS[1]
        await pipeline.path(item)
        nar = cosign.folder / "x.nar.zst"
        nar.write_bytes(item.file)
        said, bundle = cosign.folder / "predicate.json", cosign.folder / "bundle.json"
        said.write_bytes(predicate.read_bytes())
        cosign.run(
            "attest-blob", "--predicate", said, "--type", "slsaprovenance1",
            "--bundle", bundle, "--identity-token", instance.issuer.token(IDENTITY),
            "--signing-config", instance.signing_config_file,
            "--trusted-root", instance.trusted_root_file, nar,
        )  # fmt: skip
        digest = Hash.sha256(item.file).digest.hex()
        assert await pipeline.attest(f"sha256:{digest}", bundle.read_bytes()) == (201, "")
        await pipeline.client.narinfo(item.hash)
        # and stock cosign verifies what narseal hands out
        status, body, _ = await pipeline.client.get(f"attestations/{item.info.store_path}")
        assert status == 200
        bundle.write_bytes(body)
        cosign.run(
            "verify-blob-attestation", "--bundle", bundle, "--type", "slsaprovenance1",
            "--trusted-root", instance.trusted_root_file, "--certificate-identity", IDENTITY,
            "--certificate-oidc-issuer", instance.issuer.url, nar,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["slsaprovenance1", "spdxjson", "cyclonedx", "openvex", "vuln",
                                  "https://example.org/any/v1"])  # fmt: skip
async def test_every_predicate_type_by_key(
    kind: str, signed: Signed, predicate: Path, tmp_path: Path
) -> None:
    folder, password = tmp_path / "n", tmp_path / "password"
    password.write_text(PASSWORD)
    password.chmod(0o600)
    asked = {"match": "*", "require": "attestation", "cosign_key": str(signed.public),
             "predicate_types": [kind]}  # fmt: skip
    async with guarded(folder, [asked]) as (process, pipeline):
        item = ITEMS[2]
        await pipeline.path(item)
        await kept_back(pipeline.client, item)
        file = tmp_path / "x.nar.zst"
        file.write_bytes(item.file)
        done = await asyncio.to_thread(
            narseal_command, "attest", file, "--key", signed.key, "--password-file", password,
            "--predicate", predicate, "--type", kind, "--to", process.url,
            "--token-file", folder / "token", "--output", tmp_path / "b.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        await pipeline.client.narinfo(item.hash)
        lines = (await pipeline.client.get(f"attestations/{item.info.store_path}"))[1]
        brought = Bundle.parse((tmp_path / "b.json").read_bytes())
        assert lines.rstrip() == brought.render()
        assert digest_of(item) not in done.stdout


def test_the_digest_of_a_store_path_is_nix_own() -> None:
    """`narseal attest` reads the path as `nix-store --dump` does."""
    with nix() as machine:
        folder = machine.folder / "tree"
        (folder / "sub").mkdir(parents=True)
        (folder / "sub/empty").write_bytes(b"")
        (folder / "big").write_bytes(b"x" * 3_000_001)
        (folder / "run").write_bytes(b"#!/bin/sh\n")
        (folder / "run").chmod(0o755)
        (folder / "link").symlink_to("sub/nowhere")
        (folder / "éa").write_bytes(b"name")
        for name in ("tree", "tree/big", "tree/link"):
            dumped = machine.script(f"nix-store --dump {name} | sha256sum").split()[0]
            assert nar_hash(machine.folder / name) == Hash.parse(f"sha256:{dumped}")


def test_what_attest_says_when_it_cannot(predicate: Path, signed: Signed, tmp_path: Path) -> None:
    key: list[str | Path] = ["--key", signed.key, "--output", tmp_path / "out"]
    kind: list[str | Path] = ["--predicate", predicate, "--type", "vuln"]
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "rubbish.json").write_text("{")
    for words, code, sentence in [
        ([predicate, *kind], 2, "say where it goes"),
        ([predicate, *kind, "--output", tmp_path / "o"], 2, "one of --key, --keyless"),
        ([predicate, *key, "--predicate", predicate, "--type", "nonsense"], 2, "neither a URI"),
        ([predicate, *key, "--predicate", tmp_path / "list.json", "--type", "vuln"], 2, "object"),
        ([predicate, *key, "--predicate", tmp_path / "rubbish.json", "--type", "vuln"], 2,
         "is not JSON"),
        ([predicate, *key, *kind, "--digest", "md5:x"], 2, "--digest"),
        ([tmp_path, *key, *kind], 2, "is a folder"),
        (["/nix/store/nonsense", *key, *kind], 2, "nonsense"),
        ([f"/nix/store/{'0' * 32}-x", *key, *kind], 2, "No such file"),
        ([tmp_path / "absent", *key, *kind], 2, "No such file"),
    ]:  # fmt: skip
        done = narseal_command("attest", *words)
        assert (done.returncode, sentence in done.stderr) == (code, True), (words, done.stderr)
        assert "Traceback" not in done.stderr
