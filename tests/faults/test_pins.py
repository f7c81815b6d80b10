"""What is pinned stays what was verified: changed narinfos, files and sizes that come later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from narseal.custody import write_private
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.narinfo import NarInfo
from tests.faults.test_schedules import revoke
from tests.faults.test_uploads import Uploader, add, uploading
from tests.tools.cache import Entry, entry, harder, key, store_path, unzstd
from tests.tools.narseal import OPERATOR, UPSTREAM, Client, narseal
from tests.tools.upstream import FakeCache
from tests.tools.waiting import eventually

NEXT = key("operator-2")
DEPENDENCY = entry("dependency", b"d", compression="zstd")
ITEM = entry("app", b"1" * 5000, compression="zstd")
OTHERS: dict[str, Callable[[], Entry]] = {
    "another NAR of the same size": lambda: entry("app", b"2" * 5000, compression="zstd"),
    "another NarHash": lambda: ITEM.but(nar_hash=Hash.sha256(b"x")),
    "another NarSize": lambda: ITEM.but(nar_size=ITEM.info.nar_size + 8),
    "a reference more": lambda: ITEM.but(references=(DEPENDENCY.info.store_path,)),
    "another name": lambda: ITEM.but(store_path=replace(ITEM.info.store_path, name="app2")),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
async def test_a_path_that_is_here_is_not_brought_again_otherwise(
    what: str, tmp_path: Path
) -> None:
    builder = key("builder-1")
    async with uploading(tmp_path, trusted_keys=[str(builder.public)]) as uploader:
        assert (await uploader.path(DEPENDENCY))[0] == 201
        assert (await uploader.path(ITEM))[0] == 201
        before = (await uploader.client.get(f"{ITEM.hash}.narinfo"))[1]
        other = OTHERS[what]().signed(builder)
        await uploader.put(other.info.url, other.file)
        status, text = await uploader.put(f"{ITEM.hash}.narinfo", other.info.render())
        assert status == 409, text
        assert (await uploader.client.get(f"{ITEM.hash}.narinfo"))[1] == before


@pytest.mark.parametrize("what", OTHERS)
async def test_a_pin_holds_all_that_is_signed(
    what: str, tmp_path: Path, upstream: FakeCache
) -> None:
    """The path was withdrawn for its wrong bytes; what its upstream signs next is another path."""
    upstream.add(DEPENDENCY.signed(UPSTREAM), ITEM.signed(UPSTREAM))
    upstream.files[ITEM.info.url] = b"wrong"
    there = {"url": upstream.url}
    limits = {"negative_ttl": "1s"}
    async with narseal(tmp_path, there, limits=limits) as client:
        await client.narinfo(ITEM.hash)
        assert (await client.get(ITEM.info.url))[0] >= 400
        other = OTHERS[what]().signed(UPSTREAM).but(url=f"nar/elsewhere-{len(what)}.nar.zst")
        upstream.files = {f"{ITEM.hash}.narinfo": other.info.render(), other.info.url: other.file}

        async def is_conflict() -> bool:
            status, _, headers = await client.get(f"{ITEM.hash}.narinfo")
            assert status == 404
            return headers["X-Narseal-Reason"] == "conflict"

        await eventually(is_conflict)


async def test_a_file_that_changes_between_two_ranges_is_begun_anew(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """The same NAR, compressed anew while it is fetched: both halves together are neither."""
    noise = b"".join(n.to_bytes(4, "little") for n in range(200_000))
    item = entry("app", noise, compression="zstd")
    again = harder(item.nar)
    assert len(again) != len(item.file)
    item = item.but(file_hash=None, file_size=None, url="nar/app.nar.zst").signed(UPSTREAM)
    upstream.add(item)
    cut = upstream.cut(item.info.url, min(len(again), len(item.file)) // 2)

    async def cut_and_change(request: web.Request) -> web.StreamResponse | None:
        response = await cut(request)
        upstream.files[item.info.url] = again
        return response

    upstream.fault(item.info.url, cut_and_change)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(item.hash)
        status, body, _ = await client.get(info.url)
        assert (status, unzstd(body)) == (200, item.nar)


async def test_more_bytes_than_were_announced_are_refused(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """The rest comes chunked, and does not end where the first answer said that the file ends."""
    # too large to be fetched in one go
    item = entry("app", os.urandom(400_000), compression="zstd").signed(UPSTREAM)
    upstream.add(item)
    size = len(item.file)
    skippable = b"\x50\x2a\x4d\x18" + (1000).to_bytes(4, "little") + bytes(1000)

    async def longer(request: web.Request) -> web.StreamResponse:
        start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        response = web.StreamResponse(status=206)
        response.headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(item.file[start:] + skippable)
        await response.write_eof()
        return response

    upstream.fault(item.info.url, upstream.cut(item.info.url, size // 2))
    upstream.fault(item.info.url, longer)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(item.hash)
        assert await client.refusal(info.url) == "too-large"
        assert client.published() == set()


def keys_of(folder: Path) -> dict[str, Any]:
    write_private(folder / "next.secret", NEXT.render())
    files = [f"file:{folder}/operator.secret", f"file:{folder}/next.secret"]
    return {"key": [{"url": url} for url in files]}


async def uploaded(folder: Path, item: Entry, settings: dict[str, Any]) -> None:
    settings |= {"enabled": True, "tokens_file": str(folder / "tokens")}
    token = add(folder)
    async with narseal(folder, upload=settings) as client:
        assert (await Uploader(client, token).path(item))[0] == 201


@pytest.mark.parametrize("damage", ["none", "other bytes", "compressed otherwise"])
@pytest.mark.parametrize("key_name", [OPERATOR.name, UPSTREAM.name])
async def test_what_rests_on_its_content_is_measured_when_a_key_is_revoked(
    damage: str, key_name: str, tmp_path: Path, upstream: FakeCache
) -> None:
    """An upload with an upstream's signature: when a key of it is revoked, its file must be right."""
    item = ITEM.signed(UPSTREAM)
    settings: dict[str, Any] = {}
    await uploaded(tmp_path, item, settings)
    file = tmp_path / "storage" / item.info.url
    if damage == "other bytes":
        file.write_bytes(entry("x", b"other", compression="zstd").file)
    elif damage == "compressed otherwise":
        file.write_bytes(harder(item.nar) + harder(b""))
    # with the upstream's key revoked, no other key speaks for the path; with ours, the upstream's
    # does, unless narseal knows of no upstream
    there = [{"url": upstream.url}] if key_name == UPSTREAM.name else []
    # the scrub would find the damage at a moment of its own
    storage = {"scrub_rate": 0}
    more = {"upload": settings, "signing": keys_of(tmp_path), "storage": storage}
    async with narseal(tmp_path, *there, **more) as client:
        status, body, _ = await client.get(f"{item.hash}.narinfo")
        assert status == 200
        await revoke(tmp_path, key_name, *there, **more)()
        status, body, _ = await client.get(f"{item.hash}.narinfo")
        if damage == "none":
            assert status == 200
            names = {s.key_name for s in NarInfo.parse(body).signatures}
            assert key_name not in names and NEXT.name in names
        else:
            assert status == 404
            assert f"{item.hash}.narinfo" not in client.published()


