"""Keyless as the world's issuers do it: each kind of token, the real Fulcio, stock cosign."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import aiohttp
import pytest

from narseal.cosign import tiles, trust
from narseal.cosign.bundle import Bundle
from narseal.cosign.keys import CosignKey
from narseal.cosign.sign import KeySigner
from narseal.cosign.statement import PREDICATE_TYPE
from tests.property.test_tiles import proved
from tests.real.sigstore.conftest import sha256
from tests.real.sigstore.test_outages import attested, entries, rubbish
from tests.real.sigstore.test_serving import bundle_of, fetch
from tests.tools.command import narseal_command
from tests.tools.cosign import Cosign
from tests.tools.narseal import Client, metric, narseal, narseal_process
from tests.tools.sigstore import Sigstore
from tests.tools.sigstore.identities import KINDS, KNOWN, LONG
from tests.tools.upstream import FakeCache

pytestmark = pytest.mark.real

#: One of each type of issuer that Fulcio knows of.
SERVED = ["google", "dex", "github", "gitlab", "kubernetes", "spiffe", "buildkite"]


def name_and_issuer(instance: Sigstore, kind: str) -> tuple[str, str]:
    url = instance.issuer.url_of(kind)
    return KINDS[kind].name(url), KINDS[kind].federated or url


def cosign_words(instance: Sigstore, kind: str) -> list[str | Path]:
    name, issuer = name_and_issuer(instance, kind)
    return [
        "--trusted-root", instance.trusted_root_file,
        "--certificate-identity", name, "--certificate-oidc-issuer", issuer,
    ]  # fmt: skip


def keyless(instance: Sigstore, *more: str | Path, trust: Path | None = None) -> list[str | Path]:
    config = trust or instance.trust_config_file
    return ["--keyless", "--trust-config", config, "--identity-token-env", "TOKEN", *more]


@pytest.mark.parametrize("kind", KNOWN)
def test_files_and_attestations_are_signed_and_cosign_verifies_them(
    kind: str, instance: Sigstore, cosign: Cosign
) -> None:
    file, predicate = cosign.folder / "release.tar", cosign.folder / "predicate.json"
    file.write_bytes(kind.encode())
    predicate.write_text('{"passed": true}')
    bundle = cosign.folder / "attestation.json"
    token = instance.issuer.token_of(kind)
    done = narseal_command("sign", file, *keyless(instance), "--json", TOKEN=token)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["signer"] == "{} of {}".format(*name_and_issuer(instance, kind))
    done = narseal_command(
        "attest", file, *keyless(instance), "--predicate", predicate, "--type", "vuln",
        "--output", bundle, TOKEN=token,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    who = cosign_words(instance, kind)
    cosign.run("verify-blob", "--bundle", f"{cosign.path(file)}.sigstore.json", *who, file)
    cosign.run("verify-blob-attestation", "--type", "vuln", "--bundle", bundle, *who, file)
    for short, code in (("vuln", 0), ("slsaprovenance1", 1), ("nonsense", 2)):
        words = ["verify", file, "--bundle", bundle, "--type", short, "--offline", *who]
        done = narseal_command(*words)
        assert done.returncode == code, done.stderr
    # and narseal says the same of them
    done = narseal_command("verify", file, "--offline", *who)
    assert done.returncode == 0, done.stderr
    done = narseal_command("verify", file, "--offline", *who[:-1], "https://issuer.example.org")
    assert done.returncode == 1, done.stdout


@pytest.mark.parametrize("kind", SERVED)
async def test_what_is_served_is_signed(
    kind: str, instance: Sigstore, cosign: Cosign, tmp_path: Path, upstream: FakeCache
) -> None:
    items = entries(3)
    upstream.add(*items)
    token = tmp_path / "token"
    token.write_text(instance.issuer.token_of(kind))
    settings = {
        "mode": "keyless", "identity_token_file": str(token), "batch_max_age": "200ms",
        "trust_config": str(instance.trust_config_file),
    }  # fmt: skip
    async with narseal(tmp_path / "n", {"url": upstream.url}, cosign=settings) as client:
        urls = await fetch(client, items)
        nar, file = cosign.folder / "x.nar", cosign.folder / "x.sigstore.json"
        file.write_bytes(await bundle_of(client, urls[0]))
        nar.write_bytes((await client.get(urls[0]))[1])
    who = cosign_words(instance, kind)
    cosign.run("verify-blob-attestation", "--type", PREDICATE_TYPE, "--bundle", file, *who, nar)


@pytest.mark.parametrize(
    ("kind", "pinned", "good"),
    [
        ("github", KINDS["github"].name(""), True),
        ("github", "https://github.com/octo-org/octo-repo/.github/workflows/other.yml@refs/heads/main", False),
        ("github", "repo:octo-org/octo-repo:ref:refs/heads/main", False),
        ("dex", "Builder@example.org", False),
        # whose name only the operator can know
        ("own-ci", None, False),
        ("own-ci", "https://ci.example.org/pipelines/release", True),
        ("own-ci", "https://ci.example.org/pipelines/", False),
    ],
)  # fmt: skip
def test_operator_pins_the_identity(
    kind: str, pinned: str | None, good: bool, instance: Sigstore, tmp_path: Path
) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"x")
    before = instance.entries()
    words = keyless(instance, *(["--identity", pinned] if pinned else []))
    done = narseal_command("sign", file, *words, TOKEN=instance.issuer.token_of(kind))
    assert done.returncode == (0 if good else 1), done.stderr
    if not good:
        assert "the certificate is not used: it is for" in done.stderr
        assert instance.entries() == before
        assert not (tmp_path / "x.sigstore.json").exists()


@contextmanager
def fulcio_with_another_token(instance: Sigstore, token: str) -> Iterator[str]:
    """The real Fulcio behind one who puts a token of his own into each request."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            with urlopen(Request(instance.fulcio.url + self.path, body, headers)) as answer:
                data = answer.read()
            self.send_response(201)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


