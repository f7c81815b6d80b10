"""The read path over HTTP: what a client sees, whatever the upstreams do."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from narseal.custody import write_private
from narseal.nix import nar
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.narinfo import NarInfo
from narseal.nix.realisation import BuildTraceEntry, Realisation
from narseal.nix.store_path import StorePath
from tests.tools.cache import Entry, entry, key, store_path, unzstd, write_cache
from tests.tools.narseal import OPERATOR, UPSTREAM, metric, narseal
from tests.tools.upstream import FakeCache, Gate, fake_cache, status
from tests.tools.waiting import PATIENCE, eventually

ITEM = entry("item", b"some text\n" * 5000).signed(UPSTREAM)
BIG = entry("big", os.urandom(6 << 20), compression="none").signed(UPSTREAM)


async def test_a_narinfo_is_verified_countersigned_and_kept(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(ITEM.hash)
        assert info.with_signatures(()) == ITEM.info.with_signatures(())
        assert set(ITEM.info.signatures) < set(info.signatures)
        status_, body, headers = await client.get(info.url)
        assert (status_, body) == (200, ITEM.file)
        assert headers["Content-Type"] == "application/x-nix-nar"
        assert headers["Accept-Ranges"] == "bytes"
        await client.until(lambda: len(client.published()) == 2)
        stored = client.storage / f"{ITEM.hash}.narinfo"
        assert NarInfo.parse(stored.read_bytes()) == info
    upstream.down = True
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        assert await client.narinfo(ITEM.hash) == info
        assert (await client.get(info.url))[1] == ITEM.file
        other = entry("other").hash
        assert (await client.get(f"{other}.narinfo"))[0] == 502


async def test_serving_goes_on_with_all_upstreams_gone(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(ITEM)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(ITEM.hash)
        await client.get(info.url)
        await client.until(lambda: len(client.published()) == 2)
    async with narseal(tmp_path, {"url": "http://127.0.0.1:9"}) as client:
        assert await client.narinfo(ITEM.hash) == info
        assert (await client.get(info.url))[1] == ITEM.file
        assert (await client.get("nix-cache-info"))[1] == (
            b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"
        )
        assert (await client.get("healthz"))[0] == (await client.get("readyz"))[0] == 200


async def test_absence_is_remembered_and_trouble_is_not(
    tmp_path: Path, upstream: FakeCache
) -> None:
    name = f"{ITEM.hash}.narinfo"
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        upstream.fault(name, status(500))
        assert (await client.get(name))[0] == 502
        assert await client.refusal(name) == "absent"
        assert await client.refusal(name) == "absent"
        assert upstream.asked[name] == 2
        for code, expected in ((401, 502), (429, 502), (403, 404), (410, 404)):
            other = entry(f"s{code}")
            upstream.fault(f"{other.hash}.narinfo", status(code))
            assert (await client.get(f"{other.hash}.narinfo"))[0] == expected


async def test_500_clients_of_a_cold_path_are_one_question(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(BIG)
    name = f"{BIG.hash}.narinfo"
    gate = Gate()
    upstream.fault(name, gate)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        joined = metric("narseal_flights_joined_total")
        asking = [asyncio.create_task(client.get(name)) for _ in range(500)]
        await client.until(lambda: metric("narseal_flights_joined_total") == joined + 499)
        gate.open()
        answers = await asyncio.gather(*asking)
        assert {(code, body) for code, body, _ in answers} == {(200, answers[0][1])}
        assert upstream.asked[name] == 1
        gate = Gate()
        upstream.fault(BIG.info.url, gate)
        asking = [asyncio.create_task(client.get(BIG.info.url)) for _ in range(30)]
        await client.until(lambda: metric("narseal_flights_joined_total") == joined + 499 + 29)
        gate.open()
        files = await asyncio.gather(*asking)
        assert all(body == BIG.file for _, body, _ in files)
        assert upstream.asked[BIG.info.url] == 1


async def test_a_flight_survives_its_first_client(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(ITEM)
    name = f"{ITEM.hash}.narinfo"
    gate = Gate()
    upstream.fault(name, gate)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        joined = metric("narseal_flights_joined_total")
        first = asyncio.create_task(client.get(name))
        await gate.reached.wait()
        second = asyncio.create_task(client.get(name))
        await client.until(lambda: metric("narseal_flights_joined_total") == joined + 1)
        first.cancel()
        gate.open()
        assert (await second)[0] == 200
        assert upstream.asked[name] == 1


async def test_ranges_conditions_and_heads(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(BIG, ITEM)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        for item in (BIG, ITEM):
            info = await client.narinfo(item.hash)
            size = len(item.file)
            code, headers = await client.head(info.url)  # fetches it, for HEAD promises all of it
            assert (code, headers["Content-Length"]) == (200, str(size))
            for _ in range(2):  # from storage, then (the small one) with memory in play
                for header, start, stop in (
                    ("bytes=0-0", 0, 1), (f"bytes={size - 1}-", size - 1, size),
                    ("bytes=-5", size - 5, size), ("bytes=100-199", 100, 200),
                    (f"bytes=10-{size * 2}", 10, size),
                ):  # fmt: skip
                    code, body, headers = await client.get(info.url, headers={"Range": header})
                    assert (code, body) == (206, item.file[start:stop])
                    assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
                for header in ("bytes=5-2", "bytes=0-1,3-4", "pages=1-2", "bytes=a-b"):
                    assert (await client.get(info.url, headers={"Range": header}))[0] == 200
                code, _, headers = await client.get(info.url, headers={"Range": f"bytes={size}-"})
                assert (code, headers["Content-Range"]) == (416, f"bytes */{size}")
                code, body, headers = await client.get(info.url)
                assert (code, body) == (200, item.file)
            etag = headers["ETag"]
            for name in (info.url, f"{item.hash}.narinfo"):
                etag = (await client.get(name))[2]["ETag"]
                again = await client.get(name, headers={"If-None-Match": etag})
                assert again[:2] == (304, b"")
                assert (await client.get(name, headers={"If-None-Match": '"x"'}))[0] == 200
                stale = {"Range": "bytes=0-0", "If-Range": '"x"'}
                assert (await client.get(name, headers=stale))[0] == 200
                fresh = {"Range": "bytes=0-0", "If-Range": etag}
                assert (await client.get(name, headers=fresh))[0] == 206
            head, got = (
                await client.head(f"{item.hash}.narinfo"),
                await client.get(f"{item.hash}.narinfo"),
            )
            assert (head[0], head[1]["Content-Length"]) == (200, str(len(got[1])))


async def test_a_nar_is_never_answered_with_its_compressed_neighbour(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(BIG)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(BIG.hash)
        await client.get(info.url)
        await client.until(lambda: info.url in client.published())
        for suffix in (".br", ".gz", ".zst"):
            (client.storage / (info.url + suffix)).write_bytes(b"neighbour")
        accept = {"Accept-Encoding": "gzip, br, zstd"}
        code, body, headers = await client.get(info.url, headers=accept)
        assert (code, body) == (200, BIG.file)
        assert "Content-Encoding" not in headers


@pytest.mark.parametrize("at", [0, 1, 4096, 1 << 20, (5 << 20) + 17, (6 << 20) - 1])
async def test_a_broken_nar_is_resumed_within_the_answer(
    at: int, tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(BIG)
    upstream.fault(BIG.info.url, upstream.cut(BIG.info.url, at))
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(BIG.hash)
        assert (await client.get(info.url))[1] == BIG.file
        assert upstream.asked[BIG.info.url] == 2


async def test_a_nar_cut_many_times_comes_whole(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(BIG)
    for n in range(1, 8):
        upstream.fault(BIG.info.url, upstream.cut(BIG.info.url, n * 700_000))
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(BIG.hash)
        assert (await client.get(info.url))[1] == BIG.file
        assert len(upstream.ranges) >= 1


@pytest.mark.parametrize("fault", ["cut", "stall", "down"])
async def test_a_nar_is_taken_up_by_the_next_upstream_that_has_it(
    fault: str, tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    upstream.add(BIG)
    second.add(BIG)
    async with narseal(
        tmp_path,
        {"url": upstream.url} | ({"stall_timeout": "300ms"} if fault == "stall" else {}),
        {"url": second.url, "priority": 50},
    ) as client:
        info = await client.narinfo(BIG.hash)
        url = BIG.info.url
        if fault == "cut":
            upstream.fault(url, upstream.cut(url, 3 << 20))
            upstream.fault(url, status(500), times=50)
        elif fault == "stall":
            upstream.fault(url, upstream.stall(url, 3 << 20, PATIENCE), times=50)
        else:
            upstream.down = True
        assert (await client.get(info.url))[1] == BIG.file
        assert second.asked[url] == 1
        assert bool(second.ranges) == (fault != "down")


async def test_a_slow_upstream_is_hedged(
    tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    upstream.add(ITEM)
    second.add(ITEM)
    gate = Gate()
    upstream.fault(f"{ITEM.hash}.narinfo", gate)
    async with narseal(
        tmp_path,
        {"url": upstream.url, "hedge_after": "100ms"},
        {"url": second.url, "priority": 50},
    ) as client:
        await client.narinfo(ITEM.hash)  # though the first upstream has not answered yet
        gate.open()
        assert second.asked[f"{ITEM.hash}.narinfo"] == 1


async def test_upstreams_are_asked_by_priority(
    tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    upstream.add(ITEM)
    second.add(ITEM)
    async with narseal(
        tmp_path,
        {"url": upstream.url, "priority": 50},
        {"url": second.url, "priority": 10, "hedge_after": "10m"},
    ) as client:
        await client.narinfo(ITEM.hash)
        assert (sum(upstream.asked.values()), sum(second.asked.values())) == (0, 1)


def respelled(item: Entry, **spelling: str | None) -> bytes:
    """The narinfo's text with fields written otherwise, or left out."""
    lines = []
    for line in item.info.render().decode().splitlines():
        name = line.partition(":")[0]
        if name not in spelling:
            lines.append(line)
        elif spelling[name] is not None:
            lines.append(f"{name}: {spelling[name]}")
    return ("\n".join(lines) + "\n").encode()


