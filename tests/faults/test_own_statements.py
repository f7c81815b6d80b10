"""What narseal said with Sigstore of a path goes where the path goes: not out, once it was withdrawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from narseal.config import Config
from narseal.cosign.bundle import Bundle, Envelope
from narseal.cosign.keys import CosignKey
from narseal.cosign.statement import Statement
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.attest import bundles
from narseal.pipeline.substituter import Substituter
from narseal.pipeline.trust.policy import Policy, Verdict
from narseal.storage import Epoch, Revocation
from tests.faults.test_policy import CI, OTHER, attested, digest_of, guarded
from tests.tools.cache import Entry, entry, key, store_path
from tests.tools.narseal import UPSTREAM, Client, narseal, settings
from tests.tools.upstream import FakeCache
from tests.tools.waiting import eventually

SECOND = key("upstream-2")
GONE = entry("gone-1", b"gone", compression="zstd").signed(UPSTREAM)
KEPT = entry("kept-1", b"kept", compression="zstd").signed(SECOND)


def cosign(folder: Path, **more: Any) -> dict[str, Any]:
    """Signing by a key of our own, each file too, as soon as there is something to sign."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cosign.key"
    if not file.exists():
        file.write_text(CosignKey.generate().render(b""))
        file.chmod(0o600)
    return {"mode": "key", "key": f"file:{file}", "batch_max_age": "100ms"} | more


async def revoke(folder: Path, name: str, *upstreams: Any, **more: Any) -> None:
    """As the command does, beside the narseal that serves."""
    config = Config(**settings(folder, *upstreams, **more))
    epoch = Epoch.of(config.storage.index)
    async with Substituter.opened(config, epoch=epoch, serving=False) as substituter:
        revocation = Revocation("key", name, "", 0.0, "stolen")
        await substituter.revoking.revoke(revocation, lambda *_: None)


async def fetch(client: Client, item: Entry) -> str:
    """Have an upstream's path in storage; the address of its NAR."""
    url = (await client.narinfo(item.hash)).url
    assert (await client.get(url))[1] == item.file
    return url


async def signed(client: Client, url: str) -> bytes:
    """The bundle, when it is there."""
    body = b""

    async def there() -> bool:
        nonlocal body
        status, body, _ = await client.get(f"{url}.sigstore.json")
        return status == 200

    await eventually(there, "it is never signed")
    return body


async def said(client: Client, item: Entry, url: str) -> list[int]:
    """What the answers to everything are that we say of a path."""
    names = [f"{url}.sigstore.json", f"{url}.sig", f"attestations/{digest_of(item)}",
             f"attestations/{item.info.store_path}"]  # fmt: skip
    if item.info.file_hash:
        names.append(f"attestations/sha256:{item.info.file_hash.nix32}")
    return [(await client.get(name))[0] for name in names]


async def listed(client: Client, item: Entry) -> list[str]:
    status, body, _ = await client.get(f"status/{item.info.store_path}")
    assert status == 200, body
    return [attestation["signer"] for attestation in json.loads(body)["attestations"]]


def paths_of(bundle: bytes) -> set[str]:
    content = Bundle.parse(bundle).content
    assert isinstance(content, Envelope)
    paths = Statement.parse(content.payload).predicate["paths"]
    return {path["storePath"].rpartition("/")[2] for path in paths}


def there(upstream: FakeCache) -> dict[str, Any]:
    return {"url": upstream.url, "public_keys": [str(UPSTREAM.public), str(SECOND.public)]}