#: A certificate of the right key, for somebody else: of the same issuer, of another, of another
#: kind, with the same name and another subject.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "another workflow": ("github", "github", {
        "job_workflow_ref": "octo-org/octo-repo/.github/workflows/evil.yml@refs/heads/main"}),
    "another repository's use of the workflow": ("github", "github", {
        "sub": "repo:octo-org/other:ref:refs/heads/main"}),
    "another address": ("google", "google", {"email": "eve@example.org"}),
    "another issuer of the same address": ("google", "keycloak", {}),
    "another connector": ("dex", "dex", {
        "federated_claims": {"connector_id": "https://accounts.google.com"}}),
    "another service account": ("kubernetes", "kubernetes", {
        "kubernetes.io": {"namespace": "ci", "serviceaccount": {"name": "default"}}}),
    "another SPIFFE ID": ("spiffe", "spiffe", {"sub": "spiffe://example.org/ns/ci/sa/eve"}),
    "another pipeline": ("buildkite", "buildkite", {"pipeline_slug": "evil"}),
    "another project": ("gitlab", "gitlab", {
        "ci_config_ref_uri": "gitlab.example.com/evil/project//.gitlab-ci.yml@refs/heads/main"}),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_certificate_for_another_identity_is_refused_before_anything_is_logged(
    case: str, instance: Sigstore, tmp_path: Path
) -> None:
    kind, other, claims = OTHERS[case]
    file = tmp_path / "x"
    file.write_bytes(b"x")
    before = instance.entries()
    with fulcio_with_another_token(instance, instance.issuer.token_of(other, **claims)) as url:
        trust = rubbish("caUrls", url, instance, tmp_path / "trust.json")
        done = narseal_command(
            "sign", file, *keyless(instance, trust=trust), TOKEN=instance.issuer.token_of(kind)
        )
    assert done.returncode == 1, done.stderr
    assert "the certificate is not used" in done.stderr
    assert not (tmp_path / "x.sigstore.json").exists()
    assert instance.entries() == before


async def test_serve_does_not_fill_the_logs_while_the_certificate_is_for_another(
    instance: Sigstore, tmp_path: Path, upstream: FakeCache
) -> None:
    items = entries(2)
    upstream.add(*items)
    token = tmp_path / "token"
    token.write_text(instance.issuer.token_of("own-ci"))
    settings = {
        "mode": "keyless", "identity_token_file": str(token), "batch_max_age": "100ms",
        "retry_max": "1s", "trust_config": str(instance.trust_config_file),
    }  # fmt: skip
    before = instance.entries()
    async with narseal(tmp_path / "n", {"url": upstream.url}, cosign=settings) as client:
        failures = metric("narseal_attest_failures_total")
        await fetch(client, items)
        await client.until(lambda: metric("narseal_attest_failures_total") >= failures + 3)
        assert attested(tmp_path / "n/index.sqlite") == {}
    assert instance.entries() == before