def hex_of(value: Hash | None) -> str:
    assert value
    return f"sha256:{value.hex}"


PLAIN = entry("plain", compression="none").signed(UPSTREAM)
BZ = entry("bz", compression="bzip2").signed(UPSTREAM)
ZST = entry("zst", compression="zstd").signed(UPSTREAM)
NARHASH = PLAIN.info.nar_hash.nix32
UUID = "nar/2f1f8f4c-0b1e-4d0a-9d52-7f1c3a0e5b11.nar.zst"
SPELLINGS: dict[str, tuple[Entry, str, bytes]] = {
    "nix-serve": (
        PLAIN, f"nar/{PLAIN.hash}-{NARHASH}.nar",
        respelled(PLAIN, URL=f"nar/{PLAIN.hash}-{NARHASH}.nar", FileHash=None, FileSize=None),
    ),
    "harmonia": (
        PLAIN, f"nar/{NARHASH}.nar?hash={PLAIN.hash}",
        respelled(PLAIN, URL=f"nar/{NARHASH}.nar?hash={PLAIN.hash}",
                  FileHash=str(PLAIN.info.nar_hash), FileSize=str(PLAIN.info.nar_size)),
    ),
    "attic": (ZST, f"nar/{ZST.hash}.nar", respelled(ZST, URL=f"nar/{ZST.hash}.nar",
                                                    FileHash=None, FileSize=None)),
    "cachix": (ZST, UUID, respelled(ZST, URL=UUID)),
    "niks3 without FileSize": (ZST, ZST.info.url, respelled(ZST, FileSize=None)),
    "S3 in a deep folder": (ZST, "a/b/c.nar.zst", respelled(ZST, URL="a/b/c.nar.zst")),
    "hex": (BZ, BZ.info.url, respelled(BZ, NarHash=hex_of(BZ.info.nar_hash),
                                       FileHash=hex_of(BZ.info.file_hash))),
    "SRI": (BZ, BZ.info.url, respelled(BZ, NarHash=BZ.info.nar_hash.sri)),
    "no Compression: bzip2": (BZ, BZ.info.url, respelled(BZ, Compression=None)),
    "the suffix lies": (ZST, "nar/x.nar.xz", respelled(ZST, URL="nar/x.nar.xz")),
    "order of fields": (
        ZST, ZST.info.url, b"\n".join(reversed(ZST.info.render().splitlines())) + b"\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_upstream_spellings(spelling: str, tmp_path: Path, upstream: FakeCache) -> None:
    item, url, text = SPELLINGS[spelling]
    upstream.files = {f"{item.hash}.narinfo": text, url: item.file}
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(item.hash)
        suffix = item.info.url.rpartition(".nar")[2]
        assert info.url.startswith("nar/") and len(info.url) == 56 + 4 + len(suffix)
        assert (await client.get(info.url))[1] == item.file
        await client.until(lambda: f"{item.hash}.narinfo" in client.published())

        async def corrected() -> bool:
            return (await client.narinfo(item.hash)).file_hash == item.info.file_hash

        await eventually(corrected)


async def test_a_chunked_nar_without_a_known_size_is_served_whole(
    tmp_path: Path, upstream: FakeCache
) -> None:
    from aiohttp import web

    item = entry("chunked", os.urandom(3 << 20), compression="zstd").signed(UPSTREAM)
    upstream.files[f"{item.hash}.narinfo"] = respelled(item, FileHash=None, FileSize=None)

    async def chunked(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for at in range(0, len(item.file), 100_000):
            await response.write(item.file[at : at + 100_000])
        await response.write_eof()
        return response

    upstream.fault(item.info.url, chunked)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(item.hash)
        code, body, headers = await client.get(info.url)
        assert (code, body) == (200, item.file)
        assert headers["Content-Length"] == str(len(item.file))


async def test_an_encoded_narinfo_is_decoded_within_bounds(
    tmp_path: Path, upstream: FakeCache
) -> None:
    name = f"{ITEM.hash}.narinfo"
    upstream.add(ITEM)
    upstream.files[name] = gzip.compress(ITEM.info.render())
    upstream.headers[name] = {"Content-Encoding": "gzip"}
    bomb = entry("bomb")
    upstream.files[f"{bomb.hash}.narinfo"] = gzip.compress(bytes(100 << 20))
    upstream.headers[f"{bomb.hash}.narinfo"] = {"Content-Encoding": "gzip"}
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        await client.narinfo(ITEM.hash)
        assert await client.refusal(f"{bomb.hash}.narinfo") == "too-large"


async def test_an_upstream_below_a_path_and_in_a_folder(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.files = {f"sub/cache/{name}": data for name, data in ITEM.files().items()}
    async with narseal(tmp_path / "a", {"url": f"{upstream.url}/sub/cache/"}) as client:
        info = await client.narinfo(ITEM.hash)
        assert (await client.get(info.url))[1] == ITEM.file
    write_cache(tmp_path / "cache", ITEM)
    async with narseal(tmp_path / "b", {"url": f"file://{tmp_path}/cache"}) as client:
        info = await client.narinfo(ITEM.hash)
        assert (await client.get(info.url))[1] == ITEM.file
    async with narseal(tmp_path / "c", {"url": f"file://{tmp_path}/missing"}) as client:
        assert (await client.get(f"{ITEM.hash}.narinfo"))[0] == 502


async def test_credentials_go_to_the_upstream_and_not_behind_a_redirect(
    tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    upstream.add(ITEM)
    second.add(ITEM)
    write_private(tmp_path / "netrc", "machine 127.0.0.1 login nix password secret\n")
    write_private(tmp_path / "headers", "X-Api-Key: abc\n")
    upstream.fault(ITEM.info.url, status(302, Location=f"{second.url}/{ITEM.info.url}"))
    async with narseal(
        tmp_path / "n",
        {
            "url": upstream.url,
            "netrc_file": str(tmp_path / "netrc"),
            "headers_file": str(tmp_path / "headers"),
            "redirect_origins": [second.url],
        },
    ) as client:
        info = await client.narinfo(ITEM.hash)
        assert (await client.get(info.url))[1] == ITEM.file
    for headers in upstream.seen_headers:
        assert headers["Authorization"] == "Basic bml4OnNlY3JldA=="
        assert headers["X-Api-Key"] == "abc"
        assert headers["Accept-Encoding"] == "identity"
    assert len(second.seen_headers) == 1
    assert not {"Authorization", "X-Api-Key"} & second.seen_headers[0].keys()


async def test_content_mode_signs_only_after_the_bytes_were_hashed(
    tmp_path: Path, upstream: FakeCache
) -> None:
    dependency = entry("dependency")
    path = dependency.info.store_path
    item = entry("unsigned", path.full("/nix/store").encode(), references=(path,))
    upstream.add(item, dependency)
    async with narseal(
        tmp_path, {"url": upstream.url, "verify": "content", "public_keys": []}
    ) as client:
        info = await client.narinfo(item.hash)
        assert {f"{item.hash}.narinfo", info.url} <= client.published()
        # references are fetched before they are asked for
        await client.until(lambda: f"{dependency.hash}.narinfo" in client.published())
        assert (await client.get(info.url))[1] == item.file
        wrong = entry("wrong")
        upstream.add(wrong)
        upstream.files[wrong.info.url] = ITEM.file
        assert await client.refusal(f"{wrong.hash}.narinfo") == "nar-size"


async def test_content_that_takes_too_long_is_504_and_goes_on(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    gate = Gate()
    upstream.fault(ITEM.info.url, gate)
    async with narseal(
        tmp_path,
        {"url": upstream.url, "sign_when": "content"},
        limits={"content_hold": "200ms"},
    ) as client:
        assert (await client.get(f"{ITEM.hash}.narinfo"))[0] == 504
        gate.open()
        await client.until(lambda: f"{ITEM.hash}.narinfo" in client.published())
        await client.narinfo(ITEM.hash)
        assert upstream.asked[ITEM.info.url] == 1


def content_addressed(
    name: str, method: Method, node: nar.Node, hashed: bytes, algorithm: str = "sha256"
) -> Entry:
    import hashlib

    ca = ContentAddress(method, Hash(algorithm, hashlib.new(algorithm, hashed).digest()))
    path = ca.store_path(name, (), self_hash="", store_dir="/nix/store")
    assert path
    return entry(name, node=node, ca=ca, path=path)


async def test_content_addressed_paths_need_no_signature_but_their_content(
    tmp_path: Path, upstream: FakeCache
) -> None:
    node = nar.Regular(b"source")
    plain = b"".join(nar.render(node))
    items = [
        content_addressed("recursive", Method.NAR, node, plain),
        content_addressed("flat", Method.FLAT, node, b"source"),
        content_addressed("text", Method.TEXT, node, b"source"),
    ]
    upstream.add(*items)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        for item in items:
            info = await client.narinfo(item.hash)
            assert info.ca == item.info.ca
            assert (await client.get(info.url))[1] == item.file
        weak = content_addressed("sha1", Method.NAR, node, plain, "sha1")  # collisions are cheap
        upstream.add(weak)
        assert await client.refusal(f"{weak.hash}.narinfo") == "unsigned"
        # the CA is right for the path, but the NAR is another: it must not be signed
        for method in (Method.NAR, Method.FLAT, Method.TEXT):
            good = content_addressed(
                f"lie{method.name}", method, node, plain if method is Method.NAR else b"source"
            )
            other = entry("x", node=nar.Regular(method.name.encode()))
            lie = replace(
                other, info=replace(other.info, store_path=good.info.store_path, ca=good.info.ca)
            )
            upstream.add(lie)
            assert await client.refusal(f"{lie.hash}.narinfo") == "ca-mismatch"


async def test_recompression_serves_zstd_with_a_matching_narinfo(
    tmp_path: Path, upstream: FakeCache
) -> None:
    items = [entry(c, b"text " * 9000, compression=c).signed(UPSTREAM) for c in ("xz", "bzip2")]
    already = entry("z", compression="zstd").signed(UPSTREAM)
    upstream.add(*items, already)
    async with narseal(
        tmp_path, {"url": upstream.url}, storage={"recompress": True, "recompress_level": 5}
    ) as client:
        for item in items:
            info = await client.narinfo(item.hash)
            code, body, _ = await client.get(info.url)
            assert (code, info.compression) == (200, "zstd")
            assert (info.file_hash, info.file_size) == (Hash.sha256(body), len(body))
            assert info.url == f"nar/{Hash.sha256(body).nix32}.nar.zst"
            assert (info.nar_hash, info.nar_size) == (item.info.nar_hash, item.info.nar_size)
            assert unzstd(body) == item.nar
        assert (await client.narinfo(already.hash)).file_hash == already.info.file_hash
        wrong = entry("w", compression="xz").signed(UPSTREAM)
        upstream.add(wrong)
        upstream.files[wrong.info.url] = items[0].file
        assert await client.refusal(f"{wrong.hash}.narinfo") == "nar-size"


async def test_a_file_that_vanished_or_shrank_is_fetched_again(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(BIG)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(BIG.hash)

        async def from_storage() -> bool:
            """Whether the transfer is over: nobody reads along with it any more."""
            joined = metric("narseal_flights_joined_total")
            assert (await client.get(info.url))[1] == BIG.file
            return metric("narseal_flights_joined_total") == joined

        for damage in (Path.unlink, lambda p: os.truncate(p, 100)):
            assert (await client.get(info.url))[1] == BIG.file
            await eventually(from_storage)
            damage(client.storage / info.url)
        assert (await client.get(info.url))[1] == BIG.file
        assert upstream.asked[BIG.info.url] == 3


async def test_a_recompressed_file_that_vanished_is_made_again(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    async with narseal(tmp_path, {"url": upstream.url}, storage={"recompress": True}) as client:
        large = entry("large", os.urandom(100_000)).signed(UPSTREAM)  # not kept in memory
        upstream.add(large)
        info = await client.narinfo(large.hash)
        body = (await client.get(info.url))[1]
        (client.storage / info.url).unlink()
        assert (await client.get(info.url))[0] == 404
        assert (await client.narinfo(large.hash)).url == info.url
        assert (await client.get(info.url))[1] == body


async def test_a_new_operator_key_signs_what_was_admitted_before(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        await client.narinfo(ITEM.hash)
    new = key("operator-2")
    file = tmp_path / "new.secret"
    file.write_text(new.render())
    file.chmod(0o600)
    keys = [{"url": f"file:{tmp_path}/operator.secret", "not_after": "2020-01-01T00:00:00Z"},
            {"url": f"file:{file}"}]  # fmt: skip
    async with narseal(tmp_path, {"url": upstream.url}, signing={"key": keys}) as client:
        info = await client.narinfo(ITEM.hash)
        names = {s.key_name for s in info.signatures}
        assert names == {UPSTREAM.name, OPERATOR.name, new.name}
        other = entry("later").signed(UPSTREAM)
        upstream.add(other)
        _, body, _ = await client.get(f"{other.hash}.narinfo")
        later = {s.key_name for s in NarInfo.parse(body).signatures}
        assert later == {UPSTREAM.name, new.name}  # the first one is past its date


async def test_a_realisation_of_a_path_that_nobody_has_hides_no_other(
    tmp_path: Path, upstream: FakeCache
) -> None:
    item = entry("app-1", b"one").signed(UPSTREAM)
    upstream.add(item)
    good = BuildTraceEntry(store_path("app-1.drv"), "out", item.info.store_path)
    name = f"build-trace-v2/{good.drv_path}/out.doi"
    upstream.files[name] = good.with_signatures((UPSTREAM.sign(good.fingerprint()),)).render()
    theirs = key("first-1")
    bad = BuildTraceEntry(good.drv_path, "out", store_path("nowhere-1"))
    async with fake_cache() as first:
        first.files[name] = bad.with_signatures((theirs.sign(bad.fingerprint()),)).render()
        upstreams: list[dict[str, object]] = [
            {"url": first.url, "priority": 10, "public_keys": [str(theirs.public)]},
            {"url": upstream.url},
        ]
        rules = [{"match": "unfree-*", "action": "deny"}]
        async with narseal(tmp_path, *upstreams, policy=rules) as client:
            code, body, _ = await client.get(name)
            assert code == 200 and json.loads(body)["outPath"] == str(item.info.store_path)


async def test_realisations_of_both_spellings_are_verified_and_signed(
    tmp_path: Path, upstream: FakeCache
) -> None:
    drv = StorePath("0" * 32, "x.drv")
    old = Realisation(f"sha256:{'ab' * 32}!out", store_path("out"))
    new = BuildTraceEntry(drv, "out", store_path("out"))
    old_at, new_at = f"realisations/{old.id}.doi", f"build-trace-v2/{drv}/out.doi"
    wire = {old_at: old_at.replace("!", "%21"), new_at: new_at}
    async with narseal(tmp_path, {"url": upstream.url}, limits={"negative_ttl": "0s"}) as client:
        for name, value in ((old_at, old), (new_at, new)):
            evil = replace(value, out_path=store_path("evil"))
            signature = UPSTREAM.sign(value.fingerprint())
            for wrong in (
                value.render(),
                value.with_signatures((key("stranger").sign(value.fingerprint()),)).render(),
                evil.with_signatures((signature,)).render(),
                b"nonsense",
            ):
                upstream.files[wire[name]] = wrong
                assert await client.refusal(name) in ("unsigned", "malformed")
            upstream.files[wire[name]] = value.with_signatures((signature,)).render()
            code, body, headers = await client.get(name)
            assert (code, headers["Content-Type"]) == (200, "application/json")
            tree = json.loads(body)
            assert OPERATOR.name in body.decode() and UPSTREAM.name in body.decode()
            assert tree["outPath"] == str(store_path("out"))
            upstream.files.clear()
            assert (await client.get(name))[1] == body
            assert (await client.get(name.replace("!", "%21")))[1] == body


async def test_logs_listings_and_debug_info(tmp_path: Path, upstream: FakeCache) -> None:
    log = f"log/{'0' * 32}-x.drv"
    listing = f"{ITEM.hash}.ls"
    build_id = f"debuginfo/{'ab' * 20}.debug"
    tree = b'{"version":1,"root":{"type":"regular","size":5,"narOffset":400}}'
    pointer = {"archive": f"../{ITEM.info.url}", "member": "lib/debug/x"}
    upstream.add(ITEM)
    upstream.files |= {log: b"built\n", listing: tree, build_id: json.dumps(pointer).encode()}
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        assert (await client.get(log))[:2] == (200, b"built\n")
        assert (await client.get(listing))[:2] == (200, tree)
        assert await client.refusal(build_id) == "unsigned"  # its path was never admitted
        await client.narinfo(ITEM.hash)
        assert json.loads((await client.get(build_id))[1]) == pointer
        upstream.down = True
        assert (await client.get(log))[:2] == (200, b"built\n")
        assert (await client.get(listing))[0] == 200
        assert (await client.get(f"log/{'1' * 32}-x.drv"))[0] == 502
        upstream.down = False
        upstream.files[f"{'1' * 32}.ls"] = b"[1]"
        assert await client.refusal(f"{'1' * 32}.ls") == "malformed"


async def test_large_log_is_refused(tmp_path: Path, upstream: FakeCache) -> None:
    log = f"log/{'0' * 32}-x.drv"
    upstream.files[log] = bytes(2 << 20)
    async with narseal(tmp_path, {"url": upstream.url}, limits={"side_file": "1M"}) as client:
        assert await client.refusal(log) == "too-large"


async def test_the_status_page_and_the_keys(tmp_path: Path, upstream: FakeCache) -> None:
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        code, page, _ = await client.get("")
        assert code == 200
        assert f"trusted-public-keys = {OPERATOR.public}".encode() in page
        assert (await client.get("pubkey"))[1] == f"{OPERATOR.public}\n".encode()
        code, text, headers = await client.get("metrics")
        assert code == 200 and headers["Content-Type"].startswith("text/plain")
        assert b'narseal_rejected_total{reason="unsigned"}' in text


async def test_two_paths_with_one_nar_share_it(tmp_path: Path, upstream: FakeCache) -> None:
    one, two = (entry(name, b"same").signed(UPSTREAM) for name in ("one", "two"))
    upstream.add(one, two)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        first, second = await client.narinfo(one.hash), await client.narinfo(two.hash)
        assert first.url == second.url
        await client.get(first.url)
        await client.until(lambda: len(client.published()) == 3)


async def test_a_client_that_leaves_does_not_stop_the_transfer(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(BIG)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(BIG.hash)
        async with client.session.get(f"{client.url}/{info.url}") as response:
            await response.content.readexactly(1000)
            response.close()
        await client.until(lambda: info.url in client.published())


async def test_broken_relay_looks_broken(tmp_path: Path, upstream: FakeCache) -> None:
    upstream.add(BIG)
    upstream.fault(BIG.info.url, upstream.cut(BIG.info.url, 4 << 20))
    upstream.fault(BIG.info.url, status(500), times=50)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(BIG.hash)
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.get(info.url)
        assert client.published() == set()
