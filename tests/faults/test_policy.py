"""Policy over HTTP: what is kept back, what lets it through, who may leave attestations."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from narseal.config import Config
from narseal.cosign.keys import CosignKey
from narseal.cosign.sign import KeySigner
from narseal.cosign.statement import Subject, render_statement
from narseal.errors import ConfigError
from narseal.nix.realisation import Realisation
from narseal.pipeline.trust.policy import known_keys
from tests.faults.test_schedules import revoke
from tests.faults.test_uploads import Uploader, add
from tests.tools.cache import Entry, entry, key
from tests.tools.changing import everywhere
from tests.tools.command import narseal_command
from tests.tools.narseal import (
    OPERATOR,
    UPSTREAM,
    Client,
    metric,
    narseal,
    narseal_process,
    render_toml,
    settings,
)
from tests.tools.upstream import FakeCache
from tests.tools.waiting import eventually

SLSA = "https://slsa.dev/provenance/v1"
SBOM = "https://spdx.dev/Document"
BUILDER = key("builder-1")
CI, STRANGER = CosignKey.generate(), CosignKey.generate()
APP = entry("my-app-1", b"app", compression="zstd")
OTHER = entry("other-1", b"other", compression="zstd")


def attested(
    item: Entry, kind: str = SLSA, *, by: CosignKey = CI, name: str | None = None,
    digest: bytes | None = None, more: int = 0, note: str = "",
) -> bytes:  # fmt: skip
    """A bundle about a path's NAR."""
    subject = Subject(
        f"/nix/store/{item.info.store_path}" if name is None else name,
        item.info.nar_hash.digest if digest is None else digest,
    )
    others = [Subject("", bytes([n]) * 32) for n in range(more)]
    statement = render_statement([*others, subject], kind, {"note": note})
    return KeySigner(by, None, timeout=1).sign_statement(statement)


def by_ci(*kinds: str) -> dict[str, Any]:
    rule = {"require": "attestation", "cosign_key": CI.public.render()}
    return rule | {"predicate_types": list(kinds)} if kinds else rule


RULE = {"match": "*-app-*", **by_ci("slsaprovenance1")}


class Pipeline(Uploader):
    async def attest(self, name: str, bundle: bytes, **headers: str) -> tuple[int, str]:
        return await self.put(f"attestations/{name}", bundle, **headers)


@asynccontextmanager
async def guarded(
    folder: Path, *upstreams: Any, policy: list[dict[str, Any]] | None = None, **more: Any
) -> AsyncIterator[Pipeline]:
    folder.mkdir(parents=True, exist_ok=True)
    token = add(folder)
    upload = {"enabled": True, "tokens_file": str(folder / "tokens")}
    rules = [RULE] if policy is None else policy
    async with narseal(folder, *upstreams, upload=upload, policy=rules, **more) as client:
        yield Pipeline(client, token)


def digest_of(item: Entry) -> str:
    return f"sha256:{item.info.nar_hash.digest.hex()}"


async def kept_back(client: Client, item: Entry) -> str:
    """The one line of a 403 that must come, and nothing of it in the folder."""
    status, body, headers = await client.get(f"{item.hash}.narinfo")
    assert (status, headers["X-Narseal-Reason"]) == (403, "policy"), body
    assert headers["Cache-Control"] == "no-store"
    assert body.count(b"\n") == 1
    assert f"{item.hash}.narinfo" not in client.published()
    return body.decode()


async def test_upload_is_kept_back_until_it_is_attested(tmp_path: Path) -> None:
    rejected = metric("narseal_rejected_total", reason="policy")
    async with guarded(tmp_path) as pipeline:
        client = pipeline.client
        assert await pipeline.path(APP) == (201, "")
        sentence = await kept_back(client, APP)
        assert f"policy[0] (*-app-*): it has no attestation ({SLSA}) by a cosign key" in sentence
        assert (await client.get(APP.info.url))[0] == 403
        assert (await client.head(APP.info.url))[0] == 403
        listing = json.dumps({"version": 1, "root": {}}).encode()
        assert (await pipeline.put(f"{APP.hash}.ls", listing))[0] == 201
        assert (await client.get(f"{APP.hash}.ls"))[0] == 403
        assert (await client.get(f"{APP.info.url}.sigstore.json"))[0] == 403
        # what refers to it can come nevertheless, and may be served
        above = entry("top-1", b"top", references=(APP.info.store_path,))
        assert (await pipeline.path(above))[0] == 201
        await client.narinfo(above.hash)
        assert metric("narseal_rejected_total", reason="policy") > rejected
        # bringing it again changes nothing
        assert (await pipeline.path(APP))[0] == 200
        await kept_back(client, APP)
        assert (await pipeline.attest(digest_of(APP), attested(APP)))[0] == 201
        info = await client.narinfo(APP.hash)
        assert (await client.get(info.url))[1] == APP.file
        assert (await client.get(f"{APP.hash}.ls"))[0] == 200
        assert f"{APP.hash}.narinfo" in client.published()
        assert (await pipeline.attest(digest_of(APP), attested(APP)))[0] in (200, 201)
        # others are not concerned
        assert (await pipeline.path(OTHER))[0] == 201
        await client.narinfo(OTHER.hash)