async def test_nothing_of_ours_is_given_out_of_a_withdrawn_path(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(GONE, KEPT)
    options: dict[str, Any] = {"cosign": cosign(tmp_path, batch_max_age="1s")}
    async with narseal(tmp_path, there(upstream), **options) as client:
        gone, kept = [await fetch(client, item) for item in (GONE, KEPT)]
        await signed(client, gone)
        await signed(client, kept)
        for item, url in ((GONE, gone), (KEPT, kept)):
            assert await said(client, item, url) == [200] * 5
            assert await listed(client, item) == ["narseal"]
        batch = (await client.get(f"attestations/{digest_of(KEPT)}"))[1]
        await revoke(tmp_path, UPSTREAM.name, there(upstream), **options)
        assert await said(client, GONE, gone) == [404] * 5
        assert await listed(client, GONE) == []
        text = (await client.get(f"{gone}.sigstore.json"))[1].decode()
        assert "was withdrawn" in text and "narinfo" in text
        # the batch goes on covering the other
        assert await said(client, KEPT, kept) == [200] * 5
        assert (await client.get(f"attestations/{digest_of(KEPT)}"))[1] == batch
        # admitted anew, on another's word: it is given out again
        upstream.add(GONE.signed(SECOND))
        assert await fetch(client, GONE) == gone
        await signed(client, gone)
        assert await said(client, GONE, gone) == [200] * 5
        assert await listed(client, GONE) == ["narseal"]


async def test_what_others_attested_goes_where_the_nar_goes(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(GONE)
    options: dict[str, Any] = {
        "cosign": cosign(tmp_path),
        "attestations": {"accept": [{"cosign_key": CI.public.render()}]},
    }
    rules: dict[str, Any] = {"policy": [{"match": "gone-*", "action": "deny"}]}
    async with guarded(tmp_path, there(upstream), policy=[], **options) as pipeline:
        client = pipeline.client
        url = await fetch(client, GONE)
        await signed(client, url)
        assert (await pipeline.attest(digest_of(GONE), attested(GONE)))[0] == 201
        await revoke(tmp_path, UPSTREAM.name, there(upstream), **options)
        assert (await client.get(url))[0] == 200
        for name in (digest_of(GONE), str(GONE.info.store_path)):
            lines = (await client.get(f"attestations/{name}"))[1].splitlines()
            assert len(lines) == 1, "theirs, and not ours"
        assert await listed(client, GONE) == ["a cosign key"]
    async with guarded(tmp_path, there(upstream), **options, **rules) as pipeline:
        client = pipeline.client
        assert (await client.get(url))[0] == 403
        for name in (digest_of(GONE), str(GONE.info.store_path)):
            assert (await client.get(f"attestations/{name}"))[0] == 403


async def test_of_content_that_two_paths_share_only_what_covers_the_served_one_is_given_out(
    tmp_path: Path, upstream: FakeCache
) -> None:
    twin = entry("twin-1", b"gone", compression="zstd").signed(SECOND)
    assert twin.file == GONE.file
    upstream.add(GONE)
    options: dict[str, Any] = {"cosign": cosign(tmp_path)}
    async with narseal(tmp_path, there(upstream), **options) as client:
        url = await fetch(client, GONE)
        await signed(client, url)
        upstream.add(twin)
        assert await fetch(client, twin) == url

        async def both() -> bool:
            lines = (await client.get(f"attestations/{digest_of(GONE)}"))[1].splitlines()
            return len(lines) == 2

        await eventually(both)
        await revoke(tmp_path, UPSTREAM.name, there(upstream), **options)
        [line] = (await client.get(f"attestations/{digest_of(GONE)}"))[1].splitlines()
        assert paths_of(line) == {str(twin.info.store_path)}
        assert (await client.get(f"attestations/{GONE.info.store_path}"))[0] == 404
        assert (await client.get(f"{url}.sigstore.json"))[0] == 200
    rules: dict[str, Any] = {"policy": [{"match": "twin-*", "action": "deny"}]}
    async with narseal(tmp_path, there(upstream), **options, **rules) as client:
        # the NAR is a withdrawn path's, which the rules would let through
        assert (await client.get(url))[0] == 200
        assert (await client.get(f"{url}.sigstore.json"))[0] == 404
        assert (await client.get(f"attestations/{digest_of(GONE)}"))[0] == 404


async def test_a_path_that_comes_back_as_another_is_attested_anew(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Its pin rested on a stolen key alone. The NAR is the same; what we said of it is not."""
    upstream.add(GONE)
    options: dict[str, Any] = {"cosign": cosign(tmp_path)}
    async with narseal(tmp_path, there(upstream), **options) as client:
        url = await fetch(client, GONE)
        await signed(client, url)
        old = (await client.get(f"attestations/{digest_of(GONE)}"))[1]
        await revoke(tmp_path, UPSTREAM.name, there(upstream), **options)
        other = GONE.but(references=(store_path("dependency"),)).signed(SECOND)
        assert other.info.nar_hash == GONE.info.nar_hash
        upstream.add(other)
        assert await fetch(client, other) == url

        async def anew() -> bool:
            status, body, _ = await client.get(f"attestations/{digest_of(GONE)}")
            assert old.strip() not in body
            return status == 200

        await eventually(anew)


async def test_a_withdrawn_path_does_not_wait(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(GONE, KEPT)
    options: dict[str, Any] = {"cosign": cosign(tmp_path, batch_max_age="1h")}
    async with narseal(tmp_path, there(upstream), **options) as client:
        gone = await fetch(client, GONE)
        assert await client.refusal(f"{gone}.sigstore.json") == "waiting"
        await revoke(tmp_path, UPSTREAM.name, there(upstream), **options)
        assert await client.refusal(f"{gone}.sigstore.json") == "absent"
        tree = json.loads((await client.get("status"))[1])
        assert tree["cosign"]["waiting"] == 0
    options = {"cosign": cosign(tmp_path)}
    async with narseal(tmp_path, there(upstream), **options) as client:
        kept = await fetch(client, KEPT)
        await signed(client, kept)
        assert GONE.hash.encode() not in (await client.get(f"attestations/{digest_of(KEPT)}"))[1]


async def test_a_rotten_upload_takes_what_was_said_of_it_along(tmp_path: Path) -> None:
    async with guarded(tmp_path, policy=[], cosign=cosign(tmp_path)) as pipeline:
        client = pipeline.client
        assert (await pipeline.path(OTHER))[0] == 201
        await signed(client, OTHER.info.url)
        file = client.storage / OTHER.info.url
        file.write_bytes(b"")
        assert (await client.get(OTHER.info.url))[0] == 404
        assert await said(client, OTHER, OTHER.info.url) == [404] * 5
        # brought again, it is what it was
        assert (await pipeline.path(OTHER))[0] == 201
        await signed(client, OTHER.info.url)
        assert await said(client, OTHER, OTHER.info.url) == [200] * 5


async def test_how_many_paths_one_question_has_judged(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of content that many share."""
    items = [entry(f"same-{n}", b"same", compression="zstd").signed(UPSTREAM) for n in range(9)]
    upstream.add(*items)
    judged: list[str] = []
    verdict = Policy.verdict

    async def counted(self: Policy, info: NarInfo, digests: frozenset[bytes]) -> Verdict:
        judged.append(info.store_path.name)
        return await verdict(self, info, digests)

    monkeypatch.setattr(Policy, "verdict", counted)
    monkeypatch.setattr(bundles, "_MOST_JUDGED", 4)
    options: dict[str, Any] = {"cosign": cosign(tmp_path)}
    options["policy"] = [{"match": "gone-*", "action": "deny"}]
    async with narseal(tmp_path, there(upstream), **options) as client:
        urls = [await fetch(client, item) for item in items]
        await signed(client, urls[-1])

        async def all_are() -> bool:
            return not json.loads((await client.get("status"))[1])["cosign"]["waiting"]

        await eventually(all_are)
        judged.clear()
        assert (await client.get(f"attestations/{digest_of(items[0])}"))[0] == 200
        assert len(set(judged)) == 4