async def test_identity_of_an_issuer_with_a_long_name_is_revoked(
    instance: Sigstore, tmp_path: Path, upstream: FakeCache
) -> None:
    """An issuer of more than 127 bytes, whose DER form has a length of two bytes."""
    items = entries(2)
    upstream.add(*items)
    name, issuer = name_and_issuer(instance, LONG)
    assert len(issuer) > 127
    settings = settings_of("keyless", instance, tmp_path)
    (tmp_path / "secret").write_text(instance.issuer.token_of(LONG))
    folder = tmp_path / "n"
    with narseal_process(folder, {"url": upstream.url}, cosign=settings) as process:
        async with aiohttp.ClientSession() as session:
            client = Client(process.url, session, folder / "storage")
            url, _ = await fetch(client, items)
            await bundle_of(client, url)

            async def revoke(issuer: str) -> str:
                done = await asyncio.to_thread(
                    narseal_command, "revoke", "--identity", name, "--issuer", issuer,
                    "--since", "2020-01-01T00:00:00Z", "--reason", "x",
                    "--config", folder / "narseal.toml",
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                return done.stdout

            for other in (issuer[:-1], issuer + "g", issuer[1:]):
                assert "; 0 bundles dropped" in await revoke(other)
            assert "; 1 bundles dropped" in await revoke(issuer)


def settings_of(mode: str, instance: Sigstore, folder: Path) -> dict[str, Any]:
    """A `[cosign]` section that signs into the log, and tries again soon."""
    file = folder / "secret"
    if mode == "key":
        file.write_text(CosignKey.generate().render(b""))
    else:
        file.write_text(instance.issuer.token_of("github"))
    file.chmod(0o600)
    by = (
        {"key": f"file:{file}", "log": True}
        if mode == "key"
        else {"identity_token_file": str(file)}
    )
    return by | {
        "mode": mode, "batch_max_age": "100ms", "retry_max": "500ms",
        "trust_config": str(instance.trust_config_file),
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["key", "keyless"])
async def test_lost_answers_of_the_log_make_no_second_entry(
    mode: str, instance: Sigstore, tmp_path: Path, upstream: FakeCache
) -> None:
    items = entries(2)
    upstream.add(*items)
    settings = settings_of(mode, instance, tmp_path)
    before = instance.entries()
    failures = metric("narseal_attest_failures_total")
    instance.log.lost = 3
    async with narseal(tmp_path / "n", {"url": upstream.url}, cosign=settings) as client:
        url, _ = await fetch(client, items)
        bundle = Bundle.parse(await bundle_of(client, url))
    assert metric("narseal_attest_failures_total") >= failures + 3
    assert instance.log.lost == 0
    assert instance.entries() == before + 1
    (entry,) = bundle.model.verification_material.tlog_entries
    assert entry.log_index == before


@pytest.mark.parametrize("mode", ["key", "keyless"])
async def test_bundle_that_cannot_be_stored_makes_no_second_entry(
    mode: str, instance: Sigstore, tmp_path: Path, upstream: FakeCache
) -> None:
    items = entries(2)
    upstream.add(*items)
    before = instance.entries()
    failures = metric("narseal_attest_failures_total")
    settings = settings_of(mode, instance, tmp_path) | {"per_file": "yes"}
    folder = tmp_path / "n/storage/attestations"
    async with narseal(tmp_path / "n", {"url": upstream.url}, cosign=settings) as client:
        if folder.exists():
            folder.rmdir()
        folder.write_bytes(b"in the way")
        url, _ = await fetch(client, items)
        await client.until(lambda: metric("narseal_attest_failures_total") >= failures + 3)
        assert instance.entries() == before + 3  # the batch and two files
        folder.unlink()
        folder.mkdir()
        await bundle_of(client, url)
    assert instance.entries() == before + 3


def test_any_entry_is_proved_by_the_tiles_of_a_real_log(instance: Sigstore) -> None:
    def read(name: str) -> bytes:
        with urlopen(f"{instance.log.url}/api/v2/{name}") as answer:
            data: bytes = answer.read()
            return data

    key = CosignKey.generate()
    signer = KeySigner(key, trust.load(instance.trust_config_file), timeout=20)
    for n in range(3):
        signer.sign_digest(sha256(b"%d" % n))
    size = instance.entries()
    root = base64.b64decode(read("checkpoint").decode().splitlines()[2])
    if instance.entries() == size:  # nobody else writes into it
        for index in range(size):
            leaf = tiles.entry(read, index, size)
            assert proved(leaf, index, size, tiles.inclusion_proof(read, index, size)) == root