async def test_what_an_attestation_lets_through_is_published_unasked(tmp_path: Path) -> None:
    async with guarded(tmp_path) as pipeline:
        client = pipeline.client
        assert await pipeline.path(APP) == (201, "")
        spaced = json.dumps(json.loads(attested(APP)), indent=2).encode() + b"\n"
        assert (await pipeline.attest(digest_of(APP), spaced))[0] == 201
        await client.until(lambda: f"{APP.hash}.narinfo" in client.published())
        body = (await client.get(f"attestations/{digest_of(APP)}"))[1]
        assert body.count(b"\n") == 1  # a bundle a line, however it was written
        assert json.loads(body)["dsseEnvelope"] == json.loads(spaced)["dsseEnvelope"]


async def test_a_kept_back_upload_loses_a_revoked_keys_signature(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Nothing of ours is made for it, and what is revoked must come off nevertheless."""
    there = {"url": upstream.url}
    async with guarded(tmp_path, there) as pipeline:
        await revoke(tmp_path, UPSTREAM.name, there)()
        assert await pipeline.path(APP.signed(UPSTREAM, BUILDER)) == (201, "")
        await kept_back(pipeline.client, APP)


async def test_nothing_of_a_kept_back_path_carries_our_signature(tmp_path: Path) -> None:
    key_file = tmp_path / "cosign.key"
    key_file.write_text(CosignKey.generate().render(b""))
    key_file.chmod(0o600)
    cosign = {"mode": "key", "key": f"file:{key_file}", "batch_max_age": "100ms"}
    async with guarded(tmp_path / "n", cosign=cosign) as pipeline:
        client = pipeline.client
        await pipeline.path(APP)
        await pipeline.path(OTHER)
        await client.until(lambda: any("attestations/" in name for name in client.published()))
        await asyncio.sleep(1.5)
        text = b"".join((client.storage / name).read_bytes() for name in client.published())
        assert OTHER.hash.encode() in text
        bundles = (await client.get(f"attestations/{digest_of(APP)}"))[0]
        assert bundles == 403
        assert metric("narseal_attest_queue") == 0
        status = json.loads((await client.get(f"status/{APP.info.store_path}"))[1])
        assert status["policy"]["allowed"] is False
        # attested: signed in both ways
        await pipeline.attest(digest_of(APP), attested(APP))
        await client.narinfo(APP.hash)

        async def signed() -> bool:
            return (await client.get(f"{APP.info.url}.sigstore.json"))[0] == 200

        await eventually(signed)
        lines = (await client.get(f"attestations/{APP.info.store_path}"))[1].splitlines()
        assert len(lines) == 2


async def test_attestation_lets_through_what_an_upstream_has(
    tmp_path: Path, upstream: FakeCache
) -> None:
    app = APP.signed(UPSTREAM)
    upstream.add(app)
    async with guarded(tmp_path, {"url": upstream.url}) as pipeline:
        client = pipeline.client
        await kept_back(client, app)
        assert not [name for name in upstream.asked if name.startswith("nar/")]
        status = json.loads((await client.get(f"status/{app.info.store_path}"))[1])
        assert status["policy"]["allowed"] is False
        # by the name of the path this time
        assert (await pipeline.attest(str(app.info.store_path), attested(app)))[0] == 201
        info = await client.narinfo(app.hash)
        assert (await client.get(info.url))[1] == app.file
        status = json.loads((await client.get(f"status/{app.info.store_path}"))[1])
        assert status["policy"] == {
            "allowed": True, "rule": "policy[0] (*-app-*)",
            "why": f"attested ({SLSA}) by a cosign key",
        }  # fmt: skip
        [one] = status["attestations"]
        assert (one["predicateType"], one["signer"]) == (SLSA, "a cosign key")
        body = (await client.get(f"attestations/{one['subject']}"))[1]
        assert json.loads(body)["dsseEnvelope"]


async def test_denied_content_is_not_even_fetched(tmp_path: Path, upstream: FakeCache) -> None:
    app = APP.signed(UPSTREAM)
    upstream.add(app)
    rules = [{"match": "my-app-*", "action": "deny"}]
    there = {"url": upstream.url, "sign_when": "content"}
    rejected = metric("narseal_rejected_total", reason="policy")
    async with guarded(tmp_path, there, policy=rules) as pipeline:
        await kept_back(pipeline.client, app)
        assert metric("narseal_rejected_total", reason="policy") == rejected + 1
        assert not [name for name in upstream.asked if name.startswith("nar/")]


@pytest.mark.parametrize(
    ("rules", "default", "served"),
    [
        ([], "allow", True),
        ([], "deny", False),
        ([{"match": "my-*", "action": "allow"}], "deny", True),
        ([{"match": "my-*", "action": "deny"}], "allow", False),
        ([{"match": ["x", "*-app-?"], "action": "deny"}], "allow", False),
        ([{"match": "MY-*", "action": "deny"}], "allow", True),
        # the first that matches decides
        ([{"match": "my-a*", "action": "allow"}, {"match": "my-*", "action": "deny"}], "deny", True),
        ([{"match": "y*", "action": "deny"}, {"match": "*", "action": "allow"}], "deny", True),
        ([{"match": "*", "require": "signature", "keys": ["upstream-1"]}], "deny", True),
        ([{"match": "*", "require": "signature", "keys": [str(UPSTREAM.public)]}], "deny", True),
        ([{"match": "*", "require": "signature", "keys": [str(BUILDER.public)]}], "allow", False),
        ([{"match": "*", "require": "signature",
           "keys": [str(BUILDER.public), "upstream-1"]}], "allow", True),
        ([{"match": "*", "require": "any", "of": [
            {"require": "signature", "keys": [str(BUILDER.public)]},
            {"require": "signature", "keys": ["upstream-1"]}]}], "allow", True),
        ([{"match": "*", "require": "all", "of": [
            {"require": "signature", "keys": [str(BUILDER.public)]},
            {"require": "signature", "keys": ["upstream-1"]}]}], "allow", False),
        ([{"match": "*", "require": "all", "of": [
            {"require": "signature", "keys": ["upstream-1"]}, by_ci()]}], "allow", False),
        ([{"match": "*", "require": "any", "of": [by_ci(), {"require": "all", "of": [
            {"require": "signature", "keys": ["upstream-1"]}]}]}], "allow", True),
    ],
)  # fmt: skip
async def test_rules(
    rules: list[dict[str, Any]], default: str, served: bool, tmp_path: Path, upstream: FakeCache
) -> None:
    app = APP.signed(UPSTREAM)
    upstream.add(app)
    there = {"url": upstream.url}
    async with guarded(tmp_path, there, policy=rules, policy_default=default) as pipeline:
        if served:
            await pipeline.client.narinfo(app.hash)
        else:
            await kept_back(pipeline.client, app)


async def test_the_upstream_whose_narinfo_passes_is_taken(
    tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    upstream.add(APP.signed(UPSTREAM))
    second.add(APP.signed(BUILDER))
    rules = [{"match": "*", "require": "signature", "keys": ["builder-1"]}]
    there = (
        {"url": upstream.url, "priority": 1},
        {"url": second.url, "public_keys": [str(BUILDER.public)]},
    )
    async with guarded(tmp_path, *there, policy=rules) as pipeline:
        info = await pipeline.client.narinfo(APP.hash)
        assert {s.key_name for s in info.signatures} == {"builder-1", "operator-1"}


async def test_signature_that_comes_later_lets_a_path_through(tmp_path: Path) -> None:
    rules = [{"match": "*", "require": "signature", "keys": [str(BUILDER.public)]}]
    async with guarded(tmp_path, policy=rules) as pipeline:
        await pipeline.path(APP)
        await kept_back(pipeline.client, APP)
        forged = APP.info.with_signatures(tuple(BUILDER.sign(b"something else") for _ in range(1)))
        assert (await pipeline.put(f"{APP.hash}.narinfo", forged.render()))[0] == 200
        await kept_back(pipeline.client, APP)
        assert (await pipeline.put(f"{APP.hash}.narinfo", APP.signed(BUILDER).info.render()))[
            0
        ] == 200
        await pipeline.client.narinfo(APP.hash)
        assert f"{APP.hash}.narinfo" in pipeline.client.published()


@pytest.mark.parametrize(
    ("bundle", "sentence"),
    [
        (attested(APP, name=str(OTHER.info.store_path)), f"one is of {OTHER.info.store_path}"),
        (attested(APP, SBOM), "it has no attestation"),
    ],
)
async def test_attestation_that_does_not_let_through(
    bundle: bytes, sentence: str, tmp_path: Path
) -> None:
    accept = {"accept": [{"cosign_key": CI.public.render()}]}
    async with guarded(tmp_path, attestations=accept) as pipeline:
        await pipeline.path(APP)
        assert (await pipeline.attest(digest_of(APP), bundle))[0] == 201
        assert sentence in await kept_back(pipeline.client, APP)
        # a stranger's name for a digest, a file's, is no store path: it counts
        assert (await pipeline.attest(digest_of(APP), attested(APP, name="app.nar")))[0] == 201
        await pipeline.client.narinfo(APP.hash)


async def test_attestation_of_the_file_counts_where_the_file_is_here(tmp_path: Path) -> None:
    assert APP.info.file_hash
    of_file = attested(APP, digest=APP.info.file_hash.digest, name="x.nar.zst")
    async with guarded(tmp_path) as pipeline:
        name = f"sha256:{APP.info.file_hash.nix32}"
        assert (await pipeline.attest(name, of_file))[0] == 201
        await pipeline.path(APP)
        await pipeline.client.narinfo(APP.hash)


async def test_variants_of_one_attestation_are_one(tmp_path: Path) -> None:
    """F13: any token filled the bound with them, and the one that the rule needs was 413."""
    good = attested(APP)
    async with guarded(tmp_path, attestations={"per_digest": 2}) as pipeline:
        await pipeline.path(APP)
        assert (await pipeline.attest(digest_of(APP), good))[0] == 201
        resigned = attested(APP)  # ECDSA: another signature over the same statement
        assert resigned != good
        tree = json.loads(good)
        spaced = json.dumps(tree, indent=3).encode()
        junk = json.dumps(tree | {"junk": 1}).encode()
        for variant, status in ((good, 200), (resigned, 200), (spaced, 200), (junk, 422)):
            assert (await pipeline.attest(digest_of(APP), variant))[0] == status
        served = (await pipeline.client.get(f"attestations/{digest_of(APP)}"))[1]
        assert len(served.splitlines()) == 1
        assert (await pipeline.attest(digest_of(APP), attested(APP, note="another")))[0] == 201
        status, text = await pipeline.attest(digest_of(APP), attested(APP, note="a third"))
        assert (status, "per_digest" in text) == (413, True)


def where(expression: str) -> dict[str, Any]:
    return {"policy": [RULE | {"where": expression}]}


@pytest.mark.parametrize(
    ("expression", "note", "passes"),
    [
        ("predicate.note == 'PASSED'", "PASSED", True),
        ("predicate.note == 'PASSED'", "FAILED", False),
        ("has(predicate.note) && predicate.note.startsWith('PA')", "PASSED", True),
        ("predicate.result == 'PASSED'", "PASSED", False),  # a field that is not there
        ("predicate.note", "PASSED", False),  # no truth value
    ],
)
async def test_a_predicate_is_judged_by_its_content(
    expression: str, note: str, passes: bool, tmp_path: Path
) -> None:
    """F35: "attested" must not mean "attested that it failed"."""
    async with guarded(tmp_path, **where(expression)) as pipeline:
        await pipeline.path(APP)
        assert (await pipeline.attest(digest_of(APP), attested(APP, note=note)))[0] == 201
        status, text, _ = await pipeline.client.get(f"{APP.hash}.narinfo")
        assert status == (200 if passes else 403), text


async def test_a_signature_is_no_attestation_and_the_other_way_round(tmp_path: Path) -> None:
    """F35: a rule for a plain signature was met by any attestation, and cosign's was refused."""
    plain = KeySigner(CI, None, timeout=1).sign_digest(APP.info.nar_hash.digest)
    who = {"match": "*-app-*", "cosign_key": CI.public.render()}
    signed = {"policy": [who | {"require": "cosign-signature"}]}
    both = {"accept": [{"cosign_key": CI.public.render()}]}
    async with guarded(tmp_path / "1", **signed, attestations=both) as pipeline:
        await pipeline.path(APP)
        assert (await pipeline.attest(digest_of(APP), attested(APP)))[0] == 201
        await kept_back(pipeline.client, APP)
        assert (await pipeline.attest(digest_of(APP), plain))[0] == 201
        await pipeline.client.narinfo(APP.hash)
    any_type = {"policy": [who | {"require": "attestation"}]}
    async with guarded(tmp_path / "2", **any_type, attestations=both) as pipeline:
        await pipeline.path(APP)
        assert (await pipeline.attest(digest_of(APP), plain))[0] == 201
        await kept_back(pipeline.client, APP)


NOT_TAKEN = [
    (b"", 422, "not JSON"),
    (b"{}", 422, "not a Sigstore bundle"),
    (b"[" * 5000, 422, "nests deeper than 100"),
    (b'"x"', 422, "not a Sigstore bundle"),
    (attested(APP)[:-20], 422, "not JSON"),
    (attested(APP, by=STRANGER), 422, "nobody who may attest signed it"),
    (attested(OTHER), 422, "that is not among its subjects"),
    (attested(APP, SBOM), 422, f"a cosign key may not attest {SBOM}"),
    (attested(APP).replace(b'"sig":"ME', b'"sig":"MF'), 422, "nobody who may attest signed it"),
    (KeySigner(CI, None, timeout=1).sign_digest(APP.info.nar_hash.digest), 422,
     "may not attest https://sigstore.dev/cosign/sign/v1"),
    (KeySigner(CI, None, timeout=1).sign_digest(b"\0" * 32), 422, "not among its subjects"),
    (b" " * (600 << 10) + attested(APP), 413, "are taken"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "sentence"), NOT_TAKEN)
async def test_rubbish_is_not_taken(
    body: bytes, status: int, sentence: str, tmp_path: Path
) -> None:
    async with guarded(tmp_path, attestations={"size": "512K"}) as pipeline:
        await pipeline.path(APP)
        got, text = await pipeline.attest(digest_of(APP), body)
        assert got == status, text
        assert sentence in text
        assert text.count("\n") == 1
        assert not [name for name in pipeline.client.published() if "attestations" in name]
        await kept_back(pipeline.client, APP)


async def test_who_may_leave_attestations_and_how_many(tmp_path: Path) -> None:
    bounds = {"per_digest": 3}
    async with guarded(tmp_path, attestations=bounds) as pipeline:
        client = pipeline.client
        async with client.session.put(
            f"{client.url}/attestations/{digest_of(APP)}", data=attested(APP)
        ) as response:
            assert response.status == 401
            assert "Basic" in response.headers["WWW-Authenticate"]
        same = attested(APP, note="same")
        answers = [await pipeline.attest(digest_of(APP), same) for _ in range(2)]
        # whitespace makes no other attestation of it
        answers.append(await pipeline.attest(digest_of(APP), same.replace(b'":', b'" : ')))
        assert [status for status, _ in answers] == [201, 200, 200]
        for n in range(2):
            assert (await pipeline.attest(digest_of(APP), attested(APP, note=f"{n}")))[0] == 201
        status, text = await pipeline.attest(digest_of(APP), attested(APP, note="too many"))
        assert (status, "per_digest" in text) == (413, True)
        files = [name for name in client.published() if name.startswith("attestations/")]
        assert len(files) == 3
        # each on its line, found by every subject
        many = attested(OTHER, more=5)
        assert (await pipeline.attest(digest_of(OTHER), many))[0] == 201
        status, body, _ = await client.get(f"attestations/sha256:{'01' * 32}")
        assert (status, body.count(b"\n")) == (200, 1)
        assert (await pipeline.attest("sha256:" + "g" * 64, many))[0] == 404
        assert (await pipeline.attest("..%2f..%2fetc", many))[0] in (404, 405)
        assert (await pipeline.attest(str(OTHER.info.store_path), many))[0] == 404
    async with guarded(tmp_path, policy=[]) as pipeline:
        assert (await pipeline.attest(digest_of(APP), attested(APP)))[0] == 405


async def test_a_large_attestation_waits_for_no_upstream_that_another_ones_path_is_asked_of(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Of large ones there is one at a time in memory."""
    let_go = asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        await let_go.wait()
        return web.Response(status=404)

    absent = entry("absent-app-1", b"absent")
    upstream.fault(f"{absent.hash}.narinfo", hang, times=10)
    there = {"url": upstream.url, "timeout": "300s", "public_keys": [str(UPSTREAM.public)]}
    async with guarded(tmp_path, there) as pipeline:
        large = attested(APP, note="x" * (2 << 20))

        async def attest(name: str) -> int:
            async with pipeline.client.session.put(
                f"{pipeline.client.url}/attestations/{name}",
                data=io.BytesIO(large),
                headers=pipeline.headers,
            ) as response:
                return response.status

        waiting = asyncio.create_task(attest(str(absent.info.store_path)))
        await pipeline.client.until(lambda: upstream.asked[f"{absent.hash}.narinfo"] == 1)
        assert await attest(digest_of(APP)) == 201
        let_go.set()
        assert await waiting == 404


async def test_realisation_of_a_kept_back_path_is_kept_back(tmp_path: Path) -> None:
    real = Realisation.parse(
        json.dumps({
            "id": f"sha256:{'a' * 64}!out", "outPath": str(APP.info.store_path),
            "signatures": [], "dependentRealisations": {},
        }).encode(),
        id=f"sha256:{'a' * 64}!out",
    )  # fmt: skip
    name = f"realisations/sha256:{'a' * 64}!out.doi"
    async with guarded(tmp_path) as pipeline:
        client = pipeline.client
        await pipeline.path(APP)
        assert (await pipeline.put(name, real.render()))[0] == 201
        assert (await client.get(name))[0] == 403
        await pipeline.attest(digest_of(APP), attested(APP))
        status, body, _ = await client.get(name)
        assert status == 200
        assert OPERATOR.public.name.encode() in body


async def test_changed_rules_reach_every_worker_and_the_folder(tmp_path: Path) -> None:
    token = add(tmp_path)
    upload = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    accept = {"accept": [{"cosign_key": CI.public.render()}]}
    rule = RULE | {"cosign_key": CI.public.render()}
    more = {"workers": 2, "upload": upload, "attestations": accept}
    with narseal_process(tmp_path, policy=[rule], **more) as process:
        async with aiohttp.ClientSession() as session:
            client = Client(process.url, session, tmp_path / "storage")
            pipeline = Pipeline(client, token)
            await pipeline.path(APP)
            await kept_back(client, APP)

            assert (await pipeline.attest(digest_of(APP), attested(APP)))[0] == 201
            await everywhere(process, APP, 200)
            assert f"{APP.hash}.narinfo" in client.published()

            def shown(wanted: bool) -> bool:
                return (f"{APP.hash}.narinfo" in client.published()) == wanted

            for policy, status in (([rule | {"predicate_types": [SBOM]}], 403), ([rule], 200)):
                new = tmp_path / "new.toml"
                new.write_text(render_toml(settings(tmp_path, policy=policy, **more)))
                new.replace(tmp_path / "narseal.toml")
                await everywhere(process, APP, status)
                there = status == 200
                await client.until(partial(shown, there))


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"match": "*"}, "either require, or action"),
        ({"match": [], "action": "deny"}, "at least 1"),
        ({"match": "*", "action": "perhaps"}, "'allow' or 'deny'"),
        ({"match": "*", "action": "deny", "require": "signature", "keys": ["a-1"]},
         "either require, or action"),
        ({"match": "*", "require": "signature"}, "needs keys"),
        ({"match": "*", "require": "attestation", "keys": ["x"], "identity": "x", "issuer": "y"},
         "keys does not belong"),
        ({"match": "*", "require": "cosign-signature"}, "who signs"),
        ({"match": "*", "require": "attestation", "where": "predicate.",
          "cosign_key": "x"}, "not CEL"),
        ({"match": "*", "require": "signature", "keys": ["a-1"], "where": "true"},
         "belongs to require"),
        ({"match": "*", "require": "attestation"}, "who signs"),
        ({"match": "*", "require": "attestation", "identity": "x"}, "who signs"),
        ({"match": "*", "require": "attestation", "identity": "x", "identity_regex": "y",
          "issuer": "z"}, "exclude each other"),
        ({"match": "*", "require": "attestation", "identity_regex": "(", "issuer": "z"},
         "no regular expression"),
        ({"match": "*", "require": "attestation", "identity": "x", "issuer": "z",
          "predicate_types": ["slsa"]}, "neither a URI nor one of"),
        ({"match": "*", "require": "any"}, "needs of"),
        ({"match": "*", "require": "any", "of": [{"require": "any"}]}, "needs of"),
        ({"match": "*", "require": "any", "of": [{}]}, "has a require"),
        ({"match": "*", "require": "any", "of": [{"require": "all", "of": [{}]}]},
         "has a require"),
        ({"match": "*", "require": "signature", "keys": ["a:b"]}, "not base-64"),
        ({"match": "*", "require": "signature", "keys": ["a-1"], "issuer": "x"},
         "belongs to require"),
        ({"match": "*", "require": "signature", "keys": ["nobody-1"]}, "no key is called nobody-1"),
        ({"match": "*", "require": "signature", "keys": ["operator-1"]}, "operator's own key"),
        ({"match": "*", "require": "attestation", "cosign_key": "/nowhere/cosign.pub"},
         "/nowhere/cosign.pub"),
        ({"match": "*", "require": "attestation", "identity": "x", "issuer": "y",
          "trust_config": "/nowhere/root.json"}, "/nowhere/root.json"),
    ],
)  # fmt: skip
def test_wrong_rules_are_named(rule: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "narseal.toml"
    tree = settings(tmp_path, {"url": "http://127.0.0.1:9"})
    file.write_text(render_toml(tree))
    done = narseal_command("check-config", "--config", file, NARSEAL_POLICY=json.dumps([rule]))
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "policy" in done.stderr or "nowhere" in done.stderr


async def test_policy_test_says_which_rule_and_why(tmp_path: Path, upstream: FakeCache) -> None:
    app, other = APP.signed(UPSTREAM), OTHER.signed(UPSTREAM)
    upstream.add(app, other)
    file = tmp_path / "narseal.toml"
    tree = settings(tmp_path, {"url": upstream.url})
    file.write_text(render_toml(tree))
    async with narseal(tmp_path, {"url": upstream.url}):
        pass  # makes the index
    other_rule = {"match": "o*", "require": "signature", "keys": ["upstream-1"]}
    rules = json.dumps([RULE, other_rule])

    def test(*words: str) -> tuple[int, str]:
        done = narseal_command("policy", "test", "--config", file, *words, NARSEAL_POLICY=rules)
        return done.returncode, done.stdout + done.stderr

    code, text = await asyncio.to_thread(test, f"/nix/store/{app.info.store_path}")
    assert code == 1
    assert text.startswith(f"/nix/store/{app.info.store_path}: kept back: policy[0] (*-app-*): it")
    code, text = await asyncio.to_thread(test, str(other.info.store_path), "--json")
    assert code == 0, text
    assert json.loads(text) == {
        "storePath": f"/nix/store/{other.info.store_path}", "allowed": True,
        "rule": "policy[1] (o*)", "why": "signed by upstream-1",
    }  # fmt: skip
    assert (await asyncio.to_thread(test, "nonsense"))[0] == 2
    absent = f"{'0' * 32}-absent"
    code, text = await asyncio.to_thread(test, absent)
    assert code == 1
    assert text == (f"/nix/store/{absent}: no rule was asked: no upstream has {absent}\n")
    # one says nothing of the others
    code, text = await asyncio.to_thread(test, absent, str(other.info.store_path), "--json")
    lines = [json.loads(line) for line in text.splitlines()]
    assert code == 1
    assert [line.get("allowed") for line in lines] == [None, True]
    assert (lines[0]["reason"], lines[0]["storePath"]) == ("absent", f"/nix/store/{absent}")
    upstream.down = True
    code, text = await asyncio.to_thread(test, str(other.info.store_path))
    assert code == 3
    assert text.startswith(f"/nix/store/{other.info.store_path}: not known: ")
    assert "503" in text and text.count("\n") == 1
    assert not list((tmp_path / "storage").glob("*.narinfo"))


def test_a_rule_that_names_one_of_two_keys_is_refused() -> None:
    other = str(BUILDER.public).replace("builder-1", "upstream-1")
    tree = {
        "upstream": [
            {"url": "http://a", "public_keys": [str(UPSTREAM.public)]},
            {"url": "http://b", "public_keys": [other]},
        ],
        "policy": [{"match": "*", "require": "signature", "keys": ["upstream-1"]}],
    }
    with pytest.raises(ConfigError, match="two keys are called upstream-1"):
        known_keys(Config.model_validate(tree), [])
