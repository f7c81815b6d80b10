"""The sign rule against those who lie a little: what is signed is what was measured (findings 1 to 3)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from narseal.custody import tokens
from narseal.nix import nar
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.keys import Signature
from narseal.nix.narinfo import NarInfo
from narseal.nix.realisation import parse_at
from narseal.nix.store_path import References, StorePath
from tests.faults.test_uploads import Uploader, uploading
from tests.tools.cache import addressed, entry, key, pointer, store_path, with_debug_info
from tests.tools.narseal import OPERATOR, UPSTREAM, narseal
from tests.tools.upstream import FakeCache, fake_cache
from tests.tools.upstream import status as redirect

NEXT = key("operator-2")


@pytest.fixture
async def mirror() -> AsyncIterator[FakeCache]:
    async with fake_cache() as cache:
        yield cache


async def test_a_content_address_does_not_vouch_for_the_size(
    tmp_path: Path, upstream: FakeCache, mirror: FakeCache
) -> None:
    """F1: NarSize + 8 was signed and pinned, and the honest narinfo was a conflict for ever."""
    honest = addressed("source", b"contents")
    liar = honest.but(nar_size=honest.info.nar_size + 8)
    upstream.add(liar)
    mirror.add(honest.signed(UPSTREAM))
    async with narseal(
        tmp_path, {"url": upstream.url, "priority": 1}, {"url": mirror.url, "priority": 2}
    ) as client:
        info = await client.narinfo(honest.hash)
        assert info.nar_size == honest.info.nar_size
        assert (await client.get(info.url))[1] == honest.file


async def test_a_stored_nar_under_another_path_does_not_vouch_for_a_size(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """F1b: the second path was admitted as stored, with the size that it claimed."""
    first = entry("first", b"same", compression="zstd").signed(UPSTREAM)
    second = replace(first, info=replace(first.info, store_path=store_path("second"))).but(
        nar_size=999_999
    )
    second = second.signed(UPSTREAM)
    upstream.add(first, second)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(first.hash)
        assert (await client.get(info.url))[0] == 200
        status, body, _ = await client.get(f"{second.hash}.narinfo")
        if status == 200:  # its upstream signed it, so it stands by it, but not with these bytes
            claimed = NarInfo.parse(body)
            assert claimed.url != info.url
            assert (await client.get(claimed.url))[0] >= 400
        assert f"{second.hash}.narinfo" not in client.published()


async def test_references_that_nobody_signed_are_looked_for(
    tmp_path: Path, upstream: FakeCache
) -> None:
    there = store_path("there")
    good = entry("good", there.full("/nix/store").encode(), references=(there,))
    liar = entry("liar", b"nothing of it", references=(there,))
    upstream.add(good, liar)
    async with narseal(
        tmp_path, {"url": upstream.url, "verify": "content", "public_keys": []}
    ) as client:
        await client.narinfo(good.hash)
        assert await client.refusal(f"{liar.hash}.narinfo") == "wrong-references"


@pytest.mark.parametrize("bring_nar_again", [False, True])
async def test_an_upload_over_stored_bytes_is_measured_too(
    tmp_path: Path, bring_nar_again: bool
) -> None:
    """F5: a CA over foreign bytes, and references that are not there, passed unlooked at."""
    first = entry("first", b"bytes", compression="zstd")
    flat = ContentAddress(Method.FLAT, Hash.sha256(b"other bytes"))
    path = flat.store_path("forged", (), self_hash="", store_dir="/nix/store")
    assert path
    forged = replace(first, info=replace(first.info, store_path=path, ca=flat))
    refers = replace(
        first,
        info=replace(
            first.info,
            store_path=store_path("refers"),
            references=References((first.info.store_path,)),
        ),
    )
    async with uploading(tmp_path, references="refuse") as uploader:
        assert (await uploader.path(first))[0] == 201
        for item in (forged, refers):
            if bring_nar_again:
                assert (await uploader.put(item.info.url, item.file))[0] == 201
            status, text = await uploader.put(f"{item.hash}.narinfo", item.info.render())
            assert status == 422, text
            assert (await uploader.client.get(f"{item.hash}.narinfo"))[0] == 404
        wrong_size = replace(first.info, store_path=store_path("sized"), file_size=1)
        hash_part = wrong_size.store_path.hash_part
        assert (await uploader.put(f"{hash_part}.narinfo", wrong_size.render()))[0] == 422


async def test_a_forged_signature_of_the_next_key_is_replaced(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """F22: it was kept, counted as present after the rotation, and the path was refused by clients."""
    item = entry("app", b"1", compression="none").signed(UPSTREAM)
    forged = Signature(NEXT.name, bytes(64))
    item = item.but(signatures=tuple(sorted((*item.info.signatures, forged))))
    upstream.add(item)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(item.hash)
        await client.get(info.url)
        await client.until(lambda: f"{item.hash}.narinfo" in client.published())
    secret = tmp_path / "next.secret"
    from narseal.custody import write_private

    write_private(secret, NEXT.render())
    keys = {"key": [{"url": f"file:{tmp_path}/operator.secret"}, {"url": f"file:{secret}"}]}
    async with narseal(tmp_path, {"url": upstream.url}, signing=keys) as client:

        def is_rotated() -> bool:
            text = (client.storage / f"{item.hash}.narinfo").read_bytes()
            named = [s for s in NarInfo.parse(text).signatures if s.key_name == NEXT.name]
            return [NEXT.public.verifies(info.fingerprint(), s) for s in named] == [True]

        await client.until(is_rotated)
        status = json.loads((await client.get("status"))[1])
        assert status["lackSignatures"] == 0
        kept = await client.narinfo(item.hash)
        assert forged not in kept.signatures
        assert {s.key_name for s in kept.signatures} == {"operator-1", NEXT.name, UPSTREAM.name}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("FileSize", "9223372036854775808"),
        ("FileSize", "99999999999999999999"),
        ("NarSize", "9223372036854775808"),
    ],
)
async def test_sizes_beyond_counting_are_malformed(
    tmp_path: Path, upstream: FakeCache, field: str, value: str
) -> None:
    """F27: they were an OverflowError, a 500, and took their whole commit group along."""
    item = entry("app", b"1").signed(UPSTREAM)
    upstream.add(item)
    lines = item.info.render().decode().splitlines()
    text = "\n".join(f"{field}: {value}" if x.startswith(f"{field}:") else x for x in lines)
    upstream.files[f"{item.hash}.narinfo"] = f"{text}\n".encode()
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        assert await client.refusal(f"{item.hash}.narinfo") == "malformed"
    async with uploading(tmp_path / "up") as uploader:
        status, _ = await uploader.put(f"{item.hash}.narinfo", f"{text}\n".encode())
        assert status == 422


async def scoped(folder: Path, uploader: Uploader, *allow: str) -> Uploader:
    file = folder / "tokens"
    name = f"scoped-{len(tokens.listed(file))}"
    return Uploader(uploader.client, tokens.add(file, name, allow=allow, expires=None)[1])


def trace(out: StorePath) -> bytes:
    return json.dumps({"outPath": str(out), "signatures": []}).encode()


async def test_a_token_names_no_derivation_outside_its_scope(tmp_path: Path) -> None:
    """F3: `*-app-*` could say what openssl's derivation builds."""
    mine = entry("my-app-1", b"mine", compression="zstd")
    async with uploading(tmp_path) as everything:
        uploader = await scoped(tmp_path, everything, "*-app-*")
        assert (await uploader.path(mine))[0] == 201
        out = mine.info.store_path
        foreign = f"build-trace-v2/{store_path('openssl-3.0.drv')}/out.doi"
        own = f"build-trace-v2/{store_path('my-app-1.drv')}/out.doi"
        assert (await uploader.put(foreign, trace(out)))[0] == 403
        assert (await uploader.client.get(foreign))[0] == 404
        assert (await uploader.put(own, trace(out)))[0] == 201
        assert OPERATOR.name.encode() in (await uploader.client.get(own))[1]
        # a derivation that is named by a hash alone is in nobody's scope but everybody's
        ident = f"sha256:{'a' * 64}!out"
        old = f"realisations/{ident}.doi".replace("!", "%21")
        body = json.dumps(
            {"id": ident, "outPath": str(out), "dependentRealisations": {}, "signatures": []}
        ).encode()
        assert (await uploader.put(old, body))[0] == 403
        assert (await everything.put(old, body))[0] == 201
        # an output that has the hash part of a path, and another name
        other = f"build-trace-v2/{store_path('my-app-2.drv')}/out.doi"
        renamed = StorePath(out.hash_part, "my-app-other")
        assert (await uploader.put(other, trace(renamed)))[0] == 422