async def test_a_token_ends_at_its_time_though_it_was_just_used(tmp_path: Path) -> None:
    seconds = 4.0
    async with uploading(tmp_path) as uploader:

        async def was_taken_in_time() -> bool:
            nonlocal seconds
            seconds *= 2  # on a machine that is too busy, it ended before it was shown
            expires = time.time() + seconds
            short = Uploader(uploader.client, add(tmp_path, expires=expires))
            # the file of tokens is looked at each second
            while time.time() < expires:
                if (await short.put(ITEM.info.url, ITEM.file))[0] == 201:
                    break
            else:
                return False
            await eventually(lambda: _is_past(expires))
            assert (await short.put(ITEM.info.url, ITEM.file))[0] == 401
            return True

        await eventually(was_taken_in_time)


async def _is_past(moment: float) -> bool:
    return time.time() > moment


async def test_two_names_of_one_file_are_measured_alike(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """A second path over the same file, whose narinfo says another NarHash or size."""
    first = ITEM.signed(UPSTREAM)
    upstream.add(first)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(first.hash)
        assert (await client.get(info.url))[0] == 200
        await client.until(lambda: f"{first.hash}.narinfo" in client.published())
        for number, lie in enumerate(
            (ITEM.but(nar_hash=Hash.sha256(b"x")), ITEM.but(nar_size=ITEM.info.nar_size + 8))
        ):
            second = lie.but(store_path=store_path(f"second-{number}")).signed(UPSTREAM)
            upstream.add(second)
            await _is_never_over_other_bytes(client, second)


async def _is_never_over_other_bytes(client: Client, item: Entry) -> None:
    status, body, _ = await client.get(f"{item.hash}.narinfo")
    if status == 200:  # its upstream signed it
        claimed = NarInfo.parse(body)
        assert (await client.get(claimed.url))[0] >= 400
    assert f"{item.hash}.narinfo" not in client.published()


async def test_a_realisation_that_is_here_stays(tmp_path: Path, upstream: FakeCache) -> None:
    """What is pinned at an address is not brought again as another output."""
    name = f"build-trace-v2/{store_path('app.drv')}/out.doi"
    one, two = ITEM, DEPENDENCY
    async with uploading(tmp_path) as uploader:
        for item in (one, two):
            assert (await uploader.path(item))[0] == 201
        assert (await uploader.put(name, _trace(one)))[0] == 201
        before = (await uploader.client.get(name))[1]
        assert (await uploader.put(name, _trace(two)))[0] == 409
        assert (await uploader.client.get(name))[1] == before


def _trace(item: Entry) -> bytes:
    return f'{{"outPath":"{item.info.store_path}","signatures":[]}}'.encode()


async def test_an_upload_is_what_its_address_and_its_file_hash_say(tmp_path: Path) -> None:
    ca = ContentAddress(Method.NAR, ITEM.info.nar_hash)
    async with uploading(tmp_path) as uploader:
        for wrong in (
            ITEM.but(ca=ca),  # of another path
            ITEM.but(file_hash=Hash.sha256(b"x")),
            ITEM.but(file_size=len(ITEM.file) + 1),
        ):
            assert (await uploader.put(ITEM.info.url, ITEM.file))[0] == 201
            status, text = await uploader.put(f"{ITEM.hash}.narinfo", wrong.info.render())
            assert status == 422, text
            assert (await uploader.client.get(f"{ITEM.hash}.narinfo"))[0] == 404
        assert (await uploader.path(ITEM))[0] == 201


async def test_a_file_is_taken_up_only_from_who_has_the_very_file(
    tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    """The first breaks off for good; the second has the same NAR, compressed otherwise."""
    noise = b"".join(n.to_bytes(4, "little") for n in range(600_000))
    item = entry("app", noise, compression="zstd").signed(UPSTREAM)
    other_file = harder(item.nar)
    assert len(other_file) != len(item.file)
    digest = Hash.sha256(other_file)
    other = replace(
        item.but(file_hash=digest, file_size=len(other_file), url=f"nar/{digest.nix32}.nar.zst"),
        file=other_file,
    )
    upstream.add(item)
    second.add(other)
    async with narseal(
        tmp_path, {"url": upstream.url}, {"url": second.url, "priority": 90}
    ) as client:
        info = await client.narinfo(item.hash)
        assert info.url == item.info.url
        upstream.down = True
        await client.get(info.url)
        assert second.asked[other.info.url] == 0