async def test_side_files_stay_within_the_scope(tmp_path: Path) -> None:
    """F6: any token took the listing, log and debug info of any path, for ever."""
    build_ids = ("b" * 40, "c" * 40)
    owned = entry("openssl-3.0", node=with_debug_info(*build_ids), compression="zstd")
    listing = b'{"version":1,"root":{"type":"regular","size":1}}'
    squat = b'{"version":1,"root":{"type":"regular","size":2}}'
    foreign = b'{"archive":"https://evil.example/x.nar","member":"m"}'
    debug = "debuginfo/" + "b" * 40 + ".debug"
    log = f"log/{store_path('openssl-3.0.drv')}"
    async with uploading(tmp_path) as owner:
        client = owner.client
        stranger = await scoped(tmp_path, owner, "*-app-*")
        assert (await stranger.put(log, b"squat"))[0] == 403
        assert (await stranger.put(f"{owned.hash}.ls", squat))[0] == 201  # it waits, and is lost
        assert (await stranger.put(debug, pointer(owned, "c" * 40)))[0] == 422
        assert (await stranger.put(debug, pointer(owned, "b" * 40)))[0] == 201
        assert (await stranger.put(debug, foreign))[0] == 422
        assert (await owner.put(f"{owned.hash}.ls", listing))[0] == 201
        assert (await owner.put(debug, pointer(owned, "b" * 40)))[0] == 201
        assert (await owner.put(log, b"built"))[0] == 201
        assert (await owner.path(owned))[0] == 201
        assert (await client.get(f"{owned.hash}.ls"))[1] == listing
        assert (await client.get(debug))[1] == pointer(owned, "b" * 40)
        assert (await client.get(log))[1] == b"built"
        assert (await stranger.put(f"{owned.hash}.ls", squat))[0] == 403
        assert (await stranger.put(debug, pointer(owned, "b" * 40)))[0] == 403
        bare = entry("bare-1.0", compression="zstd")
        assert (await stranger.put(f"{bare.hash}.ls", squat))[0] == 201
        assert (await owner.path(bare))[0] == 201
        assert (await client.get(f"{bare.hash}.ls"))[0] == 404


async def test_a_path_is_asked_for_by_its_whole_name(tmp_path: Path) -> None:
    """F26: only the hash part of the name counted."""
    item = entry("app", b"1", compression="zstd")
    async with uploading(tmp_path) as uploader:
        await uploader.path(item)
        assert (await uploader.client.get(f"status/{item.info.store_path}"))[0] == 200
        assert (await uploader.client.get(f"status/{item.hash}-other"))[0] == 404
        assert (await uploader.client.get(f"attestations/{item.hash}-other"))[0] == 404


async def test_the_status_of_a_path_asks_the_upstreams_once(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """F20: every question went to every upstream."""
    item = entry("app", b"1").signed(UPSTREAM)
    upstream.add(item)
    absent = store_path("absent")
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        for _ in range(20):
            assert (await client.get(f"status/{item.info.store_path}"))[0] == 200
            assert (await client.get(f"status/{absent}"))[0] == 404
        assert upstream.asked[f"{item.hash}.narinfo"] == 1
        assert upstream.asked[f"{absent.hash_part}.narinfo"] == 1


async def test_a_content_address_knows_itself_by_its_whole_name(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """References of its own hash part and another name recomputed to the path, and were signed."""
    node = nar.Regular(b"contents")
    plain = b"".join(nar.render(node))
    ca = ContentAddress(Method.NAR, Hash.sha256(plain))
    path = ca.store_path(
        "tool", (store_path("x"),), self_hash=store_path("x").hash_part, store_dir="/nix/store"
    )
    assert path
    item = entry("tool", node=node, ca=ca, path=path, compression="zstd")
    text = item.info.render().decode()
    for names in (f"{item.hash}-evil", f"{item.hash}-evil {item.hash}-tool"):
        upstream.add(item)
        lie = text.replace("References: ", f"References: {names}")
        upstream.files[f"{item.hash}.narinfo"] = lie.encode()
        async with narseal(tmp_path / names[-8:].strip(), {"url": upstream.url}) as client:
            assert await client.refusal(f"{item.hash}.narinfo") == "malformed"


async def test_a_realisation_of_a_path_that_is_kept_back_is_not_signed(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """The path was 403 and never admitted, and its realisation was signed."""
    item = entry("my-app-1", b"1", compression="zstd").signed(UPSTREAM)
    name = f"build-trace-v2/{store_path('my-app-1.drv')}/out.doi"
    parsed = parse_at(name, trace(item.info.store_path))
    upstream.add(item)
    upstream.files[name] = parsed.with_signatures((UPSTREAM.sign(parsed.fingerprint()),)).render()
    builder = str(key("builder-1").public)
    rule = {"match": ["my-app-*"], "require": "signature", "keys": [builder]}
    async with narseal(tmp_path, {"url": upstream.url}, policy=[rule]) as client:
        assert (await client.get(f"{item.hash}.narinfo"))[0] == 403
        status, body, _ = await client.get(name)
        assert (status, OPERATOR.name.encode() in body) == (403, False)


@pytest.mark.parametrize(
    "location", ["http://[::1", "http://a:99999999/", "http://..a../", f"http://{'a' * 300}/"]
)
async def test_a_redirect_that_is_no_address_is_trouble_of_one_upstream(
    tmp_path: Path, upstream: FakeCache, mirror: FakeCache, location: str
) -> None:
    """It was a 500, and the next upstream was not asked."""
    item = entry("app", b"1", compression="zstd").signed(UPSTREAM)
    mirror.add(item)
    for name in item.files():
        upstream.fault(name, redirect(302, Location=location), times=10)
    upstreams = ({"url": upstream.url, "priority": 1}, {"url": mirror.url, "priority": 2})
    async with narseal(tmp_path, *upstreams) as client:
        info = await client.narinfo(item.hash)
        assert (await client.get(info.url))[1] == item.file


async def test_forged_signatures_in_known_names_are_not_united(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Merged into a path, they would be tried before good ones, until none is tried any more."""
    item = entry("app", b"1", compression="zstd")
    trusted = key("uploader-1")
    names = (OPERATOR.name, UPSTREAM.name, trusted.name)
    forged = tuple(Signature(name, bytes([n]) * 64) for name in names for n in range(3))
    stranger = key("stranger-1").sign(item.info.fingerprint())
    async with uploading(
        tmp_path, {"url": upstream.url}, trusted_keys=[str(trusted.public)]
    ) as uploader:
        assert (await uploader.path(item))[0] == 201
        again = item.info.with_signatures((*forged, stranger))
        assert (await uploader.put(f"{item.hash}.narinfo", again.render()))[0] == 200
        found = (await uploader.client.narinfo(item.hash)).signatures
        assert stranger in found
        assert not set(forged) & set(found)
